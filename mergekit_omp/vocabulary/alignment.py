"""A model's vocabulary laid over the output vocabulary."""

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from mergekit_omp.vocabulary.matching import VocabularyMatch
from mergekit_omp.vocabulary.tokens import Vocabulary


@dataclass(frozen=True, eq=False)
class Alignment:
    """A vocabulary and its match with the output vocabulary; all models of a recipe that have the vocabulary share it.

    Compared by identity, so that tasks with the same alignment are the same task.

    Attributes:
        name: the first model of the recipe that has the vocabulary.
        tokenizer: of that model; shared, not to be changed.
        vocabulary: the tokens that the model has rows for.
        match: which row of the model each output token has; none for tokens that the recipe approximates in any case.
        own_match: the same with these tokens.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    vocabulary: Vocabulary = field(repr=False)
    match: VocabularyMatch = field(repr=False)
    own_match: VocabularyMatch = field(repr=False)
