"""Solve a batch of targets on one device.

Letters in shapes: B targets, N atoms, d dimensions, k sparsity.
"""

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mergekit_omp.solver.codes import SparseCodes, concatenate
from mergekit_omp.solver.dispatch import SolvePlan, plan_solve
from mergekit_omp.solver.least_squares import rows_at_a_time
from mergekit_omp.solver.memory import ProblemShape, budget_on
from mergekit_omp.solver.scan import search as scan_search
from mergekit_omp.solver.scan.int8 import Int8Screen
from mergekit_omp.solver.scan.screening import FloatScreen, Screen
from mergekit_omp.solver.threads import map_chunks

LOG = logging.getLogger(__name__)

Solver = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Maps targets float32 (B, d) to supports (B, k), coefficients (B, k) and relative residuals (B,)."""


def solve_on(
    device: torch.device,
    targets: Tensor,
    atoms: Tensor,
    k: int,
    *,
    normalize_atoms: bool,
    memory_budget: int | None,
    sharing: int,
    progress: Callable[[int], None] | None,
) -> SparseCodes:
    """Solve targets (B, d) on one device and return their codes on the CPU.

    The other arguments are those of :func:`mergekit_omp.solver.solve_omp`; ``sharing`` is the number of solves that
    run on this device at the same time.
    """
    budget = budget_on(device, memory_budget)  # measured before the atoms are copied to the device
    atoms = atoms.to(device, torch.float32)
    kept = _first_copies(atoms)
    if len(kept) < len(atoms):
        atoms = atoms[kept]
    norms = atoms.norm(dim=1)
    scale = norms.where(norms > 0, torch.ones_like(norms)) if normalize_atoms else None
    if scale is not None:
        atoms = atoms / scale[:, None]
        norms = atoms.norm(dim=1)
    shape = ProblemShape(len(targets), len(atoms), atoms.shape[1], k)
    plan = plan_solve(device, shape, memory_budget=budget, sharing=sharing)
    LOG.info("OMP of %d targets over %d atoms, d = %d, k = %d, on %s: %s", *shape, device, plan)
    solver = _solver(plan, atoms, norms, k)

    def solve_chunk(chunk: Tensor) -> SparseCodes:
        support, coefficients, residuals = solver(chunk.to(device, torch.float32))
        used, support = support >= 0, support.clamp(min=0)
        if scale is not None:
            coefficients = (coefficients / scale[support]).masked_fill(~used, 0)
        codes = SparseCodes(kept[support].masked_fill(~used, -1).cpu(), coefficients.cpu(), residuals.cpu())
        if progress is not None:
            progress(len(chunk))
        return codes

    return concatenate(map_chunks(solve_chunk, targets, plan.chunk, plan.threads))


def _solver(plan: SolvePlan, atoms: Tensor, norms: Tensor, k: int) -> Solver:
    if plan.method == "gram":
        from mergekit_omp.solver.gram import search as gram_search
        from mergekit_omp.solver.gram.matrix import build_gram

        return partial(gram_search.solve_by_gram, gram=build_gram(atoms, norms, plan.threads), k=k)
    return partial(scan_search.solve_by_scan, screen=make_screen(atoms, norms, plan.dtype), k=k, pairs=plan.pairs)


def make_screen(atoms: Tensor, norms: Tensor, dtype: torch.dtype) -> Screen:
    """Round the atoms (N, d) with norms (N,) to the dtype of a plan."""
    return Int8Screen(atoms, norms) if dtype == torch.int8 else FloatScreen(atoms, norms, dtype)


def _first_copies(atoms: Tensor) -> Tensor:
    """Return the int64 indices of the atoms (N, d) that no earlier atom equals."""
    seed = torch.Generator().manual_seed(0)
    probe = torch.randn(atoms.shape[1], generator=seed).to(atoms)
    # Equal rows have equal random projections, so only neighbours in this order with equal values are compared.
    sums = torch.empty(len(atoms), device=atoms.device)
    step = rows_at_a_time(atoms)
    for start in range(0, len(atoms), step):
        sums[start : start + step] = (atoms[start : start + step] * probe).sum(1)
    sums, order = sums.sort(stable=True)
    same = torch.zeros(len(atoms), dtype=torch.bool, device=atoms.device)
    for places in ((sums[1:] == sums[:-1]).nonzero().flatten() + 1).split(step):
        here, before = order[places], order[places - 1]
        same[here] = (atoms[here] == atoms[before]).all(dim=1)
    return (~same).nonzero().flatten()
