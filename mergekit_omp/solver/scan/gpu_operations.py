"""Correlate and orthogonalise in fixed shapes: in Triton kernels where they compile, else in operations of torch.

Letters in shapes: B targets, N atoms, d dimensions, k sparsity, P places for candidates.
"""

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from mergekit_omp.solver.tolerances import DEPENDENT

LOG = logging.getLogger(__name__)


def correlate(residual: Tensor, atoms: Tensor, candidates: Tensor) -> Tensor:
    """Correlate residuals float64 (B, d) with their candidates int64 (B, P) among atoms float32 (N, d).

    Returns:
        |⟨residual, atom⟩| float64 (B, P); -1 where the candidate is -1.
    """
    kernel = _kernel_for(residual)
    if kernel is not None:
        return kernel.launch_correlate(residual, atoms, candidates)
    inner = [(residual * atoms[column.clamp(min=0)]).sum(1).abs() for column in candidates.unbind(1)]
    return torch.stack(inner, 1).where(candidates >= 0, -1)


def orthogonalize(
    atoms: Tensor, choice: Tensor, atom_norm: Tensor, useful: Tensor, basis: Tensor, size: Tensor, residual: Tensor
) -> Tensor:
    """Orthogonalise one atom per target against its basis, append the direction and project it out of the residual.

    Args:
        atoms: float32 (N, d).
        choice: int64 (B,), the selected atom of each target.
        atom_norm: float64 (B,), norms of the selected atoms.
        useful: bool (B,), whether to change the target's basis and residual.
        basis: float64 (B, k, d), orthonormal rows and then zeros. The direction of the atom's component outside their
            span is added, unless the atom lies in the span.
        size: int64 (B,), number of orthonormal rows; below k where ``useful``.
        residual: float64 (B, d), modified in place: its component in that direction is subtracted.

    Returns:
        bool (B,), whether a direction was added.
    """
    kernel = _kernel_for(residual)
    if kernel is not None:
        return kernel.launch_orthogonalize(atoms, choice, atom_norm, useful, basis, size, residual)
    component = atoms[choice].double()[:, :, None]  # (B, d, 1)
    for _ in range(2):  # twice is enough (Kahan, in Parlett 1980)
        component = component - basis.transpose(1, 2) @ (basis @ component)
    component = component.squeeze(2)
    length = component.norm(dim=1)
    added = useful & (length > DEPENDENT * atom_norm)
    direction = torch.where(added, 1 / length, 0)[:, None] * component.where(added[:, None], 0)
    target, row = torch.arange(len(size), device=size.device), size.clamp(max=basis.shape[1] - 1)
    basis[target, row] = basis[target, row] + direction
    residual.sub_((direction * residual).sum(1, keepdim=True) * direction)
    return added


def _kernel_for(residual: Tensor) -> ModuleType | None:
    """Return the module of the kernels if they can process residuals (B, d)."""
    kernel = find_kernel(residual.device) if residual.device.type == "cuda" else None
    return kernel if kernel is not None and residual.shape[1] <= kernel.LARGEST else None


@cache
def find_kernel(device: torch.device) -> ModuleType | None:
    """Return the module of the Triton kernels, or None if Triton is missing or cannot compile for this GPU.

    Triton comes with torch for CUDA on Linux.
    """
    try:
        from mergekit_omp.solver.scan import gpu_kernel
    except ImportError:
        return None
    row, norm = torch.ones(1, 16, device=device), torch.full((1,), 4.0, device=device, dtype=torch.float64)
    first, basis = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, 1, 16, device=device).double()
    try:
        gpu_kernel.launch_correlate(row.double(), row, first[:, None])
        gpu_kernel.launch_orthogonalize(row, first, norm, norm > 0, basis, first, row.double())
    except Exception as error:  # no C compiler, or a GPU that Triton does not support
        LOG.warning("Solving without Triton's kernels, which takes longer: %s", error)
        return None
    return gpu_kernel
