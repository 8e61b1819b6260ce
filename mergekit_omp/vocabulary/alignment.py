"""Hold a model's vocabulary together with its match with the output vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from mergekit_omp.vocabulary.matching import VocabularyMatch
from mergekit_omp.vocabulary.segmentation import pieces
from mergekit_omp.vocabulary.tokens import Vocabulary


@dataclass(frozen=True, eq=False)
class Alignment:
    """A vocabulary and its match with the output vocabulary, shared by all models of a recipe with that vocabulary.

    Compared by identity, so that tasks with the same alignment are equal.

    Attributes:
        name: the first model of the recipe that has the vocabulary.
        tokenizer: tokenizer of that model; shared, so it must not be modified.
        vocabulary: the tokens that the model has rows for.
        match: row of the model for each output token, without those that the recipe approximates in any case.
        own_match: the same including these tokens.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    vocabulary: Vocabulary = field(repr=False)
    match: VocabularyMatch = field(repr=False)
    own_match: VocabularyMatch = field(repr=False)
    _pieces: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False)

    def pieces(self, output: Vocabulary, ids: Sequence[int]) -> list[list[int]]:
        """Segment tokens of the output vocabulary, each once in a run: see :func:`segmentation.pieces`."""
        new = [id_ for id_ in ids if id_ not in self._pieces]
        self._pieces.update(zip(new, pieces(output, self.tokenizer, new, self.vocabulary), strict=True))
        return [self._pieces[id_] for id_ in ids]
