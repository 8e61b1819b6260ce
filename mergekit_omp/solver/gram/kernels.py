"""Define the inner loops of the Gram search and the decorators that compile them with numba."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numpy import ndarray

from mergekit_omp.solver.gram.layout import TILE

ROWS = 4
"""Rows of the matrix that are added together."""

SQUARE = 32
"""Rows and columns that are transposed together; they fit into the L1 cache."""

# Sums may be reordered, which vectorisation requires; NaN and infinity keep their meaning.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz", "arcp"}}

compiled = njit(**OPTIONS)
"""Compiles a function that only compiled functions call."""


def entry_point(function: Callable) -> Any:
    """Compile a function that Python calls, and cache the result on disk.

    numba only notices changes of the function's own file. So the name in the cache includes a digest of every file
    whose code or constants are compiled in.
    """
    function.__qualname__ += f"_{_digest_of_sources()}"
    return njit(cache=True, **OPTIONS)(function)


def _digest_of_sources() -> str:
    folder = Path(__file__).parent
    sources = [*sorted(folder.glob("*.py")), folder.parent / "tolerances.py"]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


@entry_point
def store_symmetric(product: ndarray, row: int, column: int, cosines: ndarray) -> None:
    """Round a block of a symmetric matrix to integers and write it and its transpose."""
    height, width = product.shape
    for i in range(height):
        for j in range(width):
            cosines[row + i, column + j] = np.int16(np.floor(product[i, j] + np.float32(0.5)))
    for top in range(0, height, SQUARE):
        for left in range(0, width, SQUARE):
            for j in range(column + left, column + min(left + SQUARE, width)):
                for i in range(row + top, row + min(top + SQUARE, height)):
                    cosines[j, i] = cosines[i, j]


@compiled
def dot(one: ndarray, other: ndarray) -> float:
    """Return the inner product in float64."""
    total = 0.0
    for place in range(len(one)):
        total += np.float64(one[place]) * other[place]
    return total


@compiled
def add_scaled(out: ndarray, factor: float, row: ndarray, count: int) -> None:
    """Add ``factor`` times the first ``count`` numbers of a row to ``out``."""
    for place in range(count):
        out[place] += factor * row[place]


@compiled
def subtract_rows(residual: ndarray, coefficients: ndarray, rows: ndarray, slot: int) -> None:
    """Subtract ROWS rows from ``slot`` on, times their coefficients."""
    c0, c1, c2, c3 = coefficients[slot], coefficients[slot + 1], coefficients[slot + 2], coefficients[slot + 3]
    row0, row1, row2, row3 = rows[slot], rows[slot + 1], rows[slot + 2], rows[slot + 3]
    for place in range(len(residual)):
        residual[place] -= c0 * row0[place] + c1 * row1[place] + c2 * row2[place] + c3 * row3[place]


@compiled
def copy_tile(row: ndarray, out: ndarray) -> None:
    """Copy a tile; numba compiles an assignment to a slice to much slower code."""
    for column in range(TILE):
        out[column] = row[column]


@compiled
def widen_tile(row: ndarray, out: ndarray) -> None:
    """Convert a tile of integers to float32."""
    for column in range(TILE):
        out[column] = np.float32(row[column])


@compiled
def add_rows_to_two(one: ndarray, two: ndarray, rows: ndarray, weights: ndarray, step: int, slot: int) -> None:
    """Add ROWS rows to the sums of ``step`` and of the next step, with the weights of each step."""
    a0, a1, a2, a3 = weights[step, slot], weights[step, slot + 1], weights[step, slot + 2], weights[step, slot + 3]
    step += 1
    b0, b1, b2, b3 = weights[step, slot], weights[step, slot + 1], weights[step, slot + 2], weights[step, slot + 3]
    row0, row1, row2, row3 = rows[0], rows[1], rows[2], rows[3]
    for column in range(TILE):
        x0, x1, x2, x3 = row0[column], row1[column], row2[column], row3[column]
        one[column] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
        two[column] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3


@compiled
def add_rows_to_one(one: ndarray, rows: ndarray, weights: ndarray, step: int, slot: int) -> None:
    """Add ROWS rows to the sums of ``step``, with its weights."""
    a0, a1, a2, a3 = weights[step, slot], weights[step, slot + 1], weights[step, slot + 2], weights[step, slot + 3]
    row0, row1, row2, row3 = rows[0], rows[1], rows[2], rows[3]
    for column in range(TILE):
        one[column] += a0 * row0[column] + a1 * row1[column] + a2 * row2[column] + a3 * row3[column]


@compiled
def any_may_reach(
    cosines: ndarray, inverse_norms: ndarray, correlation: float | np.floating, error: float | np.floating
) -> bool:
    """Tell whether any atom of a tile may reach a correlation, given the cosines and the bound on their errors.

    Sums the excess instead of searching, which vectorises.
    """
    correlation, error, excess = np.float32(correlation), np.float32(error), np.float32(0)
    for column in range(TILE):
        excess += max(abs(cosines[column]) + error - correlation * inverse_norms[column], np.float32(0))
    return bool(excess > 0)
