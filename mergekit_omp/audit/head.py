"""Find new rows that the LM head alone shows to be likely everywhere, without states of the base.

On the mean last state, a head's logits follow how frequent tokens are, and a vocabulary lists its tokens in about
the order of their frequency, since BPE does. So the ridge regression of -log(1 + place) on the rows of anchors has
about the direction of the mean state. A new token is rare, or the base would have it; one that is higher along that
direction than nearly all anchors is suspicious. A row that is likely only after some texts is not found that way.
"""

import torch
from torch import Tensor

SHARE = 0.002
"""Share of the anchors that a row which is not flagged may be among."""

FEWEST = 1000
"""Anchors below which the order of a vocabulary says too little."""

SAMPLE = 2048
"""Anchors that the regression is fitted on. All 46,145 of a real pair tell the same."""

RANKED = 2**16
"""Anchors that new rows are compared with. A quarter of them misses a planted row of a real pair."""

RIDGE = 0.1
_NUMBERS_AT_A_TIME = 2**22  # 16 MiB of float32, which the C library keeps for the next part


def likely_everywhere(matrix: Tensor, anchors: Tensor, ids: Tensor) -> Tensor | None:
    """Return those of ``ids`` whose rows are flagged, the highest first; None where there are too few anchors to tell.

    Args:
        matrix: (V, d) of a floating dtype, the head for the output vocabulary.
        anchors: int64 (N,), output ids of anchors, ascending.
        ids: int64 (B,), output ids of approximated rows.
    """
    if len(anchors) < FEWEST:
        return None
    direction = _mean_state(matrix, anchors)
    ranked = anchors[:: -(-len(anchors) // RANKED)]
    kept, new = _along(direction, matrix, ranked), _along(direction, matrix, ids)
    limit = kept.sort(descending=True).values[int(SHARE * len(kept))]
    return ids[new.argsort(descending=True, stable=True)[: int((new > limit).sum())]]


def _mean_state(matrix: Tensor, anchors: Tensor) -> Tensor:
    """Estimate the direction of the mean last state, float32 (d,)."""
    places = torch.linspace(0, len(anchors) - 1, min(SAMPLE, len(anchors))).long()
    rows = matrix[anchors[places].to(matrix.device)].float()
    rows = rows - rows.mean(dim=0)
    log_frequencies = -torch.log1p(places.float()).to(rows.device)
    is_narrow = rows.shape[1] < len(rows)  # the same direction from the smaller system
    products = rows.T @ rows if is_narrow else rows @ rows.T
    ridge = RIDGE * rows.square().sum() / rows.shape[1]
    products.diagonal().add_(ridge.clamp(min=torch.finfo(torch.float32).tiny))
    log_frequencies = log_frequencies - log_frequencies.mean()
    if is_narrow:
        return torch.linalg.solve(products, rows.T @ log_frequencies)
    return rows.T @ torch.linalg.solve(products, log_frequencies)


def _along(direction: Tensor, matrix: Tensor, ids: Tensor) -> Tensor:
    at_a_time = max(1, _NUMBERS_AT_A_TIME // len(direction))
    parts = (matrix[part.to(matrix.device)].float() @ direction for part in ids.split(at_a_time))
    return torch.cat(list(parts)).cpu()
