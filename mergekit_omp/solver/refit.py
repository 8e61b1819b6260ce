"""Least-squares coefficients on a chosen support, in float64."""

import torch
from torch import Tensor


def refit(targets: Tensor, atoms: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients float32 (B, k) of the targets (B, d) on their support (B, k), and relative residuals (B,)."""
    used = support >= 0
    chosen = atoms[support.clamp(min=0)].double() * used[..., None]  # (B, k, d)
    exact = targets.double()
    gram = chosen @ chosen.transpose(1, 2)
    gram.diagonal(dim1=1, dim2=2).add_((~used).double())  # unused slots: c = 0
    right = chosen @ exact[..., None]
    coefficients = torch.cholesky_solve(right, torch.linalg.cholesky(gram)).squeeze(-1) * used
    error = exact - torch.einsum("bk,bkd->bd", coefficients, chosen)
    norm = exact.norm(dim=1)
    relative = torch.where(norm > 0, error.norm(dim=1) / norm.where(norm > 0, 1), 0)
    return coefficients.float(), relative.float()
