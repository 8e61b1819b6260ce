"""Find approximated rows of a base that are likelier than their bytes allow, before the rows are written."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_omp.audit.audit import LISTED, RowCheck, check_rows_of
from mergekit_omp.audit.states import last_states, logits_of, with_head
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

    def as_dict(self) -> dict[str, Any]:
        """Return the counts and the worst rows, for the record of a run."""
        worst = [check.as_dict() for check in self.flagged[:LISTED]]
        return {"checked": self.checked, "flagged": len(self.flagged), "worst": worst}


def find_unsafe(
    model: PreTrainedModel,
    base: Alignment,
    output: Vocabulary,
    ids: Tensor,
    rows: Tensor,
    texts: Iterable[str],
    *,
    progress: bool = True,
) -> UnsafeRows:
    """Run a base on texts, and check rows that were made for its head.

    Args:
        model: the base; its head is replaced.
        base: its vocabulary beside the output's.
        output: the output vocabulary.
        ids: int64 (B,), output ids of the rows.
        rows: (B, d) of a floating dtype.
        texts: what the base reads.
        progress: show a progress bar.

    Raises:
        OmpError: the model's head is not a module whose input can be read.
    """
    states = last_states(model, base.tokenizer, texts, progress=progress)
    hidden = torch.cat([states.hidden, states.hidden.mean(dim=0, keepdim=True)])
    of_base = torch.cat([states.logits, logits_of(model, hidden[-1:])])
    match = base.match.without(ids)
    kept = (match.rows >= 0).nonzero().flatten()
    # Rows that are neither kept nor checked are as unlikely as can be, so that they are not flagged.
    logits = torch.full((len(hidden), len(match.rows)), -torch.inf)
    logits[:, kept] = of_base[:, match.rows[kept]]
    logits[:, ids] = logits_of(with_head(model, rows), hidden)
    checks, _ = check_rows_of(logits, states, output, match, base.vocabulary)
    return UnsafeRows(len(ids), tuple(check for check in checks if check.reasons))
