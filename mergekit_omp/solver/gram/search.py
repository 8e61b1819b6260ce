"""Exact steps that look at all atoms for several of them at once.

After t steps the scores of all atoms are ⟨a, x⟩ - Σⱼ cⱼ ⟨a, aⱼ⟩, over the t atoms of the support. With the inner
products of a :class:`~mergekit_omp.solver.gram.matrix.Gram` that takes t multiplications a score, but t rows of the
matrix have to be read for it, which takes longer. So a target speculates: it takes several steps with atoms of a
shortlist, those that scored highest when it last looked at all, and then reads the rows once to verify all these
steps. The look's scores are off by no more than a bound; every atom that may beat the one that was taken is scored
again in float64. Where one does, the steps from there on are undone, and it is taken instead. What is found is what a
look in each step finds.

Everything that decides is float64: least squares by the Cholesky factor of the support's own inner products,
residuals, and the scores of atoms that compete.

Letters in shapes: B targets, N atoms, P atoms and what fills them up to whole tiles, d dimensions, k sparsity, n steps
that are verified at once, M atoms of a shortlist.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from numpy import ndarray
from torch import Tensor

from mergekit_omp.solver.gram.matrix import TILE, UNIT, Gram
from mergekit_omp.solver.scan.projection import DEPENDENT
from mergekit_omp.solver.scan.state import ZERO
from mergekit_omp.solver.scan.tie_break import TIE

FEWEST, STEPS = 4, 8
"""After a wrong step, so many are verified at once at least; and the most ever. More of them are undone too often."""

LISTED = 200
"""About as many atoms as a shortlist has."""

HALF_UNIT = 0.5 / UNIT
ROUNDOFF = 2.0**-24
"""Relative error of one float32 operation."""

ROWS = 4
"""Rows of the matrix that are added at a time."""

GROUP = 32
"""Atoms of which few enough groups have one for the shortlist, which vector instructions tell."""

SQUARE = 32
"""Rows and columns that are transposed at a time, in a core's first cache."""

# Sums may be reordered, as all vector instructions need; NaN and infinity keep their meaning.
compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"})


class Problem(NamedTuple):
    """The arrays of a :class:`Gram`, and the largest norm."""

    atoms: ndarray
    norms: ndarray
    reach: ndarray
    cosines: ndarray
    largest: float


class Steps(NamedTuple):
    """What is known after each of some steps, which are to be verified.

    ``residuals`` float64 (steps, d), of a target of norm 1; ``weights`` float32 (steps, k), what the support's rows
    are multiplied with; ``errors`` float32 (steps,), the bound on a look's cosines; ``choices`` int64 and ``scores``
    float64 (steps,), the atom that was taken next, and |⟨residual, atom⟩| in units of the largest norm.
    """

    residuals: ndarray
    weights: ndarray
    errors: ndarray
    choices: ndarray
    scores: ndarray


class Solution(NamedTuple):
    """The support int64 (k,), its atoms float32 (k, d), the Cholesky factor (k, k) of their inner products, its
    solution with those of the target (k,), and the coefficients (k,), in float64."""

    support: ndarray
    atoms: ndarray
    factor: ndarray
    solved: ndarray
    coefficients: ndarray


class Shortlist(NamedTuple):
    """``atoms`` int64 (M,), their cosines with the target ``inner`` and estimated ``scores`` float32 (M,), their
    ``cosines`` float32 (k, M) with the support's atoms, and room for more."""

    atoms: ndarray
    inner: ndarray
    scores: ndarray
    cosines: ndarray


def solve(
    targets: Tensor, gram: Gram, k: int, *, ahead: int = STEPS, listed: int = LISTED
) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of targets.

    Args:
        targets: float32 (B, d).
        gram: of all atoms, no two of which are equal.
        k: the sparsity.
        ahead: the most steps that are verified at once.
        listed: about as many atoms as a shortlist has. Neither changes what is found.

    Returns:
        Support int64 (B, k) in the order of selection, -1 where the slot is unused; coefficients float32 (B, k), 0
        there; relative residuals float32 (B,).
    """
    count, dim = targets.shape
    norms = targets.double().norm(dim=1)
    units = targets.double() / norms.where(norms > 0, torch.ones_like(norms))[:, None]
    support = np.full((count, k), -1, np.int64)
    coefficients, residuals = np.zeros((count, k)), np.zeros(count)
    problem = Problem(gram.atoms.numpy(), gram.norms.numpy(), gram.reach.numpy(), gram.cosines, gram.largest)
    steps, solution, shortlist, tile = _workspace(dim, k, ahead)
    inner = gram.inner(units.float()).numpy()
    for row in norms.nonzero().flatten().tolist():
        size, residuals[row] = _pursue(
            units[row].numpy(), inner[row], problem, steps, solution, shortlist, tile, listed
        )
        support[row, :size] = solution.support[:size]
        coefficients[row, :size] = solution.coefficients[:size]
    scaled = torch.from_numpy(coefficients) * norms[:, None]
    return torch.from_numpy(support), scaled.float(), torch.from_numpy(residuals).float()


def _workspace(dim: int, k: int, ahead: int) -> tuple[Steps, Solution, Shortlist, ndarray]:
    """What the solve of one target after the other writes to."""
    width = -(-k // ROWS) * ROWS
    steps = Steps(
        residuals=np.zeros((ahead, dim)),
        weights=np.zeros((ahead, width), np.float32),
        errors=np.zeros(ahead, np.float32),
        choices=np.zeros(ahead, np.int64),
        scores=np.zeros(ahead),
    )
    solution = Solution(
        support=np.zeros(width, np.int64),
        atoms=np.zeros((k, dim), np.float32),
        factor=np.zeros((k, k)),
        solved=np.zeros(k),
        coefficients=np.zeros(k),
    )
    room = 2 * TILE  # a list of up to a tile, and what the next tile may add; one more is written to and not counted
    shortlist = Shortlist(
        atoms=np.zeros(room + 1, np.int64),
        inner=np.zeros(room, np.float32),
        scores=np.zeros(room, np.float32),
        cosines=np.zeros((k, room), np.float32),
    )
    return steps, solution, shortlist, np.zeros((ahead + ROWS, TILE), np.float32)


@compiled
def _pursue(
    target: ndarray,
    inner: ndarray,
    problem: Problem,
    steps: Steps,
    solution: Solution,
    shortlist: Shortlist,
    tile: ndarray,
    aim: int,
) -> tuple[int, float]:
    """Solve one target, with shortlists of about ``aim`` atoms: the number of its atoms, and the norm of its residual.

    ``size`` atoms are in the solution, the first ``first`` of which were there at the first of the ``count`` steps to
    be verified.
    """
    k = len(solution.solved)
    steps.residuals[0] = target
    steps.weights[0] = 0
    steps.choices[0] = np.argmax(np.abs(inner) * problem.norms)
    steps.scores[0] = _score(problem, steps.choices[0], target)
    steps.errors[0] = _error(len(target), 0, 0.0)
    first, size, count = 0, 0, 1
    ended = False  # the last of the steps' choices is in the solution, and no further one is needed
    ahead, threshold = 1, 0.6
    while True:
        wrong, listed = _verify(inner, problem, steps, solution, shortlist, tile, size, count, threshold)
        if ended and wrong == count:
            break
        # The choice of this step is right, and what was done after it is undone.
        right = min(wrong, count - 1)
        tried, size = size, first + right
        listed = _list_again(inner, problem, solution, shortlist, listed, size, tried)
        ahead = max(right + 1, FEWEST) if wrong < count - 1 or ended else 2 * ahead
        ahead = min(ahead, len(steps.errors))
        if listed > 1.5 * aim:
            threshold = min(1.04 * threshold, 0.95)
        elif listed < 0.75 * aim:
            threshold *= 0.96
        choice, score = steps.choices[right], steps.scores[right]
        first, count, ended = size + 1, 0, False
        while count < ahead:
            if not (
                score > ZERO * problem.norms[choice] and _extend(target, problem.atoms[choice], solution, choice, size)
            ):
                # Nothing is left that helps, if no other atom does.
                ended = count == 0
                break
            size += 1
            left = _refit(target, solution, size, steps.residuals[count])
            if size == k or left <= ZERO:
                ended = True
                break
            total = 0.0
            for slot in range(size):
                weight = solution.coefficients[slot] * problem.norms[solution.support[slot]] * problem.largest
                total += abs(weight)
                steps.weights[count, slot] = -weight / UNIT
            steps.weights[count, size:] = 0
            steps.errors[count] = _error(len(target), size, total)
            choice, score = _best_listed(problem, steps, shortlist, choice, listed, size, count)
            steps.choices[count], steps.scores[count] = choice, score
            count += 1
        if count == 0:
            break
    return size, _refit(target, solution, size, steps.residuals[0])


@compiled
def _error(dim: int, size: int, total: float) -> float:
    """The most that a cosine of a look is wrong, for a target of norm 1.

    It is a sum of one product of the target and ``size`` rows of the matrix, whose weights have absolute values that
    add up to ``total``: all of them were sums of ``dim`` float32 products, the rows were rounded to integers, and the
    terms are added in float32.
    """
    return (1 + total) * (dim + size + 32) * ROUNDOFF + total * HALF_UNIT


@compiled
def _verify(
    inner: ndarray,
    problem: Problem,
    steps: Steps,
    solution: Solution,
    shortlist: Shortlist,
    tile: ndarray,
    size: int,
    count: int,
    threshold: float,
) -> tuple[int, int]:
    """Look at all atoms for ``count`` steps, and put the best into their choices.

    Returns:
        The first step whose choice was another one, or ``count``; and the length of the new shortlist, of atoms that
        score more than ``threshold`` times what the last step's choice does.
    """
    sums, rows = tile[:-ROWS], tile[-ROWS:]
    for slot in range(size, -(-size // ROWS) * ROWS):
        solution.support[slot] = solution.support[0]  # with weight 0
    wrong, listed = count, 0
    least = np.float32(threshold * steps.scores[count - 1])
    for start in range(0, len(inner), TILE):
        part, reach = inner[start : start + TILE], problem.reach[start : start + TILE]
        for step in range(count):
            _copy(part, sums[step])
        for slot in range(0, size, ROWS):
            for row in range(ROWS):
                _widen(problem.cosines[solution.support[slot + row], start : start + TILE], rows[row])
            for step in range(0, count - 1, 2):
                _add_to_two(sums[step], sums[step + 1], rows, steps.weights, step, slot)
            if count % 2:
                _add_to_one(sums[count - 1], rows, steps.weights, count - 1, slot)
        for step in range(min(wrong + 1, count)):
            near = _any_reaches(sums[step], reach, steps.scores[step], steps.errors[step])
            if near and _rescore(problem, steps, sums[step], reach, step, start):
                wrong = min(wrong, step)
        listed = _list(problem, solution, shortlist, sums[count - 1], part, least, listed, size, start)
        while listed > TILE:
            least = max(np.float32(1.1) * least, np.float32(0.5) * np.mean(shortlist.scores[:listed]))
            listed = _shorten(shortlist, least, listed, size)
    return wrong, listed


@compiled
def _copy(row: ndarray, out: ndarray) -> None:  # an assignment to a slice of an array takes many times as long
    for column in range(TILE):
        out[column] = row[column]


@compiled
def _widen(row: ndarray, out: ndarray) -> None:
    for column in range(TILE):
        out[column] = np.float32(row[column])


@compiled
def _add_to_two(one: ndarray, two: ndarray, rows: ndarray, weights: ndarray, step: int, slot: int) -> None:
    """Add ROWS rows, with the weights of two steps, to the sums of these steps."""
    a0, a1, a2, a3 = weights[step, slot], weights[step, slot + 1], weights[step, slot + 2], weights[step, slot + 3]
    step += 1
    b0, b1, b2, b3 = weights[step, slot], weights[step, slot + 1], weights[step, slot + 2], weights[step, slot + 3]
    row0, row1, row2, row3 = rows[0], rows[1], rows[2], rows[3]
    for column in range(TILE):
        x0, x1, x2, x3 = row0[column], row1[column], row2[column], row3[column]
        one[column] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
        two[column] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3


@compiled
def _add_to_one(one: ndarray, rows: ndarray, weights: ndarray, step: int, slot: int) -> None:
    a0, a1, a2, a3 = weights[step, slot], weights[step, slot + 1], weights[step, slot + 2], weights[step, slot + 3]
    row0, row1, row2, row3 = rows[0], rows[1], rows[2], rows[3]
    for column in range(TILE):
        one[column] += a0 * row0[column] + a1 * row1[column] + a2 * row2[column] + a3 * row3[column]


@compiled
def _any_reaches(sums: ndarray, reach: ndarray, score: float, error: float) -> bool:
    """Whether any atom of a tile may score as much; a sum, not a search, which vector instructions do faster."""
    score, error, excess = np.float32(score), np.float32(error), np.float32(0)
    for column in range(TILE):
        excess += max(abs(sums[column]) + error - score * reach[column], np.float32(0))
    return excess > 0


@compiled
def _rescore(problem: Problem, steps: Steps, sums: ndarray, reach: ndarray, step: int, start: int) -> bool:
    """Score the atoms of a tile in float64 that may beat the step's choice; whether one does, and so replaces it."""
    choice = steps.choices[step]
    for column in range(TILE):
        if abs(sums[column]) + steps.errors[step] >= np.float32(steps.scores[step]) * reach[column]:
            atom = start + column
            if atom < len(problem.atoms) and atom != steps.choices[step]:
                score = _score(problem, atom, steps.residuals[step])
                if _beats(score, atom, steps.scores[step], steps.choices[step]):
                    steps.scores[step], steps.choices[step] = score, atom
    return steps.choices[step] != choice


@compiled
def _score(problem: Problem, atom: int, residual: ndarray) -> float:
    return abs(_dot(problem.atoms[atom], residual)) / problem.largest


@compiled
def _beats(score: float, atom: int, best: float, choice: int) -> bool:
    """Whether an atom is to be taken before another: of equal ones, the one of the lower index."""
    return score > best * (1 + TIE) or (score >= best * (1 - TIE) and atom < choice)


@compiled
def _list(
    problem: Problem,
    solution: Solution,
    shortlist: Shortlist,
    sums: ndarray,
    inner: ndarray,
    least: float,
    listed: int,
    size: int,
    start: int,
) -> int:
    """Append the atoms of a tile that score more than so much to the shortlist; its new length."""
    before, least, norms = listed, np.float32(least), problem.norms[start : start + TILE]
    for left in range(0, TILE, GROUP):
        excess = np.float32(0)
        for column in range(left, left + GROUP):
            excess += max(abs(sums[column]) * norms[column] - least, np.float32(0))
        if excess > 0:
            for column in range(left, left + GROUP):
                shortlist.atoms[listed] = column
                listed += abs(sums[column]) * norms[column] > least
    for place in range(before, listed):
        column = shortlist.atoms[place]
        atom = start + column
        shortlist.atoms[place] = atom
        shortlist.inner[place] = inner[column]
        shortlist.scores[place] = abs(sums[column]) * norms[column]
        for slot in range(size):
            shortlist.cosines[slot, place] = problem.cosines[solution.support[slot], atom]
    return listed


@compiled
def _list_again(
    inner: ndarray,
    problem: Problem,
    solution: Solution,
    shortlist: Shortlist,
    listed: int,
    size: int,
    tried: int,
) -> int:
    """Append the atoms whose steps are undone, which scored nothing after them, to the shortlist; its new length."""
    for undone in range(size, tried):
        atom = solution.support[undone]
        shortlist.atoms[listed] = atom
        shortlist.inner[listed] = inner[atom]
        for slot in range(size):
            shortlist.cosines[slot, listed] = problem.cosines[solution.support[slot], atom]
        listed += 1
    return listed


@compiled
def _shorten(shortlist: Shortlist, least: float, listed: int, size: int) -> int:
    """Keep the atoms of the shortlist that score more than so much; its new length."""
    kept = 0
    for place in range(listed):
        if shortlist.scores[place] > least:
            shortlist.atoms[kept] = shortlist.atoms[place]
            shortlist.inner[kept] = shortlist.inner[place]
            shortlist.scores[kept] = shortlist.scores[place]
            for slot in range(size):
                shortlist.cosines[slot, kept] = shortlist.cosines[slot, place]
            kept += 1
    return kept


@compiled
def _best_listed(
    problem: Problem, steps: Steps, shortlist: Shortlist, taken: int, listed: int, size: int, step: int
) -> tuple[int, float]:
    """The best atom of the shortlist for the residual of a step, and its score; ``taken`` is the support's last."""
    if listed == 0:
        return taken, 0.0
    row, scores, cosines = problem.cosines[taken], shortlist.scores, shortlist.cosines
    for place in range(listed):
        cosines[size - 1, place] = row[shortlist.atoms[place]]
        scores[place] = shortlist.inner[place]
    for slot in range(size):
        _add(scores, steps.weights[step, slot], cosines[slot], listed)
    best = 0
    for place in range(listed):
        scores[place] = abs(scores[place]) * problem.norms[shortlist.atoms[place]]
        if scores[place] > scores[best]:
            best = place
    residual = steps.residuals[step]
    choice = shortlist.atoms[best]
    score = _score(problem, choice, residual)
    for place in range(listed):
        atom = shortlist.atoms[place]
        if scores[place] + steps.errors[step] * problem.norms[atom] >= np.float32(score) and atom != choice:
            other = _score(problem, atom, residual)
            if _beats(other, atom, score, choice):
                choice, score = atom, other
    return choice, score


@compiled
def _extend(target: ndarray, atom: ndarray, solution: Solution, index: int, size: int) -> bool:
    """Add an atom to the solution, after ``size`` others; False where it is in their span."""
    row = solution.factor[size]
    exact = atom.astype(np.float64)
    for slot in range(size):
        known = _dot(solution.factor[slot, :slot], row[:slot])
        row[slot] = (_dot(solution.atoms[slot], exact) - known) / solution.factor[slot, slot]
    whole = _dot(exact, exact)
    outside = whole - _dot(row[:size], row[:size])
    if not outside > DEPENDENT**2 * whole:
        return False
    row[size] = math.sqrt(outside)
    solution.solved[size] = (_dot(exact, target) - _dot(row[:size], solution.solved[:size])) / row[size]
    solution.support[size] = index
    solution.atoms[size] = atom
    return True


@compiled
def _refit(target: ndarray, solution: Solution, size: int, residual: ndarray) -> float:
    """Least-squares coefficients on the first atoms of the solution, the residual (d,) that is left, and its norm."""
    coefficients = solution.coefficients
    coefficients[:size] = solution.solved[:size]
    for slot in range(size - 1, -1, -1):
        coefficients[slot] /= solution.factor[slot, slot]
        _add(coefficients, -coefficients[slot], solution.factor[slot], slot)
    residual[:] = target
    slot = 0
    while slot + ROWS <= size:
        _take_four(residual, coefficients, solution.atoms, slot)
        slot += ROWS
    while slot < size:
        _add(residual, -coefficients[slot], solution.atoms[slot], len(residual))
        slot += 1
    return math.sqrt(_dot(residual, residual))


@compiled
def _take_four(residual: ndarray, coefficients: ndarray, atoms: ndarray, slot: int) -> None:
    c0, c1, c2, c3 = coefficients[slot], coefficients[slot + 1], coefficients[slot + 2], coefficients[slot + 3]
    a0, a1, a2, a3 = atoms[slot], atoms[slot + 1], atoms[slot + 2], atoms[slot + 3]
    for place in range(len(residual)):
        residual[place] -= c0 * a0[place] + c1 * a1[place] + c2 * a2[place] + c3 * a3[place]


@compiled
def _dot(one: ndarray, other: ndarray) -> float:
    total = 0.0
    for place in range(len(one)):
        total += np.float64(one[place]) * other[place]
    return total


@compiled
def _add(out: ndarray, factor: float, row: ndarray, count: int) -> None:
    for place in range(count):
        out[place] += factor * row[place]


@compiled
def store(product: ndarray, row: int, column: int, cosines: ndarray) -> None:
    """Round a block of a symmetric matrix to integers, and write it to both of its places."""
    height, width = product.shape
    for i in range(height):
        for j in range(width):
            cosines[row + i, column + j] = np.int16(np.floor(product[i, j] + np.float32(0.5)))
    for top in range(0, height, SQUARE):
        for left in range(0, width, SQUARE):
            for j in range(column + left, column + min(left + SQUARE, width)):
                for i in range(row + top, row + min(top + SQUARE, height)):
                    cosines[j, i] = cosines[i, j]
