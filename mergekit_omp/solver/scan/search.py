"""Run OMP with a scan of all atoms in every step, for a batch of targets.

    residual, support = target, ()
    repeat k times:
        atom = argmax |⟨residual, atom⟩|    # low-precision scan, float64 among close candidates
        support += atom
        residual -= its projection on the new direction in the span of the support

Letters in shapes: B targets, d dimensions, k sparsity.
"""

import torch
from torch import Tensor

from mergekit_omp.solver.least_squares import fit_supports
from mergekit_omp.solver.scan.fixed_shape import find_supports_by_replay
from mergekit_omp.solver.scan.screening import Screen
from mergekit_omp.solver.scan.state import PursuitState
from mergekit_omp.solver.scan.tie_break import choose


def solve_by_scan(targets: Tensor, screen: Screen, k: int, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Solve a batch of targets.

    Args:
        targets: float32 (B, d).
        screen: rounded copy of all atoms.
        k: sparsity.
        pairs: limit on pairs of a target and a candidate atom in memory.

    Returns:
        Support int64 (B, k) in the order of selection, -1 in unused slots; coefficients float32 (B, k), 0 there;
        relative residuals float32 (B,).
    """
    support = find_supports(targets, screen, k, pairs)
    return support, *fit_supports(targets, screen.atoms, support)


def find_supports(targets: Tensor, screen: Screen, k: int, pairs: int) -> Tensor:
    """Select the atoms of each target; arguments and support are those of :func:`solve_by_scan`."""
    if has_fixed_shapes(targets.device):
        return find_supports_by_replay(targets, screen, k, pairs)
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


def has_fixed_shapes(device: torch.device) -> bool:
    """Return whether a device takes steps of fixed shapes, which are replayed; others handle only what is open."""
    return device.type == "cuda"


def _best_atoms(state: PursuitState, screen: Screen, pairs: int) -> tuple[Tensor, Tensor]:
    """Return the atom int64 (B,) with the highest correlation with each residual, and the correlation (B,)."""
    candidates = screen.scan(state.residual, state.residual_norm).candidates(pairs)
    choices, correlations = zip(
        *(choose(state.view(part), rows, atoms) for part, rows, atoms in candidates), strict=True
    )
    return torch.cat(choices), torch.cat(correlations)
