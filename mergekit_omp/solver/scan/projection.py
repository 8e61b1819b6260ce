"""One step of a pursuit: what an atom adds to the span of those before it is taken off the residual.

Letters in shapes: B targets, N atoms, d dimensions, k sparsity.
"""

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

LOG = logging.getLogger(__name__)

DEPENDENT = 1e-5
"""An atom of which only this share lies outside the support's span is in that span."""

CANCELLED = 0.2
"""Where less than this share of an atom is left after Gram-Schmidt, it is repeated."""


def take(
    atoms: Tensor, choice: Tensor, whole: Tensor, wanted: Tensor, basis: Tensor, size: int, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """Take an atom for each target.

    Args:
        atoms: float32 (N, d).
        choice: int64 (B,), an atom for each target.
        whole: float32 (B,), its norm.
        wanted: bool (B,), whether the target takes it.
        basis: float32 (B, k, d), of which the first ``size`` rows are orthonormal. The next gets the direction of what
            of the atom is outside their span; zero where the target does not take it, or it is in the span already.
        size: how many rows there are.
        residual: float32 (B, d); its part in that direction is taken off.

    Returns:
        Of each target, the length (B,) of what is outside the span, and the weight (B,) of the direction in what was
        the residual; both are 0 where the direction is.
    """
    kernel = find_kernel(residual.device) if residual.device.type == "cuda" else None
    if kernel is not None and residual.shape[1] <= kernel.LARGEST:
        return kernel.take(atoms, choice, whole, wanted, basis, size, residual)
    rest, seen = atoms.index_select(0, choice), basis[:, :size]
    rest[:, None].baddbmm_(torch.bmm(rest[:, None], seen.transpose(1, 2)), seen, alpha=-1)
    length = rest.norm(dim=1)
    # Gram-Schmidt loses digits where most of the atom cancels; a second pass there is enough (Kahan, Parlett).
    cancelled = (length < CANCELLED * whole).nonzero().flatten()
    if len(cancelled):
        seen = seen[cancelled]
        shadow = torch.bmm(seen, rest[cancelled, :, None])
        again = rest[cancelled] - torch.bmm(shadow.transpose(1, 2), seen).squeeze(1)
        rest[cancelled], length[cancelled] = again, again.norm(dim=1)
    length *= wanted & (length > DEPENDENT * whole)
    share = (1 / length).where(length > 0, torch.zeros_like(length))
    direction = torch.mul(rest, share[:, None], out=basis[:, size])
    weight = torch.bmm(direction[:, None], residual[:, :, None]).flatten()
    residual.addcmul_(weight[:, None], direction, value=-1)
    return length, weight


@cache
def find_kernel(device: torch.device) -> ModuleType | None:
    """The kernel, where Triton, which comes with torch for CUDA on Linux, compiles and runs it on a GPU."""
    try:
        from mergekit_omp.solver.scan import gpu_kernel as projection_kernel
    except ImportError:
        return None
    row, norm = torch.ones(1, 16, device=device), torch.full((1,), 4.0, device=device)
    first, basis = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, 1, 16, device=device)
    try:
        projection_kernel.take(row, first, norm, norm > 0, basis, 0, row.clone())
    except Exception as error:  # there is no C compiler, or a GPU that Triton does not know
        LOG.warning("Solves take a fifth longer without Triton's kernels: %s", error)
        return None
    return projection_kernel
