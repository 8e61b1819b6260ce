"""Build a model's rows for the output vocabulary: anchors, new tokens, copies, overrides, fallback and padding."""

from collections.abc import Mapping, Sequence

import torch

from mergekit_omp.errors import OmpError
from mergekit_omp.parameters import OmpParameters
from mergekit_omp.realign.problem import Problem
from mergekit_omp.solver import not_finite
from mergekit_omp.vocabulary.matching import MatchReason, VocabularyMatch

NOISE_SEED = 0

_ROWS_AT_ONCE = 4096


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
    """Build one tensor of a model for the output vocabulary.

    Args:
        weight: (R, …) of a floating dtype, vocabulary axis first; not modified. Rows of anchors are copied bit for
            bit, other rows are computed in float32.
        match: row of each of the V output tokens.
        problems: new tokens of the model, one problem per donor.
        new_rows: rows (B, …) of the targets of each problem.
        parameters: noise and scale of approximated rows.
        size: number of rows of the result, at least V. Rows beyond V, ids without a token and tokens that no donor has
            get the mean of the anchors' rows.
        free_rows: rows of the model that no text ever uses. Unused tokens, and tokens that are under-trained in the
            donor too, get their mean, or the mean of the anchors' rows if there are none.
        copied: output ids (C,) and their rows (C, …), which replace the model's own.
        overrides: row (…) of each overridden output id, which replaces all other rows.

    Returns:
        (size, …) of the weight's dtype, on its device.
    """
    kept = (match.rows >= 0).nonzero().squeeze(1)
    rows_of_kept = match.rows[kept].to(weight.device)
    # Padding rows as in mergekit, following https://nlp.stanford.edu/~johnhew/vocab-expansion.html
    mean = weight[rows_of_kept].float().mean(dim=0).to(weight.dtype)
    result = mean.expand(size, *weight.shape[1:]).clone()
    for ids, rows in zip(kept.to(weight.device).split(_ROWS_AT_ONCE), rows_of_kept.split(_ROWS_AT_ONCE), strict=True):
        result[ids] = weight[rows]  # in parts: no third matrix in memory
    if len(free_rows):
        untrained = torch.cat([_free_ids(match), *(problem.untrained_ids for problem in problems)])
        result[untrained.to(weight.device)] = weight[list(free_rows)].float().mean(dim=0).to(weight.dtype)
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
    """Return the output ids int64 (U,) of unused and duplicate tokens without a row of the model."""
    unwritten = (match.reasons == MatchReason.UNUSED) | (match.reasons == MatchReason.DUPLICATE)
    return (unwritten & (match.rows < 0)).nonzero().squeeze(1)


def check_rows(weight: torch.Tensor, rows: torch.Tensor, name: str) -> None:
    """Raise an OmpError unless ``weight`` (R, …) is finite, of a floating dtype and has all of ``rows``."""
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
