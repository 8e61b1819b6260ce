"""The two objectives, with their gradients.

The gradient of a cross-entropy is the model's distribution minus the target. It is written down here instead of left
to autograd, which would keep several more arrays of the size of the logits.
"""

import torch
from torch import Tensor

from mergekit_omp.evaluation.chunks import row_chunks
from mergekit_omp.healing.teacher import Targets


@torch.no_grad()
def next_token(logits: Tensor, ids: Tensor) -> tuple[float, Tensor]:
    """Cross-entropy of a text.

    Args:
        logits: (T, V), any floating dtype.
        ids: (T,) int64, the tokens that follow.

    Returns:
        The sum over T in nats, and its gradient (T, V) in the dtype of the logits.
    """
    loss, gradient = 0.0, torch.empty_like(logits)
    for rows in row_chunks(logits):
        chunk = torch.log_softmax(logits[rows], dim=-1, dtype=torch.float32)
        followers = ids[rows, None]
        loss -= chunk.gather(1, followers).sum().item()
        gradient[rows] = chunk.exp_().scatter_add_(1, followers, -torch.ones_like(followers, dtype=torch.float32))
    return loss, gradient


@torch.no_grad()
def cross_entropy(logits: Tensor, targets: Targets) -> tuple[float, Tensor]:
    """Cross-entropy with a teacher's distribution, which the KL divergence differs from by a constant.

    Tokens whose probability the teacher does not know are one event.

    Args:
        logits: (T, V), any floating dtype.
        targets: of the same T and V.

    Returns:
        The sum over T in nats, and its gradient (T, V) in the dtype of the logits.
    """
    loss, gradient = 0.0, torch.empty_like(logits)
    for rows in row_chunks(logits):
        known, unknown = targets.known[rows], targets.unknown[rows]
        chunk = torch.log_softmax(logits[rows], dim=-1, dtype=torch.float32)
        loss -= torch.einsum("tv,tv->", known, chunk).item()
        chunk.exp_()
        partly = unknown.nonzero()[:, 0]
        others = chunk[partly].masked_fill_(known[partly] > 0, 0)
        total = others.sum(dim=1).clamp_min(1e-20)
        loss -= (unknown[partly] * total.log()).sum().item()
        chunk -= known
        chunk.index_add_(0, partly, others * (unknown[partly] / total)[:, None], alpha=-1)
        gradient[rows] = chunk
    return loss, gradient
