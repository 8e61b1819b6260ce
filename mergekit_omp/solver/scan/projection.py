"""Orthogonalise the selected atom against the basis and update the residual.

Letters in shapes: B targets, N atoms, d dimensions, k sparsity.
"""

import torch
from torch import Tensor

from mergekit_omp.solver.tolerances import CANCELLED, DEPENDENT


def orthogonalize(
    atoms: Tensor, choice: Tensor, atom_norm: Tensor, useful: Tensor, basis: Tensor, size: int, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """Orthogonalise one atom per target against its basis, append the direction and project it out of the residual.

    Args:
        atoms: float32 (N, d).
        choice: int64 (B,), the selected atom of each target.
        atom_norm: float32 (B,), norms of the selected atoms.
        useful: bool (B,), whether to add the atom to the target's support.
        basis: float32 (B, k, d), of which the first ``size`` rows are orthonormal. Row ``size`` is written: the
            direction of the atom's component outside their span, or zero where the atom is not useful or lies in the
            span.
        size: number of rows so far.
        residual: float32 (B, d), modified in place: its component in that direction is subtracted.

    Returns:
        The length (B,) of the atom's component outside the span, and the weight (B,) of the direction in the residual
        before the update; both are 0 where the direction is zero.
    """
    component, span = atoms.index_select(0, choice), basis[:, :size]
    component[:, None].baddbmm_(torch.bmm(component[:, None], span.transpose(1, 2)), span, alpha=-1)
    length = component.norm(dim=1)
    cancelled = (length < CANCELLED * atom_norm).nonzero().flatten()
    if len(cancelled):
        span = span[cancelled]
        products = torch.bmm(span, component[cancelled, :, None])
        again = component[cancelled] - torch.bmm(products.transpose(1, 2), span).squeeze(1)
        component[cancelled], length[cancelled] = again, again.norm(dim=1)
    length *= useful & (length > DEPENDENT * atom_norm)
    inverse = (1 / length).where(length > 0, torch.zeros_like(length))
    direction = torch.mul(component, inverse[:, None], out=basis[:, size])
    weight = torch.bmm(direction[:, None], residual[:, :, None]).flatten()
    residual.addcmul_(weight[:, None], direction, value=-1)
    return length, weight
