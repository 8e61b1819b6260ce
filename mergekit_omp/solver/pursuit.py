"""Selection of the support, one atom a step."""

import torch
from torch import Tensor

RESIDUAL_IS_ZERO = 1e-6
"""A residual of this share of the target's norm is rounding, in float32."""

ATOM_IS_DEPENDENT = 1e-5
"""An atom of which only this share is outside the support's span is in that span, in float32."""


def pursue(targets: Tensor, atoms: Tensor, k: int) -> Tensor:
    """Support of each target: int64 (B, k), in the order of selection, -1 from the step at which it was done."""
    count, dim = targets.shape
    support = torch.full((count, k), -1, dtype=torch.int64, device=targets.device)
    basis = torch.zeros(count, k, dim, device=targets.device)  # (B, k, d), orthonormal rows
    residual = targets.clone()
    zero = RESIDUAL_IS_ZERO * targets.norm(dim=1)
    active = targets.norm(dim=1) > 0
    for step in range(k):
        if not active.any():
            break
        score, choice = (residual @ atoms.T).abs().max(dim=1)
        atom = atoms[choice]
        direction = atom.clone()
        for _ in range(2):  # once more, since classical Gram-Schmidt alone drifts
            seen = basis[:, :step]
            direction -= torch.einsum("bk,bkd->bd", torch.einsum("bkd,bd->bk", seen, direction), seen)
        length = direction.norm(dim=1)
        active = active & (length > ATOM_IS_DEPENDENT * atom.norm(dim=1)) & (score > 0)
        direction = torch.where(active[:, None], direction / length[:, None], 0)
        support[active, step] = choice[active]
        basis[:, step] = direction
        residual -= (direction * residual).sum(1, keepdim=True) * direction
        active = active & (residual.norm(dim=1) > zero)
    return support
