"""The solve of some targets on one device."""

import logging
import threading
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mergekit_omp.solver.codes import SparseCodes, concatenate
from mergekit_omp.solver.gram import matrix as gram
from mergekit_omp.solver.least_squares import refit
from mergekit_omp.solver.memory import budget_on, chunk_size, gram_chunk_size, pairs_at_a_time
from mergekit_omp.solver.scan import int8
from mergekit_omp.solver.scan.screening import FloatScreen, Screen
from mergekit_omp.solver.scan.search import find_supports
from mergekit_omp.solver.threads import in_lanes

LOG = logging.getLogger(__name__)

Way = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Targets float32 (B, d) to support (B, k), coefficients (B, k) and relative residuals (B,)."""


def solve_on(
    device: torch.device,
    targets: Tensor,
    atoms: Tensor,
    k: int,
    *,
    normalize_atoms: bool,
    scan_every: int,
    budget: int | None,
    sharing: int,
    progress: Callable[[int], None] | None,
) -> SparseCodes:
    """Codes of the targets (B, d), on the CPU. ``sharing`` solves run on this device and share its budget."""
    lanes = max(1, torch.get_num_threads() // sharing) if device.type == "cpu" else 1
    budget = budget_on(device, budget) // sharing

    atoms = atoms.to(device, torch.float32)
    first = _first_copies(atoms)
    norms = atoms.norm(dim=1, keepdim=True)
    if len(first) < len(atoms):
        atoms, norms = atoms[first], norms[first]
    if normalize_atoms:
        atoms = atoms / norms.where(norms > 0, torch.ones_like(norms))
    solve_rows, chunk = _way(atoms, len(targets), k, scan_every, budget, lanes)

    def solve(chunk: Tensor) -> SparseCodes:
        support, coefficients, residuals = solve_rows(chunk.to(device, torch.float32))
        used = support >= 0
        if normalize_atoms:
            coefficients = (coefficients / norms.squeeze(1)[support.clamp(min=0)]).masked_fill(~used, 0)
        indices = first[support.clamp(min=0)].masked_fill(~used, -1)
        codes = SparseCodes(indices.cpu(), coefficients.cpu(), residuals.cpu())
        if progress is not None:
            progress(len(chunk))
        return codes

    return concatenate(_in_lanes(solve, targets, chunk, lanes))


def _in_lanes(solve: Callable[[Tensor], SparseCodes], targets: Tensor, chunk: int, lanes: int) -> list[SparseCodes]:
    """Solve all chunks, several at a time with a thread each, and chunks of half the size after out-of-memory."""
    size, lock = [chunk], threading.Lock()

    def solve_or_halve(rows: Tensor) -> list[SparseCodes]:
        done, start = [], 0
        while start < len(rows):
            part = rows[start : start + size[0]]
            try:
                done.append(solve(part))
                start += len(part)
                continue
            except torch.cuda.OutOfMemoryError:
                if len(part) == 1:
                    raise
                with lock:
                    size[0] = max(1, min(size[0], len(part) // 2))
                LOG.warning("Out of memory with %d targets at a time: going on with %d.", len(part), size[0])
            torch.cuda.empty_cache()  # blocks of the larger size; the exception, which held them, is gone
        return done

    parts = targets.split(chunk) if lanes > 1 else [targets]
    return [codes for part in in_lanes(solve_or_halve, parts, lanes) for codes in part]


def _first_copies(atoms: Tensor) -> Tensor:
    """Indices int64 of the atoms (N, d) that equal none before them; the lowest index stands for all its copies."""
    seed = torch.Generator().manual_seed(0)
    probe = torch.randn(atoms.shape[1], generator=seed).to(atoms)
    # Equal rows have equal sums: only neighbours in this order, with equal sums, need to be compared.
    sums = torch.empty(len(atoms), device=atoms.device)
    for start in range(0, len(atoms), 1024):
        sums[start : start + 1024] = (atoms[start : start + 1024] * probe).sum(1)
    sums, order = sums.sort(stable=True)
    same = torch.zeros(len(atoms), dtype=torch.bool, device=atoms.device)
    for places in ((sums[1:] == sums[:-1]).nonzero().flatten() + 1).split(1024):
        here, before = order[places], order[places - 1]
        same[here] = (atoms[here] == atoms[before]).all(dim=1)
    return (~same).nonzero().flatten()


def _way(atoms: Tensor, targets: int, k: int, scan_every: int, budget: int, lanes: int) -> tuple[Way, int]:
    """How to solve so many targets, and how many at a time: what is fastest of what fits into the budget."""
    chunk = gram_chunk(atoms.device, budget, targets, *atoms.shape, k, scan_every, lanes)
    if chunk:
        from mergekit_omp.solver.gram import search as speculation

        return partial(speculation.solve, gram=gram.Gram(atoms, lanes), k=k), chunk
    screen = _screen(atoms)
    pairs = pairs_at_a_time(budget, len(atoms), lanes)

    def solve(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        support = find_supports(rows, screen, k, scan_every, pairs)
        return support, *refit(rows, atoms, support)

    return solve, chunk_size(atoms.device, budget, targets, *atoms.shape, k, lanes, screen.score_bytes)


def gram_chunk(
    device: torch.device, budget: int, targets: int, atoms: int, dim: int, k: int, scan_every: int, lanes: int
) -> int:
    """Targets at a time for each lane of an exact solve by a Gram matrix; 0 where it does not pay, or has no room."""
    if scan_every > 1 or gain_of_gram(device, targets, atoms, dim, k) <= 1:
        return 0
    return gram_chunk_size(budget, targets, atoms, dim, k, lanes)


def gain_of_gram(device: torch.device, targets: int, atoms: int, dim: int, k: int) -> float:
    """How many times as long as with a Gram matrix a solve takes with looks at all atoms; 1 where it does not pay.

    Whether there is room for the matrix is another question.
    """
    scans = (int8.COST if int8.is_supported() else 1.0) * targets * atoms * dim * k
    cost = gram.cost(targets, atoms, dim, k)
    if device.type != "cpu" or scans - cost <= gram.WORTH or not gram.is_supported():
        return 1.0
    return scans / cost


def _screen(atoms: Tensor) -> Screen:
    """The one in whose numbers the atoms' device multiplies fastest."""
    if atoms.device.type == "cpu" and int8.is_supported():
        return int8.Int8Screen(atoms)
    tensor_cores = atoms.device.type == "cuda" and torch.cuda.get_device_capability(atoms.device) >= (7, 0)
    return FloatScreen(atoms, torch.float16 if tensor_cores else torch.float32)
