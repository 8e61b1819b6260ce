"""Extend and solve the least-squares fit of one target, in float64.

Letters in shapes: N atoms, d dimensions, k sparsity.
"""

import math
from typing import NamedTuple

from numpy import ndarray

from mergekit_omp.solver.gram.kernels import ROWS, add_scaled, compiled, copy, dot, subtract_rows
from mergekit_omp.solver.tolerances import DEPENDENT


class Fit(NamedTuple):
    """The atoms of one support and the Cholesky factor L of their Gram matrix AᵀA = LLᵀ.

    Its first t rows are those of the fit by the first t atoms.

    Attributes:
        atoms: float32 (N, d), all atoms.
        support: int64 (k,), which of them are fitted.
        factor: float64 (k, k), L.
        solved: float64 (k,), L⁻¹ Aᵀx for the target x.
        coefficients: float64 (k,), L⁻ᵀ L⁻¹ Aᵀx.
    """

    atoms: ndarray
    support: ndarray
    factor: ndarray
    solved: ndarray
    coefficients: ndarray


@compiled
def extend(fit: Fit, target: ndarray, size: int, choice: int) -> bool:
    """Add an atom to ``size`` others; return False, without adding it, if it lies in their span."""
    row = fit.factor[size]
    atom = fit.atoms[choice]
    for slot in range(size):
        known = dot(fit.factor[slot, :slot], row[:slot])
        row[slot] = (dot(fit.atoms[fit.support[slot]], atom) - known) / fit.factor[slot, slot]
    squared_norm = dot(atom, atom)
    outside = squared_norm - dot(row[:size], row[:size])
    if not outside > DEPENDENT**2 * squared_norm:
        return False
    row[size] = math.sqrt(outside)
    fit.solved[size] = (dot(atom, target) - dot(row[:size], fit.solved[:size])) / row[size]
    fit.support[size] = choice
    return True


@compiled
def fit_target(fit: Fit, target: ndarray, size: int, residual: ndarray) -> float:
    """Fit the target by the first ``size`` atoms; write the residual (d,) and return its norm."""
    coefficients = fit.coefficients
    copy(coefficients, fit.solved, size)
    for slot in range(size - 1, -1, -1):
        coefficients[slot] /= fit.factor[slot, slot]
        add_scaled(coefficients, -coefficients[slot], fit.factor[slot], slot)
    copy(residual, target, len(target))
    slot = 0
    while slot + ROWS <= size:
        subtract_rows(residual, coefficients, fit.atoms, fit.support, slot)
        slot += ROWS
    while slot < size:
        add_scaled(residual, -coefficients[slot], fit.atoms[fit.support[slot]], len(residual))
        slot += 1
    return math.sqrt(dot(residual, residual))
