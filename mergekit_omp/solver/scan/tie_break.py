"""The atom of the highest score among some, as in float64 arithmetic.

Letters in shapes: B targets, N atoms, d dimensions, Q pairs of a target and an atom.
"""

import warnings

import torch
from torch import Tensor
from torch.nn.functional import pad

from mergekit_omp.solver.least_squares import held, least_squares
from mergekit_omp.solver.scan.state import Pursuit

TIE = 1e-12
"""Scores in float64 that differ by less than this share of the larger are equal; the lowest index is taken."""

for message in ("Sparse CSR tensor support is in beta state", "Sparse invariant checks are implicitly disabled"):
    warnings.filterwarnings("ignore", message)


def choose(pursuit: Pursuit, rows: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
    """The best atom of each target, as in float64 arithmetic.

    Args:
        pursuit: the state of B targets.
        rows: int64 (Q,), the target of each pair, in ascending order; each has one pair at least.
        atoms: int64 (Q,), the atom of each pair.

    Returns:
        The atom int64 (B,) of the highest score |⟨residual, atom⟩| for each target, and its score (B,).
    """
    scores = _score(pursuit.residual, pursuit.atoms, rows, atoms)
    best = _highest(scores, rows, len(pursuit.residual))
    margin = pursuit.noise()[rows] * pursuit.atom_norms[atoms]
    rivals = (scores + margin >= _highest(scores - margin, rows, len(best))[rows]).nonzero().flatten()
    rows, atoms = rows[rivals], atoms[rivals]
    choice = torch.empty_like(best, dtype=torch.int64).index_copy_(0, rows, atoms)
    if len(rows) > len(choice):
        same = rows[1:] == rows[:-1]
        unsure = (pad(same, (1, 0)) | pad(same, (0, 1))).nonzero().flatten()
        _settle(pursuit, rows[unsure], atoms[unsure], choice)
    return choice, best


def _settle(pursuit: Pursuit, rows: Tensor, atoms: Tensor, choice: Tensor) -> None:
    """Choose in float64 among pairs (Q,) of targets and atoms whose scores float32 cannot tell apart."""
    targets, at = rows.unique(return_inverse=True)
    _, residual = least_squares(pursuit.targets[targets], pursuit.atoms, pursuit.support[targets, : pursuit.size])
    scores = torch.empty(len(at), dtype=torch.float64, device=at.device)
    step = max(1, held(residual.device) // (3 * residual.shape[1]))  # residuals, atoms and products
    for start in range(0, len(at), step):
        part = slice(start, start + step)
        scores[part] = (residual[at[part]] * pursuit.atoms[atoms[part]].double()).sum(1).abs()
    tied = scores >= _highest(scores, at, len(targets))[at] * (1 - TIE)
    lowest = torch.full_like(targets, len(pursuit.atoms))
    choice[targets] = lowest.scatter_reduce_(0, at[tied], atoms[tied], "amin")


def _score(vectors: Tensor, atoms: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """|⟨vector, atom⟩| (Q,) for pairs, in ascending order, of a row of vectors (B, d) and one of atoms (N, d)."""
    starts = torch.searchsorted(rows, torch.arange(len(vectors) + 1, device=rows.device))
    size = (len(vectors), len(atoms))
    pairs = torch.sparse_csr_tensor(starts, columns, vectors.new_zeros(len(rows)), size=size, check_invariants=False)
    return torch.sparse.sampled_addmm(pairs, vectors, atoms.T, beta=0).values().abs_()


def _highest(scores: Tensor, rows: Tensor, count: int) -> Tensor:
    """The highest score (B,) of each row among pairs (Q,)."""
    return scores.new_zeros(count).scatter_reduce_(0, rows, scores, "amax", include_self=False)
