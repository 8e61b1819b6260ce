"""Least-squares coefficients on a support, in float64.

Letters in shapes: B targets, N atoms, d dimensions, k sparsity.
"""

import torch
from torch import Tensor


def block_numbers(device: torch.device) -> int:
    """Return how many float64 numbers to gather at a time: what a CPU's cache holds, or enough to keep a GPU busy."""
    return 2**23 if device.type == "cuda" else 2**18


def _targets_at_a_time(targets: Tensor, k: int) -> int:
    """A GPU is kept busy by many targets (B, d), and has room for a quarter of them: their pursuit took as much."""
    count, dim = targets.shape
    numbers = block_numbers(targets.device)
    if targets.device.type == "cuda":
        numbers = max(numbers, min(4 * numbers, count * k * dim // 4))
    return max(1, numbers // max(1, k * dim))


def least_squares(targets: Tensor, atoms: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """Fit the targets (B, d) by the atoms (N, d) of their support (B, k).

    Returns:
        Coefficients (B, k), 0 where a slot is unused (-1), and residuals (B, d), both float64.
    """
    coefficients = torch.empty_like(support, dtype=torch.float64)
    residuals = torch.empty_like(targets, dtype=torch.float64)
    step = _targets_at_a_time(targets, support.shape[1])
    all_used = bool((support >= 0).all())  # asked once, since a GPU has to be waited for
    for start in range(0, len(targets), step):
        part = slice(start, start + step)
        coefficients[part], residuals[part] = _solve(targets[part].double(), atoms, support[part], all_used)
    return coefficients, residuals


def _solve(targets: Tensor, atoms: Tensor, support: Tensor, all_used: bool) -> tuple[Tensor, Tensor]:
    """As :func:`least_squares`, at once.

    Normal equations square the condition number; one step of iterative refinement gives the digits back.
    """
    used = support >= 0
    chosen = atoms[support.clamp(min=0)].double()  # (B, k, d)
    if not all_used:
        chosen.mul_(used[:, :, None])
    gram = torch.bmm(chosen, chosen.transpose(1, 2))
    gram.diagonal(dim1=1, dim2=2).add_((~used).double())  # an unused slot is an equation of its own
    factor = torch.linalg.cholesky(gram)
    residual, coefficients = targets, targets.new_zeros(support.shape)
    for _ in range(2):
        change = torch.cholesky_solve(torch.bmm(chosen, residual[:, :, None]), factor)
        coefficients = coefficients + change.squeeze(2)
        residual = residual - torch.bmm(change.transpose(1, 2), chosen).squeeze(1)
    return coefficients * used, residual


def refit(targets: Tensor, atoms: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 coefficients (B, k) of the targets (B, d) on their support, and relative residuals (B,)."""
    coefficients, residual = least_squares(targets, atoms, support)
    norm = targets.double().norm(dim=1)
    relative = residual.norm(dim=1) / norm.where(norm > 0, torch.ones_like(norm))
    return coefficients.float(), relative.float()
