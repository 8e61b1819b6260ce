"""Orthogonal Matching Pursuit (OMP) for many targets over one set of atoms.

Letters in shapes: B targets, N atoms, d dimensions, k sparsity.

Source: Goddard & Fernandes Neto, "Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit"
(arXiv:2506.06607), section 3; the pursuit itself is Pati, Rezaiifar & Krishnaprasad (1993).
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from mergekit_omp.errors import OmpError
from mergekit_omp.solver.codes import SparseCodes, concatenate
from mergekit_omp.solver.device import solve_on
from mergekit_omp.solver.precision import full_precision

LOG = logging.getLogger(__name__)


def solve_omp(
    targets: Tensor,
    atoms: Tensor,
    k: int,
    *,
    normalize_atoms: bool = False,
    memory_budget: int | None = None,
    devices: Sequence[torch.device] | None = None,
    progress: Callable[[int], None] | None = None,
    name: str = "the donor's embedding",
) -> SparseCodes:
    """Approximate each target by a linear combination of at most k atoms.

    While it runs, torch's precision of matrix products is the one that this function needs, in all threads.

    Args:
        targets: (B, d) of any floating dtype.
        atoms: (N, d) of any floating dtype.
        k: sparsity, at least 1; values above N are reduced to N with a warning.
        normalize_atoms: select atoms by |⟨r, a⟩| / ‖a‖ instead of |⟨r, a⟩|.
        memory_budget: memory limit in bytes for each device, excluding the inputs; by default 60 % of its free memory.
        devices: devices to use; the targets are split over them. Default: the device of ``targets``.
        progress: callback that receives the number of targets solved since its last call.
        name: name of the matrix in messages.

    Returns:
        Codes with min(k, N) slots.

    Raises:
        OmpError: if k < 1, there are no atoms, or the input holds NaN or infinity.

    Example:
        >>> import torch
        >>> from mergekit_omp import solve_omp
        >>> atoms = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> codes = solve_omp(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), atoms, k=1)
        >>> codes.indices.tolist()
        [[2], [1]]
        >>> [f"{value:.3f}" for value in codes.coefficients.flatten()]
        ['5.000', '2.000']
    """
    if k < 1:
        raise OmpError(f"k is {k}, but OMP needs at least one atom per token: write k: 1 or more.")
    if len(atoms) == 0:
        raise OmpError(f"There are no atoms to approximate {name} with: the two vocabularies share no token.")
    targets, atoms = targets.detach(), atoms.detach()
    _check_finite(targets, f"targets of {name}")
    _check_finite(atoms, f"atoms of {name}")
    if k > len(atoms):
        LOG.warning("k is %d, but %s has only %d atoms: k is reduced to that.", k, name, len(atoms))
        k = len(atoms)
    devices = list(devices) if devices else [targets.device]
    parts = [part for part in targets.tensor_split(len(devices)) if len(part)]
    if not parts:
        return SparseCodes(torch.empty(0, k, dtype=torch.int64), torch.empty(0, k), torch.empty(0))

    def solve_part(device: torch.device, part: Tensor) -> SparseCodes:
        return solve_on(
            device,
            part,
            atoms,
            k,
            normalize_atoms=normalize_atoms,
            memory_budget=memory_budget,
            sharing=devices.count(device),
            progress=progress,
        )

    for gpu in [device for device in devices if device.type == "cuda"][:1]:
        torch.linalg.cholesky(torch.eye(1, device=gpu))  # load the library once: threads would race
    with full_precision(), ThreadPoolExecutor(len(parts)) as pool:
        solved = list(pool.map(solve_part, devices, parts))
    return concatenate(solved)


def not_finite(rows: Tensor) -> Tensor:
    """Return the int64 indices of the rows (B, …) that hold NaN or infinity."""
    rows = rows[:, None].flatten(1)
    dtype = torch.float32 if rows.dtype.itemsize == 1 else rows.dtype  # float8 has no sums, and others are slow
    suspects = (~torch.isfinite(rows.sum(1, dtype=dtype))).nonzero().flatten()  # and overflows
    return suspects[~torch.isfinite(rows[suspects]).all(dim=1)]


def _check_finite(rows: Tensor, what: str) -> None:
    bad = not_finite(rows)
    if len(bad):
        listed = ", ".join(str(int(row)) for row in bad[:5])
        raise OmpError(f"The {what} hold NaN or infinity, first in rows {listed}: repair the checkpoint.")
