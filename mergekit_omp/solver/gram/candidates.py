"""Keep the cosines of one target's candidates with its support, and choose among them.

Letters in shapes: L candidates, d dimensions, k sparsity.
"""

from typing import NamedTuple

import numpy as np
from numpy import ndarray

from mergekit_omp.solver.gram.kernels import add_scaled, compiled, dot
from mergekit_omp.solver.gram.layout import UNIT
from mergekit_omp.solver.gram.matrix import Gram, cosine, place_of
from mergekit_omp.solver.gram.vectors import address, request_line
from mergekit_omp.solver.tolerances import ROUNDING, TIE


class Candidates(NamedTuple):
    """The candidates that the steps of a draft are chosen from.

    Attributes:
        atoms: int64 (L,).
        inner: float32 (L,), their cosines with the target.
        correlations: float32 (L,), their estimated correlations with the last residual.
        cosines: float32 (k, L), their cosines with the atoms of the support. All are in units of the Gram matrix.
    """

    atoms: ndarray
    inner: ndarray
    correlations: ndarray
    cosines: ndarray


def room_for_candidates(count: int, k: int) -> Candidates:
    """Allocate room for the candidates of a target."""
    return Candidates(
        atoms=np.zeros(count, np.int64),
        inner=np.zeros(count, np.float32),
        correlations=np.zeros(count, np.float32),
        cosines=np.zeros((k, count), np.float32),
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
def load_found(candidates: Candidates, inner: ndarray, atoms: ndarray, found: ndarray, listed: int, size: int) -> int:
    """Load ``listed`` candidates that a scan has found, with their cosines ``found`` (L, k) with ``size`` atoms."""
    for place in range(listed):
        candidates.atoms[place] = atoms[place]
        candidates.inner[place] = inner[atoms[place]]
        for slot in range(size):
            candidates.cosines[slot, place] = found[place, slot]
    return listed


@compiled
def append(
    gram: Gram, candidates: Candidates, inner: ndarray, support: ndarray, size: int, atoms: ndarray, first: int
) -> int:
    """Append atoms int64 (n,) to ``first`` others, with their cosines with the ``size`` atoms of the support.

    ``inner`` int16 (P,) are the cosines of the target with all atoms. Returns the number of candidates.
    """
    count = len(atoms)
    for place in range(count):
        candidates.atoms[first + place] = atoms[place]
        candidates.inner[first + place] = inner[atoms[place]]
    for slot in range(size):
        row = candidates.cosines[slot]
        for place in range(count):
            row[first + place] = cosine(gram, support[slot], atoms[place])
    return first + count


@compiled
def request_cosines(gram: Gram, candidates: Candidates, listed: int, atom: int) -> None:
    """Ask the memory for the cosines of an atom with the candidates."""
    for place in range(listed):
        request_line(address(gram.cosines, place_of(gram, atom, candidates.atoms[place])))


@compiled
def best_candidate(
    gram: Gram,
    candidates: Candidates,
    listed: int,
    support: ndarray,
    size: int,
    weights: ndarray,
    scale: np.floating,
    residual: ndarray,
    error: float,
) -> tuple[int, float]:
    """Choose the candidate with the highest correlation with the residual (d,), with the result of float64 arithmetic.

    ``weights`` int16 (W,), times a ``scale``, are those of the rows of a scan in the cosines, whose error is at most
    ``error``. The list has the rows of all atoms of the support but the last. Returns the atom and its correlation.
    """
    last = support[size - 1]
    if listed == 0:
        return last, 0.0
    correlations, row = candidates.correlations, candidates.cosines[size - 1]
    for place in range(listed):
        row[place] = cosine(gram, last, candidates.atoms[place])
        correlations[place] = weights[0] * scale * candidates.inner[place]
    total = 1.0
    for slot in range(size):
        weight = weights[1 + slot] * scale
        add_scaled(correlations, weight, candidates.cosines[slot], listed)
        total += abs(weight)
    error += total * UNIT * size * (ROUNDING / 2)  # of these sums; those of a scan are exact
    best = 0
    for place in range(listed):
        correlations[place] = abs(correlations[place]) * gram.norms[candidates.atoms[place]]
        if correlations[place] > correlations[best]:
            best = place
    choice = candidates.atoms[best]
    highest = exact_correlation(gram, choice, residual)
    for place in range(listed):
        atom = candidates.atoms[place]
        if correlations[place] + error * gram.norms[atom] >= np.float32(highest * UNIT) and atom != choice:
            other = exact_correlation(gram, atom, residual)
            if beats(other, atom, highest, choice):
                choice, highest = atom, other
    return choice, highest
