"""Solve a batch of targets on one device.

Letters in shapes: B targets, N atoms, d dimensions, k sparsity.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from mergekit_omp.solver.codes import SparseCodes, concatenate
from mergekit_omp.solver.dispatch import plan_solve
from mergekit_omp.solver.least_squares import rows_at_a_time
from mergekit_omp.solver.memory import ProblemShape, budget_on
from mergekit_omp.solver.scan.screening import Screen
from mergekit_omp.solver.scan.search import solve_by_scan
from mergekit_omp.solver.threads import map_chunks

LOG = logging.getLogger(__name__)


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

    def codes_of(support: Tensor, coefficients: Tensor, residuals: Tensor) -> SparseCodes:
        used, support = support >= 0, support.clamp(min=0)
        if scale is not None:
            coefficients = (coefficients / scale[support]).masked_fill(~used, 0)
        return SparseCodes(kept[support].masked_fill(~used, -1).cpu(), coefficients.cpu(), residuals.cpu())

    if plan.method == "gram":
        from mergekit_omp.solver.gram.matrix import build_gram
        from mergekit_omp.solver.gram.search import solve_by_gram

        gram = build_gram(atoms, norms, plan.threads, half=plan.half, in_integers=plan.in_integers)
        return codes_of(*solve_by_gram(targets, gram, k, plan.chunk, plan.threads, progress=progress))
    screen = Screen(atoms, norms, plan.dtype)

    def solve_chunk(chunk: Tensor) -> SparseCodes:
        codes = codes_of(*solve_by_scan(chunk.to(device, torch.float32), screen, k, plan.pairs))
        if progress is not None:
            progress(len(chunk))
        return codes

    return concatenate(map_chunks(solve_chunk, targets, plan.chunk, plan.threads))


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
