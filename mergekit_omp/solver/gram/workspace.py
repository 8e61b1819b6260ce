"""Hold the buffers of one thread.

Letters in shapes: L candidates, d dimensions, k sparsity, n steps of a draft, W rows of a scan padded to pairs.
"""

from typing import NamedTuple

import numpy as np
from numpy import ndarray

from mergekit_omp.solver.gram.candidates import Candidates, room_for_candidates
from mergekit_omp.solver.gram.cholesky import Fit
from mergekit_omp.solver.gram.kernels import compiled
from mergekit_omp.solver.gram.layout import STRIP, padded_rows, padded_steps
from mergekit_omp.solver.gram.matrix import Gram
from mergekit_omp.solver.gram.state import LISTED, Pursuits


class Workspace(NamedTuple):
    """Buffers of one thread.

    Attributes:
        coefficients: float64 (k,).
        candidates: the candidates of one target.
        residuals: float64 (n, d), before each step of one target's draft.
        known: bool (n,), which of them are computed.
        correlations: float32 (n, STRIP), those of a strip of atoms with these residuals, in units of the Gram matrix.
        rounding: float64 (k,), differences between weights and their integers.
        places: int64 (W,), addresses of the rows of a strip that a scan adds up.
        next_places: int64 (W,), those of the next scan.
    """

    coefficients: ndarray
    candidates: Candidates
    residuals: ndarray
    known: ndarray
    correlations: ndarray
    rounding: ndarray
    places: ndarray
    next_places: ndarray


def workspace(dim: int, k: int, most_steps: int) -> Workspace:
    """Allocate the buffers of a thread."""
    steps = padded_steps(most_steps)
    return Workspace(
        coefficients=np.zeros(k),
        candidates=room_for_candidates(LISTED + most_steps, k),
        residuals=np.zeros((steps, dim)),
        known=np.zeros(steps, np.bool_),
        correlations=np.zeros((steps, STRIP), np.float32),
        rounding=np.zeros(k),
        places=np.zeros(padded_rows(k), np.int64),
        next_places=np.zeros(padded_rows(k), np.int64),
    )


@compiled
def fit_of(gram: Gram, pursuits: Pursuits, slot: int, work: Workspace) -> Fit:
    """Return the fit of the target in a slot, with the coefficients in the workspace."""
    factor, solved = pursuits.factor[slot], pursuits.solved[slot]
    return Fit(gram.atoms, pursuits.support[slot], factor, solved, work.coefficients)
