"""Orthogonal Matching Pursuit (OMP) for many targets over one set of atoms.

Letters in shapes: B targets, N atoms, d dimensions, k sparsity.

Source: Goddard & Fernandes Neto, "Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit"
(arXiv:2506.06607), section 3; the pursuit itself is Pati, Rezaiifar & Krishnaprasad (1993).
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_omp.errors import OmpError
from mergekit_omp.solver.pursuit import pursue
from mergekit_omp.solver.refit import refit

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class SparseCodes:
    """B targets as combinations of at most k atoms each, on the CPU.

    Attributes:
        indices: int64 (B, k), atom of each slot in the order of selection; -1 where the slot is unused.
        coefficients: float32 (B, k), 0 where the slot is unused.
        relative_residuals: float32 (B,), ‖x - x̂‖ / ‖x‖; 0 for a zero target.
    """

    indices: Tensor
    coefficients: Tensor
    relative_residuals: Tensor

    def apply(self, rows: Tensor, chunk_bytes: int = 256 * 2**20) -> Tensor:
        """Combine other rows with these codes: Σᵢ cᵢ rows[idxᵢ] for each target.

        Args:
            rows: (N, D) of any floating dtype, one row for each atom, in the atoms' order.
            chunk_bytes: bound on the float32 rows gathered at a time.

        Returns:
            float32 (B, D) on the device of ``rows``.
        """
        combined = torch.empty(len(self.indices), rows.shape[1], dtype=torch.float32, device=rows.device)
        row_bytes = max(1, self.indices.shape[1] * rows.shape[1] * 4)
        step = max(1, chunk_bytes // row_bytes)
        for start in range(0, len(self.indices), step):
            part = slice(start, start + step)
            indices = self.indices[part].clamp(min=0).to(rows.device)
            coefficients = self.coefficients[part].to(rows.device)
            combined[part] = torch.einsum("bk,bkd->bd", coefficients, rows[indices].float())
        return combined


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
    """Write each target as a combination of at most k atoms.

    Args:
        targets: (B, d) of any floating dtype.
        atoms: (N, d) of any floating dtype.
        k: the sparsity, at least 1; more than N means N, with a warning.
        normalize_atoms: select by the angle |⟨r, a⟩| / ‖a‖ instead of |⟨r, a⟩|.
        memory_budget: bytes that the solve may hold on a device at a time, beside its input.
        devices: where to work; the targets are split over them. Default: the device of ``targets``.
        progress: called with the number of targets finished since the last call.
        name: what the rows are, for error messages.

    Returns:
        The codes, with min(k, N) slots.

    Raises:
        OmpError: k < 1, no atoms, or a NaN or infinity in the input.
    """
    if k < 1:
        raise OmpError(f"k is {k}, but OMP needs at least one atom a token: write k: 1 or more.")
    if len(atoms) == 0:
        raise OmpError(f"There are no atoms to approximate {name} with: the two vocabularies share no token.")
    _check_finite(targets, f"targets of {name}")
    _check_finite(atoms, f"atoms of {name}")
    if k > len(atoms):
        LOG.warning("k is %d, but %s has only %d atoms: all of them are used.", k, name, len(atoms))
        k = len(atoms)
    devices = list(devices) if devices else [targets.device]
    parts = torch.arange(len(targets)).tensor_split(len(devices))
    with ThreadPoolExecutor(len(devices)) as pool:
        jobs = [
            pool.submit(_solve_on, device, targets[part[0] : part[-1] + 1], atoms, k, normalize_atoms, progress)
            for device, part in zip(devices, parts, strict=True)
            if len(part)
        ]
        solved = [codes for job in jobs for codes in job.result()]
    if not solved:
        return SparseCodes(torch.empty(0, k, dtype=torch.int64), torch.empty(0, k), torch.empty(0))
    return SparseCodes(*(torch.cat(column) for column in zip(*solved, strict=True)))


def _solve_on(
    device: torch.device,
    targets: Tensor,
    atoms: Tensor,
    k: int,
    normalize_atoms: bool,
    progress: Callable[[int], None] | None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    atoms = atoms.to(device, torch.float32)
    selectable = torch.nn.functional.normalize(atoms) if normalize_atoms else atoms
    solved = []
    for chunk in _chunks(targets, 512):
        chunk = chunk.to(device, torch.float32)
        support = pursue(chunk, selectable, k)
        coefficients, residuals = refit(chunk, atoms, support)
        solved.append((support.cpu(), coefficients.cpu(), residuals.cpu()))
        if progress is not None:
            progress(len(chunk))
    return solved


def _chunks(rows: Tensor, size: int) -> Iterator[Tensor]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _check_finite(rows: Tensor, what: str) -> None:
    bad = [i for i, row in enumerate(_chunks(rows, 4096)) if not torch.isfinite(row).all()]
    if bad:
        start = bad[0] * 4096
        first = (~torch.isfinite(rows[start : start + 4096]).all(dim=1)).nonzero().flatten()[:5] + start
        listed = ", ".join(str(int(i)) for i in first)
        raise OmpError(f"The {what} hold NaN or infinity, first in rows {listed}: repair the checkpoint.")
