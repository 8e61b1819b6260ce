"""Inputs and output of an initializer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from mergekit_omp.parameters import OmpParameters
from mergekit_omp.realign.problem import Problem
from mergekit_omp.solver import SparseCodes
from mergekit_omp.vocabulary.alignment import Alignment
from mergekit_omp.vocabulary.tokens import Vocabulary

RowFunction = Callable[[Tensor, bool], Tensor]
"""From a matrix [R, D] of the model, and whether it is the LM head, to float32 [B, D]: the rows of the B targets."""


@dataclass(frozen=True)
class NewTokens:
    """What can be known of the tokens that a model lacks before the matrix that they are for is seen.

    Shapes: B targets, N anchors, R rows of the model, R' of the donor.

    Attributes:
        problem: the targets and the anchors, by their ids in the output vocabulary and by their rows of the donor.
        anchor_rows: int64 [N], the row of the model that each anchor has.
        output: the output vocabulary.
        output_tokenizer: the output tokenizer; shared, not to be changed.
        model: the model's vocabulary, of tokens that it has rows for.
        tokenizer: the model's tokenizer; shared, not to be changed.
        parameters: the recipe's.
        donor: [R', d] the donor's matrix, vocabulary axis first, borrowed; for methods that need it.
        codes: OMP's, of the B targets over the N anchors; for methods that need them.
        own: the model's input embedding and LM head, [R, D] each, borrowed; for methods that need both for each.
        configs: of the donor and of the model; for methods that need them.
        trust_remote_code: whether code from a checkpoint may run.
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
    own: tuple[Tensor, Tensor] | None = None
    configs: tuple[PretrainedConfig, PretrainedConfig] | None = None
    trust_remote_code: bool = False

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
        """Describe the targets of a problem of the model with the vocabulary ``base``; ``more`` needs weights."""
        return cls(
            problem=problem,
            anchor_rows=base.match.rows[problem.atom_ids],
            output=output,
            output_tokenizer=output_tokenizer,
            model=base.vocabulary,
            tokenizer=base.tokenizer,
            parameters=parameters,
            **more,
        )

    def mean_row(self, weight: Tensor) -> Tensor:
        """The mean of the anchors' rows of a tensor [R, ...], float32: for tokens that a method has no answer for."""
        return weight[self.anchor_rows.to(weight.device)].float().mean(dim=0)
