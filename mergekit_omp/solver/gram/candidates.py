"""Maintain the candidate list of one target: the atoms that its steps choose from between two scans.

Letters in shapes: M candidates, d dimensions, k sparsity.
"""

from typing import NamedTuple

import numpy as np
from numpy import ndarray

from mergekit_omp.solver.gram.cholesky import ActiveSet
from mergekit_omp.solver.gram.kernels import add_scaled, compiled, dot
from mergekit_omp.solver.gram.layout import TILE
from mergekit_omp.solver.gram.matrix import Gram
from mergekit_omp.solver.tolerances import TIE

GROUP = 32
"""Atoms that are tested together with vector instructions; few groups contain a candidate."""


class Candidates(NamedTuple):
    """The candidate list of one target.

    Attributes:
        length: int64 (1,), M; only the first M places of the other arrays are valid.
        atoms: int64, indices of the candidates.
        inner: float32, their cosines with the target.
        correlations: float32, their estimated correlations |⟨residual, atom⟩| in units of the largest norm.
        cosines: float32 (k, M), cosines of the support's atoms with the candidates, in units of the Gram matrix.
    """

    length: ndarray
    atoms: ndarray
    inner: ndarray
    correlations: ndarray
    cosines: ndarray


def empty_candidates(k: int) -> Candidates:
    """Allocate room for two tiles of atoms: the list is shortened when it exceeds one."""
    room = 2 * TILE
    return Candidates(
        length=np.zeros(1, np.int64),
        atoms=np.zeros(room + 1, np.int64),  # one extra place that append_tile overwrites
        inner=np.zeros(room, np.float32),
        correlations=np.zeros(room, np.float32),
        cosines=np.zeros((k, room), np.float32),
    )


@compiled
def exact_correlation(gram: Gram, atom: int, residual: ndarray) -> float:
    """Return |⟨residual, atom⟩| in float64, in units of the largest norm."""
    return abs(dot(gram.atoms[atom], residual)) / gram.largest_norm


@compiled
def beats(correlation: float, atom: int, best: float, choice: int) -> bool:
    """Tell whether an atom is selected before the best one so far; ties go to the lower index."""
    return correlation > best * (1 + TIE) or (correlation >= best * (1 - TIE) and atom < choice)


@compiled
def append(gram: Gram, active: ActiveSet, candidates: Candidates, inner: ndarray, atoms: ndarray) -> None:
    """Append atoms int64 (n,); ``inner`` (P,) are the cosines of the target with all atoms."""
    first, size = candidates.length[0], active.size[0]
    for index in range(len(atoms)):
        atom, place = atoms[index], first + index
        candidates.atoms[place] = atom
        candidates.inner[place] = inner[atom]
        for slot in range(size):
            candidates.cosines[slot, place] = gram.cosines[active.support[slot], atom]
    candidates.length[0] = first + len(atoms)


@compiled
def append_tile(
    gram: Gram,
    active: ActiveSet,
    candidates: Candidates,
    inner: ndarray,
    cosines: ndarray,
    start: int,
    least: float | np.floating,
) -> None:
    """Append the atoms of a tile whose correlation with the residual exceeds ``least``.

    ``inner`` (P,) are the cosines of the target with all atoms, ``cosines`` float32 (TILE,) those of the residual with
    the atoms from ``start`` on.
    """
    first = end = candidates.length[0]
    least, norms, atoms = np.float32(least), gram.norms[start : start + TILE], candidates.atoms
    for left in range(0, TILE, GROUP):
        excess = np.float32(0)
        for column in range(left, left + GROUP):
            excess += max(abs(cosines[column]) * norms[column] - least, np.float32(0))
        if excess > 0:
            for column in range(left, left + GROUP):
                atoms[end] = column
                end += abs(cosines[column]) * norms[column] > least
    if end == first:
        return
    for place in range(first, end):
        column = atoms[place]
        candidates.correlations[place] = abs(cosines[column]) * norms[column]
        atoms[place] = start + column
    append(gram, active, candidates, inner, atoms[first:end])


@compiled
def shorten(active: ActiveSet, candidates: Candidates, least: float) -> None:
    """Keep the candidates whose correlation exceeds ``least``."""
    kept, size, length = 0, active.size[0], candidates.length[0]
    for place in range(length):
        if candidates.correlations[place] > least:
            candidates.atoms[kept] = candidates.atoms[place]
            candidates.inner[kept] = candidates.inner[place]
            candidates.correlations[kept] = candidates.correlations[place]
            for slot in range(size):
                candidates.cosines[slot, kept] = candidates.cosines[slot, place]
            kept += 1
    candidates.length[0] = kept


@compiled
def best_candidate(
    gram: Gram, active: ActiveSet, candidates: Candidates, weights: ndarray, residual: ndarray, error: float
) -> tuple[int, float]:
    """Choose the candidate with the highest correlation with the residual (d,), with the result of float64 arithmetic.

    ``weights`` float32 (k,) are the weights of the support's rows in the cosines, whose error is at most ``error``.
    The list has the rows of all active atoms but the last. Returns the atom and its correlation.
    """
    size, listed, last = active.size[0], candidates.length[0], active.support[active.size[0] - 1]
    if listed == 0:
        return last, 0.0
    row, correlations, cosines = gram.cosines[last], candidates.correlations, candidates.cosines
    for place in range(listed):
        cosines[size - 1, place] = row[candidates.atoms[place]]
        correlations[place] = candidates.inner[place]
    for slot in range(size):
        add_scaled(correlations, weights[slot], cosines[slot], listed)
    best = 0
    for place in range(listed):
        correlations[place] = abs(correlations[place]) * gram.norms[candidates.atoms[place]]
        if correlations[place] > correlations[best]:
            best = place
    choice = candidates.atoms[best]
    highest = exact_correlation(gram, choice, residual)
    for place in range(listed):
        atom = candidates.atoms[place]
        if correlations[place] + error * gram.norms[atom] >= np.float32(highest) and atom != choice:
            other = exact_correlation(gram, atom, residual)
            if beats(other, atom, highest, choice):
                choice, highest = atom, other
    return choice, highest
