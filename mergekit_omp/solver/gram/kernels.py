"""Define the inner loops of the Gram search and the decorators that compile them with numba."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numpy import ndarray

from mergekit_omp.solver.gram.layout import LINE, STRIP, UNIT
from mergekit_omp.solver.gram.vectors import COLUMNS, transpose_block

ROWS = 4
"""Rows that are subtracted together."""

OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    # Sums may be reordered, which vectorisation requires; NaN and infinity keep their meaning.
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
    # Compiled code allocates no arrays, so it need not count references to them: each count is a locked instruction on
    # a number that all threads share, and they took a sixth of the time of a solve.
    "_nrt": False,
}

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
def store_square(
    product: ndarray,
    factors: ndarray,
    row: int,
    strip: int,
    cosines: ndarray,
    starts: ndarray,
    stride: int,
    half: bool,
) -> None:
    """Write STRIP rows of a strip, from ``row`` on, as integers; in a whole matrix, their mirror too.

    An integer is an entry of ``product``, times the ``factors`` float32 (P,) of its row and its column, in units of 1
    / UNIT. ``starts`` are the places of the strips, in which rows follow each other after ``stride`` places.
    """
    height, width = product.shape
    first = starts[strip] + row * stride
    columns = factors[strip * STRIP : strip * STRIP + width]
    for i in range(height):
        _store_row(product[i], factors[row + i], columns, cosines[first + i * stride :])
    if not half and row != strip * STRIP:
        mirror = starts[row // STRIP] + strip * STRIP * stride
        transpose(cosines[first:], stride, cosines[mirror:], stride, width)


@entry_point
def store_rows(product: ndarray, factors: ndarray, columns: ndarray, out: ndarray, rows: ndarray, first: int) -> None:
    """Write a ``product`` (B, n) as integers to rows int64 (B,) of ``out`` int16 (T, P), from a ``first`` column on.

    An integer is an entry of the product, times the ``factors`` float32 (B,) of its row and ``columns`` (n,) of its
    column, in units of 1 / UNIT.
    """
    for i in range(len(rows)):
        _store_row(product[i], factors[i], columns, out[rows[i], first:])


@compiled
def _store_row(product: ndarray, factor: np.floating, columns: ndarray, out: ndarray) -> None:
    unit = factor * np.float32(UNIT)
    for j in range(len(product)):
        out[j] = np.int16(np.floor(product[j] * unit * columns[j] + np.float32(0.5)))


@compiled
def transpose(source: ndarray, stride: int, out: ndarray, out_stride: int, count: int) -> None:
    """Transpose STRIP rows and the first ``count`` columns of a strip, each a row of the result.

    Rows of the result begin at lines of the cache, as in :func:`~mergekit_omp.solver.gram.matrix.empty_places`.
    """
    whole = count - count % COLUMNS
    for row in range(0, STRIP, LINE):
        for column in range(0, whole, COLUMNS):
            transpose_block(source, stride, out, out_stride, row * stride + column, column * out_stride + row)
    for column in range(whole, count):
        for row in range(STRIP):
            out[column * out_stride + row] = source[row * stride + column]


@compiled
def dot(one: ndarray, other: ndarray) -> float:
    """Return the inner product in float64."""
    total = 0.0
    for place in range(len(one)):
        total += np.float64(one[place]) * other[place]
    return total


@compiled
def copy(out: ndarray, row: ndarray, count: int) -> None:
    """Copy the first ``count`` numbers of a row to another one; an assignment of slices allocates memory."""
    for place in range(count):
        out[place] = row[place]


@compiled
def add_scaled(out: ndarray, factor: float, row: ndarray, count: int) -> None:
    """Add ``factor`` times the first ``count`` numbers of a row to ``out``."""
    for place in range(count):
        out[place] += factor * row[place]


@compiled
def subtract_rows(residual: ndarray, coefficients: ndarray, atoms: ndarray, support: ndarray, slot: int) -> None:
    """Subtract ROWS atoms of a support, from ``slot`` on, times their coefficients."""
    c0, c1, c2, c3 = coefficients[slot], coefficients[slot + 1], coefficients[slot + 2], coefficients[slot + 3]
    row0, row1, row2, row3 = (
        atoms[support[slot]],
        atoms[support[slot + 1]],
        atoms[support[slot + 2]],
        atoms[support[slot + 3]],
    )
    for place in range(len(residual)):
        residual[place] -= c0 * row0[place] + c1 * row1[place] + c2 * row2[place] + c3 * row3[place]
