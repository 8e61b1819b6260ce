"""Find approximated rows of a base that say what their tokens' bytes and pieces do not, before they are written."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_omp.audit.audit import RowCheck, check_rows_of
from mergekit_omp.audit.head import likely_everywhere
from mergekit_omp.audit.pieces import FAR, ROW_NAMES, PieceCheck, matrices_of
from mergekit_omp.audit.states import last_states, logits_of, with_head
from mergekit_omp.checkpoints.architecture import VocabularyRole
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
    made: Mapping[VocabularyRole, tuple[PieceCheck, Tensor]],
    texts: Iterable[str],
    *,
    progress: bool = True,
) -> UnsafeRows:
    """Run a base on texts, and check rows that were made for its head and its input embedding.

    Args:
        model: the base; its head is replaced.
        base: its vocabulary beside the output's.
        output: the output vocabulary.
        made: the new tokens and their rows (B, d) of the input embedding, and of the head if the two are not tied.
        texts: what the base reads.
        progress: show a progress bar.

    Raises:
        OmpError: the model's head is not a module whose input can be read.
    """
    distances = {}
    for role, weight in matrices_of(model).items():
        check, rows = made.get(role, made[VocabularyRole.INPUT])
        distances[role] = check.distances(weight, weight[base.match.rows[check.anchors].to(weight.device)], rows)
    states = last_states(model, base.tokenizer, texts, progress=progress)
    hidden = torch.cat([states.hidden, states.hidden.mean(dim=0, keepdim=True)])
    check, rows = made.get(VocabularyRole.HEAD, made[VocabularyRole.INPUT])
    match = base.match.without(torch.cat([new.ids for new, _ in made.values()]))
    kept = (match.rows >= 0).nonzero().flatten()
    # Rows that are neither kept nor checked are as unlikely as can be, so that they are not flagged.
    logits = torch.full((len(hidden), len(match.rows)), -torch.inf)
    logits[:-1, kept] = states.logits[:, match.rows[kept]]
    logits[-1, kept] = logits_of(model, hidden[-1:])[0, match.rows[kept]]
    logits[:, check.ids] = logits_of(with_head(model, rows), hidden)
    checks, _ = check_rows_of(logits, states, output, match, base.vocabulary, distances)
    return UnsafeRows(len(check.ids), tuple(row for row in checks if row.reasons))


def suspects(
    weight: Tensor,
    matrix: Tensor,
    base: Alignment,
    output: Vocabulary,
    check: PieceCheck,
    *,
    role: VocabularyRole,
    is_head: bool,
) -> list[dict[str, Any]] | None:
    """Find suspicious rows of a written matrix, as far as it and the base's tell; None if there are too few rows.

    Args:
        weight: (R, d) of a floating dtype, the base's matrix.
        matrix: (V, d), the same for the output vocabulary.
        base: the base's vocabulary beside the output's.
        output: the output vocabulary.
        check: of the approximated rows.
        role: of the matrix.
        is_head: whether it is the head, or tied to it.

    Returns:
        ``id``, ``token`` and ``reasons`` of each, the worst first.
    """
    likely = likely_everywhere(matrix, base.match.atoms(), check.ids) if is_head else None
    kept, new = (matrix[ids.to(matrix.device)] for ids in (check.anchors, check.ids))
    far = check.distances(weight, kept, new)
    if likely is None and far is None:
        return None
    reasons = {id_: ["likely everywhere"] for id_ in ([] if likely is None else likely.tolist())}
    if far is not None:
        for id_ in far.argsort(descending=True, stable=True)[: int((far > 1).sum())].tolist():
            reasons.setdefault(id_, []).append(FAR.format(ROW_NAMES[role]))
    return [{"id": id_, "token": readable(output.tokens[id_]), "reasons": why} for id_, why in reasons.items()]
