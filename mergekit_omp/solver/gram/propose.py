"""Decide what a scan has left open for one target, and draft its next steps from the candidates.

All decisions use float64: the least-squares fit with the Cholesky factor of the support's inner products, the
residuals, and the correlations of rivals. So the support is that of OMP with a scan in every step.

Letters in shapes: T slots, d dimensions, k sparsity, n steps of a draft.
"""

import math

import numpy as np
from numpy import ndarray

from mergekit_omp.solver.gram.candidates import (
    append,
    best_candidate,
    exact_correlation,
    load_found,
    request_cosines,
)
from mergekit_omp.solver.gram.cholesky import extend, fit_target
from mergekit_omp.solver.gram.kernels import add_scaled, compiled, copy, dot, entry_point
from mergekit_omp.solver.gram.layout import MOST, UNIT
from mergekit_omp.solver.gram.matrix import Gram
from mergekit_omp.solver.gram.rivals import compare_rivals
from mergekit_omp.solver.gram.state import DRAFTED, EMPTY, Pursuits, Results
from mergekit_omp.solver.gram.verify import scan
from mergekit_omp.solver.gram.workspace import Workspace, fit_of
from mergekit_omp.solver.tolerances import ZERO

LIST_LENGTH = 300
"""Target length of the candidate list."""

FIRST_THRESHOLD, HIGHEST_THRESHOLD = 0.6, 0.95
"""Initial and highest value of the share of the best correlation that candidates exceed. It adapts after every
scan."""

RAISE, LOWER = 1.04, 0.96
"""Factors on the threshold after a list longer than 1.5 times, or shorter than 0.75 times, the target length."""


@entry_point
def start(
    gram: Gram,
    pursuits: Pursuits,
    slots: ndarray,
    most_steps: int,
    list_length: int,
    work: Workspace,
    results: Results,
) -> None:
    """Draft the first steps of the new targets in ``slots``; a target that this completes leaves its slot empty.

    The cosines with the targets are those of the first step, so that its scan reads no row of the matrix.
    """
    for slot in slots:
        pursuits.status[slot] = DRAFTED
        pursuits.size[slot], pursuits.verified[slot], pursuits.complete[slot] = 0, 0, False
        pursuits.threshold[slot] = FIRST_THRESHOLD
        inner, best, highest = pursuits.inner[slot], 0, np.float32(-1)
        for atom in range(len(gram.atoms)):
            correlation = abs(np.float32(inner[atom])) * gram.norms[atom]
            if correlation > highest:
                best, highest = atom, correlation
        _weigh(gram, pursuits, slot, 0, 0, 1.0, work)
        pursuits.choices[slot, 0] = best
        pursuits.correlations[slot, 0] = exact_correlation(gram, best, pursuits.targets[slot])
        _expect_scan(pursuits, slot, 1)
        no_rows = gram.cosines
        scan(gram, 0, len(gram.starts) - 1, no_rows, pursuits, slot, slot, work)
        _advance_one(gram, pursuits, slot, most_steps, list_length, work, results)


@entry_point
def advance(
    gram: Gram,
    pursuits: Pursuits,
    first: int,
    last: int,
    most_steps: int,
    list_length: int,
    work: Workspace,
    results: Results,
) -> None:
    """Decide and draft the next steps in slots ``first`` to ``last``; those of finished targets become empty."""
    for slot in range(first, last):
        if pursuits.status[slot] == DRAFTED:
            _advance_one(gram, pursuits, slot, most_steps, list_length, work, results)


@compiled
def _advance_one(
    gram: Gram,
    pursuits: Pursuits,
    slot: int,
    most_steps: int,
    list_length: int,
    work: Workspace,
    results: Results,
) -> None:
    if _decide_and_draft(gram, pursuits, slot, most_steps, list_length, work):
        row, size, target = pursuits.rows[slot], pursuits.size[slot], pursuits.targets[slot]
        results.residuals[row] = fit_target(fit_of(gram, pursuits, slot, work), target, size, work.residuals[0])
        copy(results.support[row], pursuits.support[slot], size)
        copy(results.coefficients[row], work.coefficients, size)
        pursuits.status[slot] = EMPTY


@compiled
def _expect_scan(pursuits: Pursuits, slot: int, length: int) -> None:
    """Prepare the lists for a scan of a draft of so many steps."""
    pursuits.length[slot] = pursuits.scanned[slot] = length
    pursuits.listed[slot] = pursuits.rivals[slot] = 0
    if length > 0:
        pursuits.least[slot] = pursuits.threshold[slot] * pursuits.correlations[slot, length - 1] * UNIT


@compiled
def _decide_and_draft(
    gram: Gram, pursuits: Pursuits, slot: int, most_steps: int, list_length: int, work: Workspace
) -> bool:
    """Decide what the scan has left open, and draft the next steps; return whether the pursuit is complete."""
    work.known[:] = False
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
    size = verified + last
    atoms, inner = pursuits.candidates[slot], pursuits.inner[slot]
    listed = load_found(work.candidates, inner, atoms, pursuits.found[slot], pursuits.listed[slot], size)
    if listed > 1.5 * list_length:
        pursuits.threshold[slot] = min(RAISE * pursuits.threshold[slot], HIGHEST_THRESHOLD)
    elif listed < 0.75 * list_length:
        pursuits.threshold[slot] *= LOWER
    # The scan skipped the atoms that are undone now, since they were in the support.
    listed = append(gram, work.candidates, inner, support, size, support[size:before], listed)
    pursuits.size[slot], pursuits.verified[slot] = size, size + 1
    _propose(gram, pursuits, slot, choices[last], pursuits.correlations[slot, last], most_steps, listed, work)
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
    fit, support, target = fit_of(gram, pursuits, slot, work), pursuits.support[slot], pursuits.targets[slot]
    length, pursuits.complete[slot] = 0, False
    for step in range(steps):
        size = pursuits.size[slot]
        request_cosines(gram, work.candidates, listed, choice)
        useful = correlation > ZERO * gram.norms[choice]
        if not useful or not extend(fit, target, size, choice):
            break  # no atom reduces the residual; a drafted choice must be verified first
        size += 1
        pursuits.size[slot] = size
        residual = work.residuals[step]
        residual_norm = fit_target(fit, target, size, residual)
        if size == len(work.coefficients) or residual_norm <= ZERO:
            pursuits.complete[slot] = True
            break
        _weigh(gram, pursuits, slot, step, size, residual_norm, work)
        weights, scale, error = pursuits.weights[slot, step], pursuits.scales[slot, step], pursuits.errors[slot, step]
        choice, correlation = best_candidate(
            gram, work.candidates, listed, support, size, weights, scale, residual, error
        )
        pursuits.choices[slot, step], pursuits.correlations[slot, step] = choice, correlation
        length += 1
    _expect_scan(pursuits, slot, length)


@compiled
def _weigh(
    gram: Gram, pursuits: Pursuits, slot: int, step: int, size: int, residual_norm: float, work: Workspace
) -> None:
    """Write the weights of the rows of a scan in a step's cosines, and the bound on the errors of these.

    A cosine is the target's minus a weighted sum of entries of the matrix, whose errors add up. Weights are rounded to
    integers, which changes the residual by a combination of the support: the norm of that is another error. Both are
    of a sum of rounded rows; the other row was rounded, too.
    """
    support, weights, factor = pursuits.support[slot], pursuits.weights[slot, step], pursuits.factor[slot]
    coefficients, rounding, largest = work.coefficients, work.rounding, 1.0
    for place in range(size):
        largest = max(largest, abs(coefficients[place]) * gram.norms[support[place]] * gram.largest_norm)
    one = max(math.floor(MOST / largest), 1.0)
    weights[0], errors = one, one * pursuits.inner_errors[slot]
    weights[1 + size :] = 0
    for place in range(size):
        norm = gram.norms[support[place]] * gram.largest_norm
        weight = -coefficients[place] * norm * one
        integer = min(max(np.floor(weight + 0.5), -MOST), MOST)
        weights[1 + place] = integer
        errors += abs(integer) * gram.errors[support[place]]
        # Of Lᵀ times the differences of coefficients, as long as the combination, a row at a time.
        rounding[place] = 0
        add_scaled(rounding, (weight - integer) / norm, factor[place], place + 1)
    errors += UNIT * math.sqrt(dot(rounding[:size], rounding[:size]))
    error = (1 + gram.rounding) * errors / one + gram.rounding * residual_norm * UNIT
    pursuits.scales[slot, step] = 1 / one
    # Within the bound no sum exceeds 32 bits.
    pursuits.errors[slot, step] = error if error < UNIT else np.inf
