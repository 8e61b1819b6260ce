"""Decide what a scan has left open for one target, and draft its next steps from the candidates.

All decisions use float64: the least-squares fit with the Cholesky factor of the support's inner products, the
residuals, and the correlations of rivals. So the support is that of OMP with a scan in every step.

Letters in shapes: T slots, d dimensions, k sparsity, n steps of a draft.
"""

from typing import NamedTuple

import numpy as np
from numpy import ndarray

from mergekit_omp.solver.gram.candidates import (
    Candidates,
    append,
    beats,
    best_candidate,
    exact_correlation,
    load_found,
    request_cosines,
    room_for_candidates,
)
from mergekit_omp.solver.gram.cholesky import Fit, extend, fit_target
from mergekit_omp.solver.gram.kernels import compiled, copy, entry_point
from mergekit_omp.solver.gram.layout import STRIP, UNIT, padded_steps
from mergekit_omp.solver.gram.matrix import Gram
from mergekit_omp.solver.gram.state import DRAFTED, EMPTY, LISTED, STEPS_AFTER_WRONG, Pursuits
from mergekit_omp.solver.tolerances import ROUNDING, ZERO

LIST_LENGTH = 300
"""Target length of the candidate list."""

FIRST_THRESHOLD, HIGHEST_THRESHOLD = 0.6, 0.95
"""Initial and highest value of the share of the best correlation that candidates exceed. It adapts after every
scan."""

RAISE, LOWER = 1.04, 0.96
"""Factors on the threshold after a list longer than 1.5 times, or shorter than 0.75 times, the target length."""


class Workspace(NamedTuple):
    """Buffers of one thread.

    Attributes:
        coefficients: float64 (k,).
        candidates: the candidates of one target.
        residual: float64 (d,).
        sums: float32 (n, STRIP), cosines of a strip of atoms with the residual of each step.
        places: int64 (k,), addresses of the support's rows in a strip.
    """

    coefficients: ndarray
    candidates: Candidates
    residual: ndarray
    sums: ndarray
    places: ndarray


def workspace(dim: int, k: int, most_steps: int) -> Workspace:
    """Allocate the buffers of a thread."""
    steps = padded_steps(most_steps)
    return Workspace(
        coefficients=np.zeros(k),
        candidates=room_for_candidates(LISTED + most_steps, k),
        residual=np.zeros(dim),
        sums=np.zeros((steps, STRIP), np.float32),
        places=np.zeros(k, np.int64),
    )


@entry_point
def advance(
    gram: Gram,
    pursuits: Pursuits,
    first: int,
    last: int,
    most_steps: int,
    list_length: int,
    work: Workspace,
    support: ndarray,
    coefficients: ndarray,
    residuals: ndarray,
) -> None:
    """Decide and draft the next steps in slots ``first`` to ``last``.

    Slots of finished targets become empty, and their results are written to the rows of the last three arguments.
    """
    for slot in range(first, last):
        if pursuits.status[slot] == DRAFTED and _advance_one(gram, pursuits, slot, most_steps, list_length, work):
            row, size = pursuits.rows[slot], pursuits.size[slot]
            residuals[row] = fit_target(_fit(gram, pursuits, slot, work), pursuits.targets[slot], size, work.residual)
            copy(support[row], pursuits.support[slot], size)
            copy(coefficients[row], work.coefficients, size)
            pursuits.status[slot] = EMPTY


@compiled
def compare_rivals(gram: Gram, pursuits: Pursuits, slot: int, work: Workspace) -> None:
    """Replace choices of a draft by better rivals, and empty the list of rivals."""
    fitted, residual = -1, work.residual
    for place in range(pursuits.rivals[slot]):
        atom, step = pursuits.rival_atoms[slot, place], pursuits.rival_steps[slot, place]
        if step != fitted:
            size = pursuits.verified[slot] + step
            fit_target(_fit(gram, pursuits, slot, work), pursuits.targets[slot], size, residual)
            fitted = step
        correlation = exact_correlation(gram, atom, residual)
        if beats(correlation, atom, pursuits.correlations[slot, step], pursuits.choices[slot, step]):
            pursuits.correlations[slot, step], pursuits.choices[slot, step] = correlation, atom
    pursuits.rivals[slot] = 0


@compiled
def _fit(gram: Gram, pursuits: Pursuits, slot: int, work: Workspace) -> Fit:
    factor, solved = pursuits.factor[slot], pursuits.solved[slot]
    return Fit(gram.atoms, pursuits.support[slot], factor, solved, work.coefficients)


@entry_point
def start(gram: Gram, pursuits: Pursuits, slots: ndarray) -> None:
    """Draft the first step of the new targets in ``slots``: the best atom for each."""
    for slot in slots:
        pursuits.status[slot] = DRAFTED
        pursuits.size[slot], pursuits.verified[slot], pursuits.complete[slot] = 0, 0, False
        pursuits.threshold[slot] = FIRST_THRESHOLD
        inner, best, highest = pursuits.inner[slot], 0, np.float32(-1)
        for atom in range(len(gram.atoms)):
            correlation = abs(np.float32(inner[atom])) * gram.norms[atom]
            if correlation > highest:
                best, highest = atom, correlation
        _weigh(gram, pursuits, slot, 0, 0, pursuits.solved[slot])
        pursuits.choices[slot, 0] = best
        pursuits.correlations[slot, 0] = exact_correlation(gram, best, pursuits.targets[slot])
        _expect_scan(pursuits, slot, 1)


@compiled
def _expect_scan(pursuits: Pursuits, slot: int, length: int) -> None:
    """Prepare the lists for a scan of a draft of so many steps."""
    pursuits.length[slot] = pursuits.scanned[slot] = length
    pursuits.listed[slot] = pursuits.rivals[slot] = 0
    if length > 0:
        pursuits.least[slot] = pursuits.threshold[slot] * pursuits.correlations[slot, length - 1] * UNIT


@compiled
def _advance_one(
    gram: Gram, pursuits: Pursuits, slot: int, most_steps: int, list_length: int, work: Workspace
) -> bool:
    """Decide what the scan has left open, and draft the next steps; return whether the pursuit is complete."""
    compare_rivals(gram, pursuits, slot, work)
    support, choices, before = pursuits.support[slot], pursuits.choices[slot], pursuits.size[slot]
    scanned, length, verified = pursuits.scanned[slot], pursuits.length[slot], pursuits.verified[slot]
    last = 0
    while last < scanned and verified + last < before and choices[last] == support[verified + last]:
        last += 1
    if pursuits.complete[slot] and last == length:
        return True
    # The choice of this step is right, or was corrected; the steps after it are undone.
    last = min(last, scanned - 1)
    undone = last < length - 1 or pursuits.complete[slot]
    size = verified + last
    atoms, inner = pursuits.candidates[slot], pursuits.inner[slot]
    listed = load_found(work.candidates, inner, atoms, pursuits.found[slot], pursuits.listed[slot], size)
    if listed > 1.5 * list_length:
        pursuits.threshold[slot] = min(RAISE * pursuits.threshold[slot], HIGHEST_THRESHOLD)
    elif listed < 0.75 * list_length:
        pursuits.threshold[slot] *= LOWER
    # The scan skipped the atoms that are undone now, since they were in the support.
    listed = append(gram, work.candidates, inner, support, size, support[size:before], listed)
    steps = min(STEPS_AFTER_WRONG, most_steps) if undone else most_steps
    pursuits.size[slot], pursuits.verified[slot] = size, size + 1
    _propose(gram, pursuits, slot, choices[last], pursuits.correlations[slot, last], steps, listed, work)
    return pursuits.length[slot] == 0


@compiled
def _propose(
    gram: Gram,
    pursuits: Pursuits,
    slot: int,
    choice: int,
    correlation: float,
    steps: int,
    listed: int,
    work: Workspace,
) -> None:
    """Select ``choice`` and draft the next steps from the ``listed`` candidates."""
    fit, support, target = _fit(gram, pursuits, slot, work), pursuits.support[slot], pursuits.targets[slot]
    length, pursuits.complete[slot] = 0, False
    for step in range(steps):
        size = pursuits.size[slot]
        request_cosines(gram, work.candidates, listed, choice)
        useful = correlation > ZERO * gram.norms[choice]
        if not useful or not extend(fit, target, size, choice):
            break  # no atom reduces the residual; a drafted choice must be verified first
        size += 1
        pursuits.size[slot] = size
        residual_norm = fit_target(fit, target, size, work.residual)
        if size == len(work.coefficients) or residual_norm <= ZERO:
            pursuits.complete[slot] = True
            break
        _weigh(gram, pursuits, slot, step, size, work.coefficients)
        weights, error = pursuits.weights[slot, step], pursuits.errors[slot, step]
        choice, correlation = best_candidate(
            gram, work.candidates, listed, support, size, weights, work.residual, error
        )
        pursuits.choices[slot, step], pursuits.correlations[slot, step] = choice, correlation
        length += 1
    _expect_scan(pursuits, slot, length)


@compiled
def _weigh(gram: Gram, pursuits: Pursuits, slot: int, step: int, size: int, coefficients: ndarray) -> None:
    """Write the weights of the support's rows of the matrix in a step's cosines, and the bound on the errors.

    A cosine is the target's minus a weighted sum of entries of the matrix; the absolute weights add up to ``total``.
    Each term was a sum of d float32 products and was rounded to a unit, and the terms are added in float32.
    """
    support, weights, total = pursuits.support[slot], pursuits.weights[slot, step], 0.0
    for place in range(size):
        weight = coefficients[place] * gram.norms[support[place]] * gram.largest_norm
        total += abs(weight)
        weights[place] = -weight
    weights[size:] = 0
    operations = pursuits.targets.shape[1] + size + 32
    pursuits.errors[slot, step] = (1 + total) * (0.5 + UNIT * operations * (ROUNDING / 2))
