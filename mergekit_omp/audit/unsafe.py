"""Find approximated rows of a base that say what their tokens' bytes and pieces do not, before they are written."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_omp.audit.audit import RowCheck, check_rows_of
from mergekit_omp.audit.head import likely_everywhere
from mergekit_omp.audit.pieces import FAR, HEAD_ROW, INPUT_ROW, PieceCheck, matrices_of
from mergekit_omp.audit.states import last_states, logits_of, with_head
from mergekit_omp.report.samples import readable
from mergekit_omp.vocabulary.alignment import Alignment
from mergekit_omp.vocabulary.tokens import Vocabulary


@dataclass(frozen=True)
class UnsafeRows:
    """What was found of one input's approximated rows.

    Attributes:
        checked: how many there are.
        flagged: the suspicious ones, worst first.
    """

    checked: int
    flagged: tuple[RowCheck, ...]


def find_unsafe(
    model: PreTrainedModel,
    base: Alignment,
    output: Vocabulary,
    made: Mapping[str, tuple[Tensor, Tensor]],
    texts: Iterable[str],
    *,
    progress: bool = True,
) -> UnsafeRows:
    """Run a base on texts, and check rows that were made for its head and its input embedding.

    Args:
        model: the base; its head is replaced.
        base: its vocabulary beside the output's.
        output: the output vocabulary.
        made: output ids int64 (B,) and rows (B, d) for ``INPUT_ROW``, and for ``HEAD_ROW`` if the two are not tied.
        texts: what the base reads.
        progress: show a progress bar.

    Raises:
        OmpError: the model's head is not a module whose input can be read.
    """
    distances = {}
    for name, weight in matrices_of(model).items():
        ids, rows = made.get(name, made[INPUT_ROW])
        check = PieceCheck(base, output, ids)
        distances[name] = check.distances(weight, weight[base.match.rows[check.anchors].to(weight.device)], rows)
    states = last_states(model, base.tokenizer, texts, progress=progress)
    hidden = torch.cat([states.hidden, states.hidden.mean(dim=0, keepdim=True)])
    ids, rows = made.get(HEAD_ROW, made[INPUT_ROW])
    match = base.match.without(torch.cat([ids for ids, _ in made.values()]))
    kept = (match.rows >= 0).nonzero().flatten()
    # Rows that are neither kept nor checked are as unlikely as can be, so that they are not flagged.
    logits = torch.full((len(hidden), len(match.rows)), -torch.inf)
    logits[:-1, kept] = states.logits[:, match.rows[kept]]
    logits[-1, kept] = logits_of(model, hidden[-1:])[0, match.rows[kept]]
    logits[:, ids] = logits_of(with_head(model, rows), hidden)
    checks, _ = check_rows_of(logits, states, output, match, base.vocabulary, distances)
    return UnsafeRows(len(ids), tuple(check for check in checks if check.reasons))


def suspects(
    weight: Tensor, matrix: Tensor, base: Alignment, output: Vocabulary, ids: Tensor, *, name: str, is_head: bool
) -> list[dict[str, Any]] | None:
    """Find suspicious rows of a written matrix, as far as it and the base's tell; None if there are too few rows.

    Args:
        weight: (R, d) of a floating dtype, the base's matrix.
        matrix: (V, d), the same for the output vocabulary.
        base: the base's vocabulary beside the output's.
        output: the output vocabulary.
        ids: int64 (B,), output ids of approximated rows.
        name: ``INPUT_ROW`` or ``HEAD_ROW``.
        is_head: whether it is the head, or tied to it.

    Returns:
        ``id``, ``token`` and ``reasons`` of each, the worst first.
    """
    likely = likely_everywhere(matrix, base.match.atoms(), ids) if is_head else None
    check = PieceCheck(base, output, ids)
    far = check.distances(weight, matrix[check.anchors.to(matrix.device)], matrix[ids.to(matrix.device)])
    if likely is None and far is None:
        return None
    reasons = {id_: ["likely everywhere"] for id_ in ([] if likely is None else likely.tolist())}
    if far is not None:
        for id_ in far.argsort(descending=True, stable=True)[: int((far > 1).sum())].tolist():
            reasons.setdefault(id_, []).append(FAR.format(name))
    return [{"id": id_, "token": readable(output.tokens[id_]), "reasons": why} for id_, why in reasons.items()]
