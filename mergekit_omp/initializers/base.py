"""Define the inputs and the output of an initializer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from mergekit_omp.parameters import OmpParameters
from mergekit_omp.realign.problem import Problem
from mergekit_omp.solver import SparseCodes
from mergekit_omp.vocabulary.alignment import Alignment
from mergekit_omp.vocabulary.segmentation import pieces
from mergekit_omp.vocabulary.tokens import Vocabulary

RowFunction = Callable[[Tensor, bool], Tensor]
"""Maps a matrix (R, D) of the model, and whether it is the LM head, to the rows float32 (B, D) of the B targets."""


@dataclass(frozen=True)
class NewTokens:
    """The inputs of an initializer: the new tokens of a model, and what is known before a matrix is given.

    Letters in shapes: B targets, N anchors, R rows of the model, R' rows of the donor.

    Attributes:
        problem: targets and anchors, by output id and by row of the donor.
        anchor_rows: int64 (N,), the model's row of each anchor.
        output: the output vocabulary.
        output_tokenizer: the output tokenizer; shared, so it must not be modified.
        model: the model's vocabulary, restricted to tokens with rows.
        tokenizer: the model's tokenizer; shared, so it must not be modified.
        parameters: parameters of the recipe.
        donor: the donor's matrix (R', d), vocabulary axis first, not to be modified; None unless the initializer needs
            it.
        codes: sparse codes of the B targets over the N anchors; None unless the initializer needs them.
        embedding_and_head: the model's input embedding and LM head, (R, D) each, not to be modified; None unless the
            initializer needs both.
        configs: configurations of the donor and of the model; None unless the initializer needs them.
        trust_remote_code: whether to run code that comes with a checkpoint.
        alignment: what has the segmentations that were made before; None if there are none.
    """

    problem: Problem
    anchor_rows: Tensor
    output: Vocabulary
    output_tokenizer: PreTrainedTokenizerBase
    model: Vocabulary
    tokenizer: PreTrainedTokenizerBase
    parameters: OmpParameters
    donor: Tensor | None = None
    codes: SparseCodes | None = None
    embedding_and_head: tuple[Tensor, Tensor] | None = None
    configs: tuple[PretrainedConfig, PretrainedConfig] | None = None
    trust_remote_code: bool = False
    alignment: Alignment | None = None

    @classmethod
    def of(
        cls,
        base: Alignment,
        problem: Problem,
        output: Vocabulary,
        output_tokenizer: PreTrainedTokenizerBase,
        parameters: OmpParameters,
        **more: Any,
    ) -> "NewTokens":
        """Build the inputs for a problem of a model with the vocabulary ``base``; ``more`` has optional fields."""
        return cls(
            problem=problem,
            anchor_rows=base.match.rows[problem.atom_ids],
            output=output,
            output_tokenizer=output_tokenizer,
            model=base.vocabulary,
            tokenizer=base.tokenizer,
            parameters=parameters,
            alignment=base,
            **more,
        )

    def pieces(self, ids: Sequence[int]) -> list[list[int]]:
        """Segment output tokens with the model's tokenizer: see :func:`segmentation.pieces`."""
        if self.alignment is not None:
            return self.alignment.pieces(self.output, ids)
        return pieces(self.output, self.tokenizer, ids, self.model)

    def mean_row(self, weight: Tensor) -> Tensor:
        """Return the mean float32 (…) of the anchors' rows of a tensor (R, …), for tokens without another row."""
        return weight[self.anchor_rows.to(weight.device)].float().mean(dim=0)
