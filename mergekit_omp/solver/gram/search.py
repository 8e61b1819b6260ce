"""Batched OMP: propose several steps from a candidate list and verify them in one scan.

After t steps the correlations of a residual with all atoms are ⟨a, x⟩ - Σⱼ cⱼ ⟨a, aⱼ⟩, over the t atoms of the
support. With the cosines of a :class:`~mergekit_omp.solver.gram.matrix.Gram` a correlation costs t products, but
reading the t rows of the matrix takes longer than the products. So several steps share one scan, as several tokens
share one forward pass of the large model in speculative decoding (Leviathan et al. 2023):

    draft = [the best atom for the target]
    repeat:
        # Verify: one scan of all atoms computes the correlations at every drafted step.
        wrong = first step of the draft at which another atom is better, or none
        candidates = the atoms with the highest correlations with the last residual
        if none is wrong and the draft was complete: return
        # Undo the steps after it, and use the better atom in it.
        support = the verified atoms
        # Propose: most of the time the list contains the atoms that the next steps select.
        draft = []
        until the draft is long enough, or complete:
            support += choice; fit; choice = best of the candidates
            draft += [choice]

Long drafts need fewer scans, and short ones waste less when a step is wrong. The length doubles after a draft without
a wrong step, and otherwise falls back to the number of right steps.

The support is that of OMP with a scan in every step, since all decisions use float64: the least-squares fit with the
Cholesky factor of the active atoms' inner products, the residuals, and the correlations of competing atoms. The scan's
cosines, in 16-bit integers and float32, only exclude atoms, by a bound on their error.

Letters in shapes: B targets, N atoms, P atoms padded to whole tiles, d dimensions, k sparsity, n steps of a draft.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from mergekit_omp.solver.gram import candidates as candidate_list
from mergekit_omp.solver.gram import cholesky, kernels
from mergekit_omp.solver.gram.candidates import Candidates, exact_correlation
from mergekit_omp.solver.gram.cholesky import ActiveSet
from mergekit_omp.solver.gram.kernels import ROWS, compiled, entry_point
from mergekit_omp.solver.gram.layout import TILE, UNIT
from mergekit_omp.solver.gram.matrix import Gram
from mergekit_omp.solver.tolerances import ROUNDING, ZERO

MOST_STEPS, FEWEST_STEPS = 8, 4
"""Steps of the longest draft (more are undone too often), and of the shortest after a wrong step."""

LIST_LENGTH = 200
"""Target length of the candidate list."""

FIRST_THRESHOLD, HIGHEST_THRESHOLD = 0.6, 0.95
"""Initial and highest value of the share of the best correlation that candidates exceed. It adapts after every
scan."""

RAISE, LOWER = 1.04, 0.96
"""Factors on the threshold after a list longer than 1.5 times, or shorter than 0.75 times, the target length."""


class Draft(NamedTuple):
    """Proposed steps of one target of norm 1.

    Attributes:
        length: int64 (1,), n; only the first n places of the other arrays are valid.
        residuals: float64 (n, d), before each step.
        weights: float32 (n, k), weights of the support's rows of the Gram matrix in the cosines of the residual.
        errors: float32 (n,), bound on the errors of these cosines.
        choices: int64 (n,), the selected atoms.
        correlations: float64 (n,), their |⟨residual, atom⟩| in units of the largest norm.
    """

    length: ndarray
    residuals: ndarray
    weights: ndarray
    errors: ndarray
    choices: ndarray
    correlations: ndarray


class Workspace(NamedTuple):
    """Buffers that are reused for all targets; ``sums`` (n, TILE) and ``rows`` (ROWS, TILE) belong to the scan."""

    draft: Draft
    active: ActiveSet
    candidates: Candidates
    sums: ndarray
    rows: ndarray


def solve_by_gram(
    targets: Tensor, gram: Gram, k: int, *, most_steps: int = MOST_STEPS, list_length: int = LIST_LENGTH
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve a batch of targets on the CPU.

    Args:
        targets: float32 (B, d).
        gram: Gram matrix of all atoms.
        k: sparsity.
        most_steps: steps of the longest draft.
        list_length: target length of the candidate list. Neither changes the result.

    Returns:
        Support int64 (B, k) in the order of selection, -1 in unused slots; coefficients float32 (B, k), 0 there;
        relative residuals float32 (B,).
    """
    norms = targets.double().norm(dim=1)
    units = targets.double() / norms.where(norms > 0, torch.ones_like(norms))[:, None]
    support = np.full((len(targets), k), -1, np.int64)
    coefficients, residuals = np.zeros((len(targets), k)), np.zeros(len(targets))
    inner, work = gram.cosines_with(units.float()).numpy(), _workspace(targets.shape[1], k, most_steps)
    _solve_all(units.numpy(), inner, gram, work, list_length, support, coefficients, residuals)
    scaled = torch.from_numpy(coefficients) * norms[:, None]
    return torch.from_numpy(support), scaled.float(), torch.from_numpy(residuals).float()


def _workspace(dim: int, k: int, most_steps: int) -> Workspace:
    draft = Draft(
        length=np.zeros(1, np.int64),
        residuals=np.zeros((most_steps, dim)),
        weights=np.zeros((most_steps, -(-k // ROWS) * ROWS), np.float32),
        errors=np.zeros(most_steps, np.float32),
        choices=np.zeros(most_steps, np.int64),
        correlations=np.zeros(most_steps),
    )
    sums, rows = np.zeros((most_steps, TILE), np.float32), np.zeros((ROWS, TILE), np.float32)
    return Workspace(draft, cholesky.empty_active_set(dim, k), candidate_list.empty_candidates(k), sums, rows)


@entry_point
def _solve_all(
    units: ndarray,
    inner: ndarray,
    gram: Gram,
    work: Workspace,
    list_length: int,
    support: ndarray,
    coefficients: ndarray,
    residuals: ndarray,
) -> None:
    """Solve targets (B, d) of norm 1 or 0, given their cosines ``inner`` (B, P); write the last three arguments."""
    for row in range(len(units)):
        if np.any(units[row]):
            residuals[row] = _solve_one(units[row], inner[row], gram, work, list_length)
            for slot in range(work.active.size[0]):
                support[row, slot] = work.active.support[slot]
                coefficients[row, slot] = work.active.coefficients[slot]


@compiled
def _solve_one(target: ndarray, inner: ndarray, gram: Gram, work: Workspace, list_length: int) -> float:
    """Find the active set of a target (d,) of norm 1, and return the norm of its residual."""
    draft, active, candidates = work.draft, work.active, work.candidates
    _draft_first_step(target, inner, gram, work)
    verified, complete = 0, False  # atoms that were active before the draft; whether the draft ends the solve
    steps, threshold = 1, FIRST_THRESHOLD
    while True:
        wrong = _verify(inner, gram, work, threshold)
        if complete and wrong == draft.length[0]:
            break
        # The choice of this step is right, or was corrected; the steps after it are undone.
        last = min(wrong, draft.length[0] - 1)
        undone = wrong < draft.length[0] - 1 or complete
        proposed, active.size[0] = active.size[0], verified + last
        # The last scan skipped the undone atoms, since they were in the support.
        candidate_list.append(gram, active, candidates, inner, active.support[active.size[0] : proposed])
        steps = min(max(last + 1, FEWEST_STEPS) if undone else 2 * steps, len(draft.errors))
        if candidates.length[0] > 1.5 * list_length:
            threshold = min(RAISE * threshold, HIGHEST_THRESHOLD)
        elif candidates.length[0] < 0.75 * list_length:
            threshold *= LOWER
        verified = active.size[0] + 1
        complete = _propose(target, gram, work, draft.choices[last], draft.correlations[last], steps)
        if draft.length[0] == 0:
            break
    return cholesky.fit_target(active, target, draft.residuals[0])


@compiled
def _draft_first_step(target: ndarray, inner: ndarray, gram: Gram, work: Workspace) -> None:
    draft = work.draft
    work.active.size[0], draft.length[0] = 0, 1
    draft.residuals[0] = target
    _weigh(gram, work, 0)
    draft.choices[0] = np.argmax(np.abs(inner) * gram.norms)
    draft.correlations[0] = exact_correlation(gram, draft.choices[0], target)


@compiled
def _propose(target: ndarray, gram: Gram, work: Workspace, choice: int, correlation: float, steps: int) -> bool:
    """Select ``choice`` and draft the next steps from the candidates; return whether the pursuit is complete."""
    draft, active = work.draft, work.active
    draft.length[0] = 0
    for step in range(steps):
        useful = correlation > ZERO * gram.norms[choice]
        if not useful or not cholesky.extend(active, target, choice, gram.atoms[choice]):
            return step == 0  # no atom reduces the residual; a drafted choice must be verified first
        residual_norm = cholesky.fit_target(active, target, draft.residuals[step])
        if active.size[0] == len(active.coefficients) or residual_norm <= ZERO:
            return True
        _weigh(gram, work, step)
        choice, correlation = candidate_list.best_candidate(
            gram, active, work.candidates, draft.weights[step], draft.residuals[step], draft.errors[step]
        )
        draft.choices[step], draft.correlations[step] = choice, correlation
        draft.length[0] += 1
    return False


@compiled
def _weigh(gram: Gram, work: Workspace, step: int) -> None:
    """Write the weights of the active atoms' rows of the matrix in a step's cosines, and the bound on the errors.

    A cosine is the target's minus a weighted sum of entries of the matrix; the absolute weights add up to ``total``.
    Each term was a sum of d float32 products, entries were rounded to 1 / UNIT, and the terms are added in float32.
    """
    draft, active = work.draft, work.active
    size, total = active.size[0], 0.0
    for slot in range(size):
        weight = active.coefficients[slot] * gram.norms[active.support[slot]] * gram.largest_norm
        total += abs(weight)
        draft.weights[step, slot] = -weight / UNIT
    draft.weights[step, size:] = 0
    operations = draft.residuals.shape[1] + size + 32
    draft.errors[step] = (1 + total) * operations * (ROUNDING / 2) + total * 0.5 / UNIT


@compiled
def _verify(inner: ndarray, gram: Gram, work: Workspace, threshold: float) -> int:
    """Scan all atoms for the drafted steps and correct their choices.

    The new candidates are the atoms whose correlation exceeds ``threshold`` times that of the last step's choice.
    Returns the first step with a wrong choice, or the number of steps if there is none.
    """
    draft, active, candidates = work.draft, work.active, work.candidates
    wrong = count = draft.length[0]
    least = np.float32(threshold * draft.correlations[count - 1])
    candidates.length[0] = 0
    support, sums = active.support[: -(-active.size[0] // ROWS) * ROWS], work.sums[:count]
    support[active.size[0] :] = active.support[0]  # padding to a multiple of ROWS, with weight 0
    for start in range(0, len(inner), TILE):
        _scan_tile(inner, gram.cosines, support, draft.weights, start, sums, work.rows)
        inverse_norms = gram.inverse_norms[start : start + TILE]
        for step in range(min(wrong + 1, count)):
            correlation, error = draft.correlations[step], draft.errors[step]
            if kernels.any_may_reach(sums[step], inverse_norms, correlation, error):
                wrong = min(wrong, _correct(gram, draft, sums[step], step, start))
        candidate_list.append_tile(gram, active, candidates, inner, sums[count - 1], start, least)
        while candidates.length[0] > TILE:
            mean = np.mean(candidates.correlations[: candidates.length[0]])
            least = max(np.float32(1.1) * least, np.float32(0.5) * mean)
            candidate_list.shorten(active, candidates, least)
    return wrong


@compiled
def _scan_tile(
    inner: ndarray, cosines: ndarray, support: ndarray, weights: ndarray, start: int, sums: ndarray, rows: ndarray
) -> None:
    """Compute the cosines ``sums`` (n, TILE) of the atoms from ``start`` on with the residual of each drafted step.

    Takes individual arrays instead of their tuples, since passing tuples for every tile is slow.
    """
    count = len(sums)
    for step in range(count):
        kernels.copy_tile(inner[start : start + TILE], sums[step])
    for slot in range(0, len(support), ROWS):
        for row in range(ROWS):
            kernels.widen_tile(cosines[support[slot + row], start : start + TILE], rows[row])
        for step in range(0, count - 1, 2):
            kernels.add_rows_to_two(sums[step], sums[step + 1], rows, weights, step, slot)
        if count % 2:
            kernels.add_rows_to_one(sums[count - 1], rows, weights, count - 1, slot)


@compiled
def _correct(gram: Gram, draft: Draft, cosines: ndarray, step: int, start: int) -> int:
    """Replace a step's choice by a better atom of a tile; return the step, or the number of steps if there is none.

    Atoms that the error bound does not exclude are correlated again in float64.
    """
    before, error = draft.choices[step], draft.errors[step]
    for column in range(TILE):
        atom = start + column
        least = np.float32(draft.correlations[step]) * gram.inverse_norms[atom]
        if abs(cosines[column]) + error >= least and atom < len(gram.atoms) and atom != draft.choices[step]:
            correlation = exact_correlation(gram, atom, draft.residuals[step])
            if candidate_list.beats(correlation, atom, draft.correlations[step], draft.choices[step]):
                draft.correlations[step], draft.choices[step] = correlation, atom
    return step if draft.choices[step] != before else draft.length[0]
