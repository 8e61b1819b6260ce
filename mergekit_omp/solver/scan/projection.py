"""Orthogonalise the selected atom against the basis and update the residual.

Letters in shapes: B targets, N atoms, d dimensions, k sparsity.
"""

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from mergekit_omp.solver.tolerances import CANCELLED, DEPENDENT

LOG = logging.getLogger(__name__)


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
    kernel = find_kernel(residual.device) if residual.device.type == "cuda" else None
    if kernel is not None and residual.shape[1] <= kernel.LARGEST:
        return kernel.launch_orthogonalize(atoms, choice, atom_norm, useful, basis, size, residual)
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


@cache
def find_kernel(device: torch.device) -> ModuleType | None:
    """Return the module of the Triton kernel, or None if Triton is missing or cannot compile for this GPU.

    Triton comes with torch for CUDA on Linux.
    """
    try:
        from mergekit_omp.solver.scan import gpu_kernel
    except ImportError:
        return None
    row, norm = torch.ones(1, 16, device=device), torch.full((1,), 4.0, device=device)
    first, basis = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, 1, 16, device=device)
    try:
        gpu_kernel.launch_orthogonalize(row, first, norm, norm > 0, basis, 0, row.clone())
    except Exception as error:  # no C compiler, or a GPU that Triton does not support
        LOG.warning("Solving without Triton's kernels, which takes a fifth longer: %s", error)
        return None
    return gpu_kernel
