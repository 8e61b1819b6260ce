"""All steps of one chunk of targets: screen all atoms, rescore those that may be the best, take the winner.

Letters in shapes: B targets, N atoms, d dimensions, k sparsity, Q pairs of a target and an atom.
"""

import warnings

import torch
from torch import Tensor

from mergekit_omp.solver.pursuit import Pursuit
from mergekit_omp.solver.refit import least_squares
from mergekit_omp.solver.screen import Screen

TIE = 1e-12
"""Scores in float64 that differ by less than this share of the larger are equal; the lowest index is taken."""

SETTLED = 256
"""Pairs whose atoms are held in float64 at a time."""

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")


def find_supports(targets: Tensor, screen: Screen, k: int) -> Tensor:
    """Support int64 (B, k) of each target (B, d), in the order of selection, -1 where the slot is unused."""
    supports = torch.full((len(targets), k), -1, dtype=torch.int64, device=targets.device)
    pursuit = Pursuit(targets, screen.atoms, screen.norms, k)
    rows = torch.arange(len(targets), device=targets.device)
    while True:
        if pursuit.done.any():
            supports[rows[pursuit.done]] = pursuit.support[pursuit.done]
            rows, pursuit = rows[~pursuit.done], pursuit.view(~pursuit.done)
        if not len(rows):
            return supports
        pursuit.extend(*_choose(pursuit, screen))


def _choose(pursuit: Pursuit, screen: Screen) -> tuple[Tensor, Tensor]:
    """The atom int64 (B,) of the highest score for each target, as in float64 arithmetic, and its score (B,)."""
    rows, atoms = screen.look(pursuit.residual).candidates()
    scores = _score(pursuit.residual, pursuit.atoms, rows, atoms)
    best = _highest(scores, rows, len(pursuit.residual))
    margin = pursuit.noise()[rows] * pursuit.atom_norms[atoms]
    rivals = (scores + margin >= _highest(scores - margin, rows, len(best))[rows]).nonzero().flatten()
    rows, atoms = rows[rivals], atoms[rivals]
    choice = torch.empty_like(best, dtype=torch.int64).index_copy_(0, rows, atoms)
    unsure = (rows.bincount(minlength=len(best))[rows] > 1).nonzero().flatten()
    if len(unsure):
        _settle(pursuit, rows[unsure], atoms[unsure], choice)
    return choice, best


def _settle(pursuit: Pursuit, rows: Tensor, atoms: Tensor, choice: Tensor) -> None:
    """Choose in float64 among pairs (Q,) of targets and atoms whose scores float32 cannot tell apart."""
    targets, at = rows.unique(return_inverse=True)
    _, residual = least_squares(pursuit.targets[targets], pursuit.atoms, pursuit.support[targets, : pursuit.size])
    scores = torch.empty(len(at), dtype=torch.float64, device=at.device)
    for start in range(0, len(at), SETTLED):
        part = slice(start, start + SETTLED)
        scores[part] = (residual[at[part]] * pursuit.atoms[atoms[part]].double()).sum(1).abs()
    tied = scores >= _highest(scores, at, len(targets))[at] * (1 - TIE)
    lowest = torch.full_like(targets, len(pursuit.atoms))
    choice[targets] = lowest.scatter_reduce_(0, at[tied], atoms[tied], "amin")


def _score(vectors: Tensor, atoms: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """|⟨vector, atom⟩| (Q,) for pairs, in ascending order, of a row of vectors (B, d) and one of atoms (N, d)."""
    starts = torch.zeros(len(vectors) + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(rows.bincount(minlength=len(vectors)), dim=0, out=starts[1:])
    size = (len(vectors), len(atoms))
    pairs = torch.sparse_csr_tensor(starts, columns, vectors.new_zeros(len(rows)), size=size, check_invariants=False)
    return torch.sparse.sampled_addmm(pairs, vectors, atoms.T, beta=0).values().abs_()


def _highest(scores: Tensor, rows: Tensor, count: int) -> Tensor:
    """The highest score (B,) of each row among pairs (Q,)."""
    return scores.new_zeros(count).scatter_reduce_(0, rows, scores, "amax", include_self=False)
