"""Define the resolved recipe: everything that is known before weights are read, computed once per run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from mergekit.tokenizer.config import TokenEmbeddingConfig
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from mergekit_omp.realign.problem import Problem
from mergekit_omp.vocabulary.alignment import Alignment
from mergekit_omp.vocabulary.matching import VocabularyMatch
from mergekit_omp.vocabulary.tokens import Vocabulary


@dataclass(frozen=True, eq=False)
class RecipeModel:
    """A model that a recipe names: an input of the merge, a donor, or both.

    Attributes:
        reference: mergekit's reference to it.
        key: its recipe key, for messages.
        config: its configuration; None for a tokenizer without a model.
        rows: rows of its embedding according to its configuration; None for a tokenizer without a model.
        tokenizer: its tokenizer; shared, so it must not be modified.
        tokenizer_size: the largest id of its tokenizer + 1, whatever rows there are.
        alignment: match of its vocabulary with the output vocabulary; the same object for equal vocabularies.
    """

    reference: ModelReference
    key: str
    config: PretrainedConfig | None = field(repr=False)
    rows: int | None
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    tokenizer_size: int
    alignment: Alignment = field(repr=False)

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens that it has rows for; all tokens of a tokenizer without a model."""
        return self.alignment.vocabulary

    @property
    def match(self) -> VocabularyMatch:
        """Its row for each output token."""
        return self.alignment.match

    def __str__(self) -> str:
        """Return the name in the recipe."""
        return str(self.reference)


@dataclass(frozen=True, eq=False)
class DonorProblem:
    """The new tokens of one vocabulary that one donor has.

    Attributes:
        base: the vocabulary that is realigned.
        donor: the donor.
        earlier: donors that take precedence.
        problem: new tokens with rows in the donor and not in earlier donors, and the anchors.
    """

    base: Alignment
    donor: RecipeModel
    earlier: tuple[RecipeModel, ...]
    problem: Problem


@dataclass(frozen=True, eq=False)
class Transplant:
    """A checked and resolved recipe.

    Attributes:
        config: the recipe. mergekit's planner rewrites its ``models:`` and ``slices:``; nothing here depends on them.
        options: mergekit's options.
        inputs: the models that are merged, the base model first.
        donors: the models with rows for new tokens, in order of precedence.
        tokenizer: the output tokenizer; mergekit sets its chat template and saves it.
        vocabulary: the output vocabulary; every id gets a row.
        tokenizer_is_unchanged: whether the output tokenizer is that of the first donor.
        overrides: ``tokenizer.tokens`` of the recipe.
        chat_template: chat template of the recipe; None if the tokenizer keeps its own.
        rows: rows of the output's embedding.
        problems: one problem per donor for each vocabulary of an input, including problems without targets.
        found_copies: what :func:`mergekit_omp.recipe.copies.find_copies` has found, by its other arguments.
    """

    config: MergeConfiguration
    options: MergeOptions
    inputs: tuple[RecipeModel, ...]
    donors: tuple[RecipeModel, ...]
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    tokenizer_is_unchanged: bool
    overrides: Mapping[str, TokenEmbeddingConfig]
    chat_template: str | None
    rows: int
    problems: Mapping[Alignment, tuple[DonorProblem, ...]]
    found_copies: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def base(self) -> RecipeModel:
        """The model whose configuration the output gets."""
        return self.inputs[0]

    @property
    def source(self) -> ModelReference | str:
        """``tokenizer.source``: a model, ``base`` or ``union``."""
        return tokenizer_source(self.config)

    @property
    def models(self) -> tuple[RecipeModel, ...]:
        """Inputs and donors, without repetition."""
        return tuple({model.reference: model for model in (*self.inputs, *self.donors)}.values())

    @property
    def trust_remote_code(self) -> bool:
        """Whether code that comes with a model may run."""
        return self.options.trust_remote_code

    @property
    def overridden(self) -> set[str]:
        """The tokens whose row has a source in the recipe."""
        return {token for token, override in self.overrides.items() if override.source is not None}

    def model(self, reference: ModelReference) -> RecipeModel:
        """Return the input or donor with this reference."""
        return next(model for model in self.models if model.reference == reference)

    def id_of(self, token: str) -> int:
        """Return the output id of a token, given its string in the tokenizer."""
        return next(id_ for id_, known in self.vocabulary.tokens.items() if known.text == token)


def tokenizer_source(config: MergeConfiguration) -> ModelReference | str:
    """Return the source of the output tokenizer, which a recipe can set in two places."""
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    assert source is not None, "checked by recipe.checks"
    return source
