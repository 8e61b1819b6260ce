"""Least-squares coefficients on a chosen support, in float64."""

import torch
from torch import Tensor


def held(device: torch.device) -> int:
    """Numbers of atoms held in float64 at a time: on a CPU what its cache holds, on a GPU enough for a few targets."""
    return 2**23 if device.type == "cuda" else 2**18


def _at_a_time(targets: Tensor, k: int) -> int:
    """Targets (B, d) at a time. A GPU is kept busy by many, and has room for a quarter of those that it solves: their
    pursuit took as much."""
    count, dim = targets.shape
    numbers = held(targets.device)
    if targets.device.type == "cuda":
        numbers = max(numbers, min(4 * numbers, count * k * dim // 4))
    return max(1, numbers // max(1, k * dim))


def least_squares(targets: Tensor, atoms: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients (B, k) of the targets (B, d) on their support (B, k), and residuals (B, d), all in float64.

    Unused slots (-1) get the coefficient 0.
    """
    coefficients = torch.empty_like(support, dtype=torch.float64)
    residuals = torch.empty_like(targets, dtype=torch.float64)
    step = _at_a_time(targets, support.shape[1])
    all_used = bool((support >= 0).all())  # once, since a GPU has to be waited for
    for start in range(0, len(targets), step):
        part = slice(start, start + step)
        coefficients[part], residuals[part] = _solve(targets[part].double(), atoms, support[part], all_used)
    return coefficients, residuals


def _solve(targets: Tensor, atoms: Tensor, support: Tensor, all_used: bool) -> tuple[Tensor, Tensor]:
    """As :func:`least_squares`, at once. Normal equations square the condition number; one step of refinement with the
    residual itself gives the digits back."""
    used = support >= 0
    chosen = atoms[support.clamp(min=0)].double()  # (B, k, d)
    if not all_used:
        chosen.mul_(used[:, :, None])
    gram = torch.bmm(chosen, chosen.transpose(1, 2))
    gram.diagonal(dim1=1, dim2=2).add_((~used).double())  # what is not used is an atom of its own
    factor = torch.linalg.cholesky(gram)
    residual, coefficients = targets, 0.0
    for _ in range(2):
        change = torch.cholesky_solve(torch.bmm(chosen, residual[:, :, None]), factor)
        coefficients = coefficients + change.squeeze(2)
        residual = residual - torch.bmm(change.transpose(1, 2), chosen).squeeze(1)
    return coefficients * used, residual


def refit(targets: Tensor, atoms: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 coefficients (B, k) of the targets (B, d) on their support (B, k), and relative residuals (B,)."""
    coefficients, residual = least_squares(targets, atoms, support)
    norm = targets.double().norm(dim=1)
    relative = residual.norm(dim=1) / norm.where(norm > 0, torch.ones_like(norm))
    return coefficients.float(), relative.float()
