"""The resolved recipe: everything that is known before a weight is read, found out once a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field

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
        reference: how mergekit knows it.
        key: the recipe key that it stands under, for messages.
        config: its configuration; None for a tokenizer without a model.
        rows: of its embedding, as its configuration says; None for a tokenizer without a model.
        tokenizer: its own; shared, not to be changed.
        alignment: of its vocabulary with the output's; the same object for models with equal vocabularies.
    """

    reference: ModelReference
    key: str
    config: PretrainedConfig | None = field(repr=False)
    rows: int | None
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    alignment: Alignment = field(repr=False)

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens that it has rows for; all of its tokenizer's where there is no model."""
        return self.alignment.vocabulary

    @property
    def match(self) -> VocabularyMatch:
        """Which of its rows each output token has."""
        return self.alignment.match

    def __str__(self) -> str:
        """As the recipe names it."""
        return str(self.reference)


@dataclass(frozen=True, eq=False)
class DonorProblem:
    """What one donor gives to the models of one vocabulary.

    Attributes:
        base: the vocabulary that is realigned.
        donor: whose rows are approximated.
        earlier: the donors that take precedence.
        problem: the new tokens that the donor has rows for and the earlier ones have not, and the anchors.
    """

    base: Alignment
    donor: RecipeModel
    earlier: tuple[RecipeModel, ...]
    problem: Problem


@dataclass(frozen=True, eq=False)
class Transplant:
    """A recipe of ours, checked and resolved.

    Attributes:
        config: the recipe; mergekit's planner rewrites its ``models:`` and ``slices:``, nothing here depends on them.
        options: of the run.
        inputs: the models that are merged, the base model first.
        donors: the models that give the rows which an input lacks, in order of precedence.
        tokenizer: the output's; mergekit sets its chat template and saves it.
        vocabulary: the output's; every id gets a row.
        tokenizer_is_unchanged: whether it is the first donor's, without additions.
        overrides: ``tokenizer.tokens`` of the recipe.
        chat_template: the recipe's; None where the tokenizer keeps its own.
        rows: of the output's embedding.
        problems: what each donor gives to the models of each vocabulary; those without targets are among them.
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
        """Inputs and donors, each once."""
        return tuple({model.reference: model for model in (*self.inputs, *self.donors)}.values())

    @property
    def trust_remote_code(self) -> bool:
        """Whether code that comes with a model may run."""
        return self.options.trust_remote_code

    @property
    def overridden(self) -> set[str]:
        """The tokens that the recipe names a source of rows for."""
        return {token for token, override in self.overrides.items() if override.source is not None}

    def model(self, reference: ModelReference) -> RecipeModel:
        """The input or donor of that name."""
        return next(model for model in self.models if model.reference == reference)

    def id_of(self, token: str) -> int:
        """The output id of a token, by the string that the tokenizer has for it."""
        return next(id_ for id_, known in self.vocabulary.tokens.items() if known.text == token)


def tokenizer_source(config: MergeConfiguration) -> ModelReference | str:
    """The source of the output tokenizer, wherever a recipe says it."""
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    assert source is not None, "checked by recipe.checks"
    return source
