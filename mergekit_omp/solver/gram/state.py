"""Hold the pursuits of the targets that are solved together: one slot for each. Imports without numba.

Letters in shapes: B targets, T slots, P atoms padded to whole strips, d dimensions, k sparsity, n steps of a draft, W
rows of a scan padded to pairs, L and R places of the lists of candidates and rivals.
"""

from typing import NamedTuple

import numpy as np
from numpy import ndarray

from mergekit_omp.solver.gram.layout import STEPS, padded, padded_rows, padded_steps

MOST_STEPS = STEPS
"""Steps of the longest draft; more are undone too often."""

LISTED = 512
"""Places of the list of candidates of each slot: a full list is shortened."""

RIVALS = 64
"""Places of the list of atoms that may be better than a drafted choice."""

PART = 128
"""Targets that are put into slots together: enough for efficient products of targets and atoms."""

EMPTY, DRAFTED = 0, 1
"""Status of a slot: without a target, or with a draft to verify."""


class Pursuits(NamedTuple):
    """Pursuits of T targets of norm 1.

    Attributes:
        status: int8 (T,).
        rows: int64 (T,), the place of each target among all.
        targets: float64 (T, d).
        inner: int16 (T, P), their cosines with all atoms, in units of the Gram matrix.
        inner_errors: float64 (T,), bound on the errors of these.
        size: int64 (T,), number of atoms in the support, those of the draft included.
        verified: int64 (T,), number of atoms that were in the support before the draft.
        complete: bool (T,), whether the draft ends the pursuit.
        support: int64 (T, k), the atoms; only the first ``size`` are valid.
        factor: float64 (T, k, k), Cholesky factor L of the atoms' inner products.
        solved: float64 (T, k), L⁻¹ Aᵀx for the target x.
        length: int64 (T,), number of drafted steps.
        scanned: int64 (T,), number of drafted steps that are still scanned: those after a wrong one are not.
        weights: int16 (T, n, W), weights of the target's cosines and of the support's rows of the matrix in the
            cosines of each step's residual; padded with zeros.
        scales: float32 (T, n), what the weights of a step are multiples of.
        errors: float32 (T, n), bound on the errors of these cosines, in units of the Gram matrix.
        choices: int64 (T, n), the atom selected in each step.
        correlations: float64 (T, n), their |⟨residual, atom⟩| in units of the largest norm.
        threshold: float32 (T,), share of the best correlation that candidates exceed.
        least: float32 (T,), the correlation that candidates exceed, in units of the Gram matrix.
        listed: int64 (T,), number of candidates.
        candidates: int64 (T, L), atoms with a high correlation with the residual of the last step.
        found: int16 (T, L, k), their cosines with the support.
        estimates: float32 (T, L), their estimated correlations, in units of the Gram matrix.
        rivals: int64 (T,), number of rivals.
        rival_atoms: int64 (T, R), atoms that may be better than the choice of a step.
        rival_steps: int64 (T, R), the steps.
    """

    status: ndarray
    rows: ndarray
    targets: ndarray
    inner: ndarray
    inner_errors: ndarray
    size: ndarray
    verified: ndarray
    complete: ndarray
    support: ndarray
    factor: ndarray
    solved: ndarray
    length: ndarray
    scanned: ndarray
    weights: ndarray
    scales: ndarray
    errors: ndarray
    choices: ndarray
    correlations: ndarray
    threshold: ndarray
    least: ndarray
    listed: ndarray
    candidates: ndarray
    found: ndarray
    estimates: ndarray
    rivals: ndarray
    rival_atoms: ndarray
    rival_steps: ndarray


class Results(NamedTuple):
    """Results for all targets.

    Attributes:
        support: int64 (B, k), in the order of selection, -1 in unused places.
        coefficients: float64 (B, k), for targets of norm 1.
        residuals: float64 (B,), norms for targets of norm 1.
    """

    support: ndarray
    coefficients: ndarray
    residuals: ndarray


def no_results(targets: int, k: int) -> Results:
    """Allocate results: those of targets of zeros."""
    return Results(np.full((targets, k), -1, np.int64), np.zeros((targets, k)), np.zeros(targets))


def empty_slots(slots: int, atoms: int, dim: int, k: int, most_steps: int) -> Pursuits:
    """Allocate slots without targets."""
    steps = padded_steps(most_steps)
    return Pursuits(
        status=np.zeros(slots, np.int8),
        rows=np.zeros(slots, np.int64),
        targets=np.zeros((slots, dim)),
        inner=np.zeros((slots, padded(atoms)), np.int16),
        inner_errors=np.zeros(slots),
        size=np.zeros(slots, np.int64),
        verified=np.zeros(slots, np.int64),
        complete=np.zeros(slots, np.bool_),
        support=np.zeros((slots, k), np.int64),
        factor=np.zeros((slots, k, k)),
        solved=np.zeros((slots, k)),
        length=np.zeros(slots, np.int64),
        scanned=np.zeros(slots, np.int64),
        weights=np.zeros((slots, steps, padded_rows(k)), np.int16),
        scales=np.zeros((slots, steps), np.float32),
        errors=np.zeros((slots, steps), np.float32),
        choices=np.zeros((slots, steps), np.int64),
        correlations=np.zeros((slots, steps)),
        threshold=np.zeros(slots, np.float32),
        least=np.zeros(slots, np.float32),
        listed=np.zeros(slots, np.int64),
        candidates=np.zeros((slots, LISTED), np.int64),
        found=np.zeros((slots, LISTED, k), np.int16),
        estimates=np.zeros((slots, LISTED), np.float32),
        rivals=np.zeros(slots, np.int64),
        rival_atoms=np.zeros((slots, RIVALS), np.int64),
        rival_steps=np.zeros((slots, RIVALS), np.int64),
    )


def slot_bytes(atoms: int, dim: int, k: int) -> int:
    """Return the memory of one slot."""
    return sum(array.nbytes for array in empty_slots(1, atoms, dim, k, MOST_STEPS))
