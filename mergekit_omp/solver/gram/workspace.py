"""Hold the buffers of one thread.

Letters in shapes: L candidates, d dimensions, k sparsity, n steps of a draft.
"""

from typing import NamedTuple

import numpy as np
from numpy import ndarray

from mergekit_omp.solver.gram.candidates import Candidates, room_for_candidates
from mergekit_omp.solver.gram.cholesky import Fit
from mergekit_omp.solver.gram.kernels import compiled
from mergekit_omp.solver.gram.layout import STRIP, padded_steps
from mergekit_omp.solver.gram.matrix import Gram
from mergekit_omp.solver.gram.state import LISTED, Pursuits


class Workspace(NamedTuple):
    """Buffers of one thread.

    Attributes:
        coefficients: float64 (k,).
        candidates: the candidates of one target.
        residuals: float64 (n, d), before each step of one target's draft.
        known: bool (n,), which of them are computed.
        sums: float32 (n, STRIP), cosines of a strip of atoms with these residuals.
        places: int64 (k,), addresses of the support's rows in a strip.
        kept: int64 (L,), which candidates stay in a list that is shortened.
    """

    coefficients: ndarray
    candidates: Candidates
    residuals: ndarray
    known: ndarray
    sums: ndarray
    places: ndarray
    kept: ndarray


def workspace(dim: int, k: int, most_steps: int) -> Workspace:
    """Allocate the buffers of a thread."""
    steps = padded_steps(most_steps)
    return Workspace(
        coefficients=np.zeros(k),
        candidates=room_for_candidates(LISTED + most_steps, k),
        residuals=np.zeros((steps, dim)),
        known=np.zeros(steps, np.bool_),
        sums=np.zeros((steps, STRIP), np.float32),
        places=np.zeros(k, np.int64),
        kept=np.zeros(LISTED, np.int64),
    )


@compiled
def fit_of(gram: Gram, pursuits: Pursuits, slot: int, work: Workspace) -> Fit:
    """Return the fit of the target in a slot, with the coefficients in the workspace."""
    factor, solved = pursuits.factor[slot], pursuits.solved[slot]
    return Fit(gram.atoms, pursuits.support[slot], factor, solved, work.coefficients)
