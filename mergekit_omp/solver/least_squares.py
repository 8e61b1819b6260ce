"""Compute least-squares coefficients on given supports, in float64.

Letters in shapes: B targets, N atoms, d dimensions, k sparsity.
"""

import torch
from torch import Tensor


def block_values(device: torch.device) -> int:
    """Return the number of float64 values to gather per block: a CPU cache's worth, or enough to keep a GPU busy."""
    return 2**23 if device.type == "cuda" else 2**18


def rows_at_a_time(rows: Tensor) -> int:
    """Return the number of rows (N, d) to prepare per block: few blocks on a GPU, which launches operations slowly."""
    return max(1024, block_values(rows.device) // rows.shape[1]) if rows.device.type == "cuda" else 1024


def _targets_at_a_time(targets: Tensor, k: int) -> int:
    """Return the chunk size for targets (B, d).

    Large chunks keep a GPU busy. A quarter of the targets always fits, since their pursuit needed as much memory.
    """
    count, dim = targets.shape
    values = block_values(targets.device)
    if targets.device.type == "cuda":
        values = max(values, min(4 * values, count * k * dim // 4))
    return max(1, values // max(1, k * dim))


def least_squares(targets: Tensor, atoms: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """Fit targets (B, d) by the atoms (N, d) of their supports (B, k), in which -1 marks unused slots.

    Returns:
        Coefficients (B, k), 0 in unused slots, and residuals (B, d), both float64.
    """
    coefficients = torch.empty_like(support, dtype=torch.float64)
    residuals = torch.empty_like(targets, dtype=torch.float64)
    step = _targets_at_a_time(targets, support.shape[1])
    all_used = bool((support >= 0).all())  # evaluated once: it synchronises the GPU
    for start in range(0, len(targets), step):
        part = slice(start, start + step)
        coefficients[part], residuals[part] = _solve(targets[part].double(), atoms, support[part], all_used)
    return coefficients, residuals


def _solve(targets: Tensor, atoms: Tensor, support: Tensor, all_used: bool) -> tuple[Tensor, Tensor]:
    """Solve the normal equations of one chunk; see :func:`least_squares`.

    Normal equations square the condition number; one step of iterative refinement restores the lost digits.
    """
    used = support >= 0
    chosen = atoms[support.clamp(min=0)].double()  # (B, k, d)
    if not all_used:
        chosen.mul_(used[:, :, None])
    gram = torch.bmm(chosen, chosen.transpose(1, 2))
    gram.diagonal(dim1=1, dim2=2).add_((~used).double())  # keeps the matrix regular
    factor = torch.linalg.cholesky(gram)
    residual, coefficients = targets, targets.new_zeros(support.shape)
    for _ in range(2):
        change = torch.cholesky_solve(torch.bmm(chosen, residual[:, :, None]), factor)
        coefficients = coefficients + change.squeeze(2)
        residual = residual - torch.bmm(change.transpose(1, 2), chosen).squeeze(1)
    return coefficients * used, residual


def fit_supports(targets: Tensor, atoms: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """Return coefficients (B, k) of targets (B, d) on their supports, and relative residuals (B,), both float32."""
    coefficients, residual = least_squares(targets, atoms, support)
    norm = targets.double().norm(dim=1)
    relative = residual.norm(dim=1) / norm.where(norm > 0, torch.ones_like(norm))
    return coefficients.float(), relative.float()
