"""Choose the atom with the highest correlation among candidates, with the result of float64 arithmetic.

Letters in shapes: B targets, N atoms, d dimensions, Q pairs of a target and an atom.
"""

import threading
import warnings
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from mergekit_omp.solver.least_squares import block_values, least_squares
from mergekit_omp.solver.scan.state import PursuitState
from mergekit_omp.solver.tolerances import TIE

_FIRST_SPARSE_TENSOR = threading.Lock()


def choose(state: PursuitState, rows: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the best atom of each target.

    Args:
        state: state of B targets.
        rows: int64 (Q,), the target of each pair, in ascending order; every target has at least one pair.
        atoms: int64 (Q,), the atom of each pair.

    Returns:
        The atom int64 (B,) with the highest correlation |⟨residual, atom⟩| for each target, and its correlation (B,).
    """
    correlations = _correlations(state.residual, state.atoms, rows, atoms)
    best = _highest(correlations, rows, len(state.residual))
    margin = state.noise()[rows] * state.atom_norms[atoms]
    rivals = (correlations + margin >= _highest(correlations - margin, rows, len(best))[rows]).nonzero().flatten()
    rows, atoms = rows[rivals], atoms[rivals]
    choice = torch.empty_like(best, dtype=torch.int64).index_copy_(0, rows, atoms)
    if len(rows) > len(choice):
        same = rows[1:] == rows[:-1]
        unsure = (pad(same, (1, 0)) | pad(same, (0, 1))).nonzero().flatten()
        _choose_among_rivals(state, rows[unsure], atoms[unsure], choice)
    return choice, best


def _choose_among_rivals(state: PursuitState, rows: Tensor, atoms: Tensor, choice: Tensor) -> None:
    """Write the choices among pairs (Q,) of targets and atoms that float32 cannot distinguish."""
    targets, at = rows.unique(return_inverse=True)
    _, residual = least_squares(state.targets[targets], state.atoms, state.support[targets, : state.size])
    choice[targets], _ = choose_in_float64(residual, state.atoms, at, atoms)


def choose_in_float64(residual: Tensor, atoms: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the best atom of each residual.

    Args:
        residual: float64 (B, d).
        atoms: float32 (N, d).
        rows: int64 (Q,), the residual of each pair; every residual has at least one pair.
        columns: int64 (Q,), the atom of each pair.

    Returns:
        The atom int64 (B,) with the highest correlation |⟨residual, atom⟩|, of equal ones the first, and float64 (B,)
        that correlation.
    """
    correlations = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    step = max(1, block_values(residual.device) // (3 * residual.shape[1]))  # residuals, atoms and products
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        correlations[part] = (residual[rows[part]] * atoms[columns[part]].double()).sum(1).abs()
    best = _highest(correlations, rows, len(residual))
    tied = correlations >= best[rows] * (1 - TIE)
    lowest = rows.new_full((len(residual),), len(atoms))
    return lowest.scatter_reduce_(0, rows[tied], columns[tied], "amin"), best


def _correlations(vectors: Tensor, atoms: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Compute |⟨vector, atom⟩| (Q,) for ascending pairs of rows of ``vectors`` (B, d) and ``atoms`` (N, d)."""
    _silence_sparse_warnings()
    starts = torch.searchsorted(rows, torch.arange(len(vectors) + 1, device=rows.device))
    size = (len(vectors), len(atoms))
    pairs = torch.sparse_csr_tensor(starts, columns, vectors.new_zeros(len(rows)), size=size, check_invariants=False)
    return torch.sparse.sampled_addmm(pairs, vectors, atoms.T, beta=0).values().abs_()


@cache
def _silence_sparse_warnings() -> None:
    """Create a first CSR tensor to consume the warnings that torch gives once per process.

    They say that CSR support is in beta and that invariants are not checked.
    """
    index, value = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    with _FIRST_SPARSE_TENSOR, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), index, value, size=(1, 1), check_invariants=False)


def _highest(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return the highest value (B,) of each row among pairs (Q,)."""
    return values.new_zeros(count).scatter_reduce_(0, rows, values, "amax", include_self=False)
