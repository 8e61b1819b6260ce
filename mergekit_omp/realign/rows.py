"""Build a model's rows for the output vocabulary: kept anchors, applied codes, overrides, fallback and padding."""

from collections.abc import Mapping, Sequence

import torch

from mergekit_omp.errors import OmpError
from mergekit_omp.parameters import OmpParameters
from mergekit_omp.realign.problem import Problem
from mergekit_omp.solver import not_finite
from mergekit_omp.vocabulary.matching import MatchReason, VocabularyMatch

NOISE_SEED = 0


def realign(
    weight: torch.Tensor,
    match: VocabularyMatch,
    problems: Sequence[Problem],
    new_rows: Sequence[torch.Tensor],
    *,
    parameters: OmpParameters,
    size: int,
    free_rows: Sequence[int] = (),
    copied: tuple[torch.Tensor, torch.Tensor] | None = None,
    overrides: Mapping[int, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Give one tensor of a model the rows of the output vocabulary.

    Args:
        weight: [R, ...] floating point, vocabulary axis first; borrowed. Rows of anchors are copied bit for bit, the
            rest is computed in float32.
        match: which of the R rows each of the V output tokens has.
        problems: what the model lacks and the donors have.
        new_rows: for each problem the rows [B, ...] of its targets.
        parameters: noise and scale of approximated rows.
        size: rows of the result, at least V; rows beyond V, and ids without a token, get the mean of the anchors'
            rows, as do tokens that no donor has.
        free_rows: the model's rows that no text ever used. Tokens that are kept free for later use, and tokens that
            the donor has not learnt either, get their mean; the mean of the anchors' rows where there are none.
        copied: output ids [C] and their rows [C, ...], which win over the model's own.
        overrides: output id to row [...], which win over everything else.

    Returns:
        [size, ...] of the weight's dtype, on its device.
    """
    kept = (match.rows >= 0).nonzero().squeeze(1)
    kept_rows = weight[match.rows[kept].to(weight.device)]
    # Padding as in mergekit, after https://nlp.stanford.edu/~johnhew/vocab-expansion.html
    result = kept_rows.float().mean(dim=0).to(weight.dtype).expand(size, *weight.shape[1:]).clone()
    result[kept.to(weight.device)] = kept_rows
    if len(free_rows):
        unlearnt = torch.cat([_free_ids(match), *(problem.untrained_ids for problem in problems)])
        result[unlearnt.to(weight.device)] = weight[list(free_rows)].float().mean(dim=0).to(weight.dtype)
    for problem, rows in zip(problems, new_rows, strict=True):
        rows = _with_noise(rows, parameters.new_vocab_noise) * parameters.new_vocab_scale
        result[problem.target_ids.to(weight.device)] = rows.reshape(-1, *weight.shape[1:]).to(weight.dtype)
    if copied is not None:
        ids, rows = copied
        result[ids.to(weight.device)] = rows.to(weight)
    for token_id, row in (overrides or {}).items():
        result[token_id] = row.to(weight)
    return result


def _free_ids(match: VocabularyMatch) -> torch.Tensor:
    """The output tokens that no text has, kept free for later use or never written, without a row of the model."""
    never = (match.reasons == MatchReason.UNUSED) | (match.reasons == MatchReason.DUPLICATE)
    return (never & (match.rows < 0)).nonzero().squeeze(1)


def check_rows(weight: torch.Tensor, rows: torch.Tensor, name: str) -> None:
    """Raise an OmpError unless ``weight`` [R, ...] is finite, floating point and has all of ``rows``."""
    if not weight.is_floating_point():
        raise OmpError(
            f"{name} is {weight.dtype}: only floating point embeddings can be realigned; dequantize it first."
        )
    highest = int(rows.max()) if len(rows) else -1
    if highest >= weight.shape[0]:
        raise OmpError(
            f"{name} has {weight.shape[0]} rows, but its config.json promises at least {highest + 1}: "
            "set vocab_size there to the rows that the checkpoint has."
        )
    bad = not_finite(weight).tolist()
    if bad:
        raise OmpError(
            f"{name} holds NaN or infinite values in {len(bad)} rows (first: {', '.join(map(str, bad[:5]))}); "
            "repair the checkpoint."
        )


def _with_noise(rows: torch.Tensor, scale: float) -> torch.Tensor:
    if not scale:
        return rows
    generator = torch.Generator().manual_seed(NOISE_SEED)  # on the CPU, so that every device adds the same noise
    return rows + scale * torch.randn(rows.shape, generator=generator).to(rows.device)
