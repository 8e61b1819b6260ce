"""OMP in which every step scans all atoms, for a batch of targets.

    residual, support = target, ()
    repeat k times:
        atom = argmax |⟨residual, atom⟩|    # a scan in low precision, and float64 among those that it leaves open
        support += atom
        residual -= its projection on what the atom adds to the span of the support

Letters in shapes: B targets, d dimensions, k sparsity.
"""

import torch
from torch import Tensor

from mergekit_omp.solver.least_squares import refit
from mergekit_omp.solver.scan.screening import Screen
from mergekit_omp.solver.scan.state import PursuitState
from mergekit_omp.solver.scan.tie_break import choose


def solve(targets: Tensor, screen: Screen, k: int, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Solve a batch of targets.

    Args:
        targets: float32 (B, d).
        screen: of all atoms.
        k: the sparsity.
        pairs: how many pairs of a target and an atom that may be its best one to hold at a time.

    Returns:
        Support int64 (B, k) in the order of selection, -1 where the slot is unused; coefficients float32 (B, k), 0
        there; relative residuals float32 (B,).
    """
    support = find_supports(targets, screen, k, pairs)
    return support, *refit(targets, screen.atoms, support)


def find_supports(targets: Tensor, screen: Screen, k: int, pairs: int) -> Tensor:
    """Select the atoms of each target: the support of :func:`solve`, which has the same arguments."""
    supports = torch.full((len(targets), k), -1, dtype=torch.int64, device=targets.device)
    state = PursuitState(targets, screen.atoms, screen.norms, k)
    rows = torch.arange(len(targets), device=targets.device)
    while True:
        if state.done.any():
            supports[rows[state.done]] = state.support[state.done]
            active = ~state.done
            rows, state = rows[active], state.view(active)
        if not len(rows):
            return supports
        state.extend(*_best_atoms(state, screen, pairs))


def _best_atoms(state: PursuitState, screen: Screen, pairs: int) -> tuple[Tensor, Tensor]:
    """Return the atom int64 (B,) that correlates most with each residual, and its correlation (B,)."""
    candidates = screen.scan(state.residual, state.residual_norm).candidates(pairs)
    choices, correlations = zip(
        *(choose(state.view(part), rows, atoms) for part, rows, atoms in candidates), strict=True
    )
    return torch.cat(choices), torch.cat(correlations)
