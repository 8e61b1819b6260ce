"""Extend and solve the least-squares fit of one target, in float64.

Letters in shapes: d dimensions, k sparsity.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from mergekit_omp.solver.gram.kernels import ROWS, add_scaled, compiled, dot, subtract_rows
from mergekit_omp.solver.tolerances import DEPENDENT


class ActiveSet(NamedTuple):
    """Selected atoms and the Cholesky factor L of their Gram matrix AᵀA = LLᵀ.

    Attributes:
        size: int64 (1,), number of atoms; only so many places of the other arrays are valid.
        support: int64 (k rounded up to a multiple of ROWS,), indices of the atoms.
        atoms: float32 (k, d).
        factor: float64 (k, k), L.
        solved: float64 (k,), L⁻¹ Aᵀx for the target x.
        coefficients: float64 (k,), L⁻ᵀ L⁻¹ Aᵀx.
    """

    size: ndarray
    support: ndarray
    atoms: ndarray
    factor: ndarray
    solved: ndarray
    coefficients: ndarray


def empty_active_set(dim: int, k: int) -> ActiveSet:
    """Allocate room for k atoms."""
    return ActiveSet(
        size=np.zeros(1, np.int64),
        support=np.zeros(-(-k // ROWS) * ROWS, np.int64),
        atoms=np.zeros((k, dim), np.float32),
        factor=np.zeros((k, k)),
        solved=np.zeros(k),
        coefficients=np.zeros(k),
    )


@compiled
def extend(active: ActiveSet, target: ndarray, index: int, atom: ndarray) -> bool:
    """Add an atom (d,); return False, without adding it, if it lies in the span of the others."""
    size = active.size[0]
    row = active.factor[size]
    exact = atom.astype(np.float64)
    for slot in range(size):
        known = dot(active.factor[slot, :slot], row[:slot])
        row[slot] = (dot(active.atoms[slot], exact) - known) / active.factor[slot, slot]
    squared_norm = dot(exact, exact)
    outside = squared_norm - dot(row[:size], row[:size])
    if not outside > DEPENDENT**2 * squared_norm:
        return False
    row[size] = math.sqrt(outside)
    active.solved[size] = (dot(exact, target) - dot(row[:size], active.solved[:size])) / row[size]
    active.support[size] = index
    active.atoms[size] = atom
    active.size[0] = size + 1
    return True


@compiled
def fit_target(active: ActiveSet, target: ndarray, residual: ndarray) -> float:
    """Fit the target by the active atoms; write the residual (d,) and return its norm."""
    size, coefficients = active.size[0], active.coefficients
    coefficients[:size] = active.solved[:size]
    for slot in range(size - 1, -1, -1):
        coefficients[slot] /= active.factor[slot, slot]
        add_scaled(coefficients, -coefficients[slot], active.factor[slot], slot)
    residual[:] = target
    slot = 0
    while slot + ROWS <= size:
        subtract_rows(residual, coefficients, active.atoms, slot)
        slot += ROWS
    while slot < size:
        add_scaled(residual, -coefficients[slot], active.atoms[slot], len(residual))
        slot += 1
    return math.sqrt(dot(residual, residual))
