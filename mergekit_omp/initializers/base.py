"""Define the inputs and the output of an initializer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from mergekit_omp.parameters import OmpParameters
from mergekit_omp.realign.problem import Problem
from mergekit_omp.solver import SparseCodes
from mergekit_omp.vocabulary.alignment import Alignment
from mergekit_omp.vocabulary.tokens import Vocabulary

RowFunction = Callable[[Tensor, bool], Tensor]
"""Maps a matrix (R, D) of the model, and whether it is the LM head, to the rows float32 (B, D) of the B targets."""


@dataclass(frozen=True)
class NewTokens:
    """The inputs of an initializer: the new tokens of a model, and what is known before a matrix is given.

    Letters in shapes: B targets, N anchors, R rows of the model, R' rows of the donor.

    Attributes:
        alignment: the model's vocabulary and its match with the output's.
        problem: targets and anchors, by output id and by row of the donor.
        output: the output vocabulary.
        output_tokenizer: the output tokenizer; shared, so it must not be modified.
        parameters: parameters of the recipe.
        donor: the donor's matrix (R', d), vocabulary axis first, not to be modified; None unless the initializer needs
            it.
        codes: sparse codes of the B targets over the N anchors; None unless the initializer needs them.
        embedding_and_head: the model's input embedding and LM head, (R, D) each, not to be modified; None unless the
            initializer needs both.
        configs: configurations of the donor and of the model; None unless the initializer needs them.
        trust_remote_code: whether to run code that comes with a checkpoint.
    """

    alignment: Alignment
    problem: Problem
    output: Vocabulary
    output_tokenizer: PreTrainedTokenizerBase
    parameters: OmpParameters
    donor: Tensor | None = None
    codes: SparseCodes | None = None
    embedding_and_head: tuple[Tensor, Tensor] | None = None
    configs: tuple[PretrainedConfig, PretrainedConfig] | None = None
    trust_remote_code: bool = False

    @property
    def model(self) -> Vocabulary:
        """The model's vocabulary, restricted to tokens with rows."""
        return self.alignment.vocabulary

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; shared, so it must not be modified."""
        return self.alignment.tokenizer

    @property
    def anchor_rows(self) -> Tensor:
        """The model's row of each anchor, int64 (N,)."""
        return self.alignment.match.rows[self.problem.atom_ids]

    def pieces(self, ids: Sequence[int]) -> list[list[int]]:
        """Segment output tokens with the model's tokenizer: see :func:`segmentation.pieces`."""
        return self.alignment.pieces(self.output, ids)

    def mean_row(self, weight: Tensor) -> Tensor:
        """Return the mean float32 (…) of the anchors' rows of a tensor (R, …), for tokens without another row."""
        return weight[self.anchor_rows.to(weight.device)].float().mean(dim=0)
