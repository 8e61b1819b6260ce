"""Measure how fast this CPU makes the products of a solve. Imports numba only when it measures."""

import timeit
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from mergekit_omp.solver.gram.layout import GAP, STEPS, STRIP
from mergekit_omp.solver.precision import full_precision
from mergekit_omp.solver.threads import map_in_threads

DIMENSIONS = 640
"""Dimensions of the matrix products that are compared."""

ROWS, SCANS = 64, 16
"""Rows of the scans that are timed, and the number of scans."""


class Rates(NamedTuple):
    """Times of the solver's own products, in units of the time of one product of a float32 matrix product.

    Attributes:
        product: of two 16-bit integers of rows; at most 1, since otherwise rows are multiplied in float32.
        scan: of a cosine and a weight in a scan of rows in the cache.
    """

    product: float = 1.0
    scan: float = 1.0


@cache
def measure_rates() -> Rates:
    """Time small products on one core; needs numba."""
    from mergekit_omp.solver.gram.integers import multiply, pack
    from mergekit_omp.solver.gram.verify import add_rows

    cosines, places = np.ones((ROWS, STRIP + GAP), np.int16), np.empty(ROWS, np.int64)
    places[:] = cosines.ctypes.data + cosines.strides[0] * np.arange(ROWS)
    weights, correlations = np.zeros((STEPS, ROWS), np.int16), np.empty((STEPS, STRIP), np.float32)
    scales, norms = np.ones(STEPS, np.float32), np.ones(STRIP, np.float32)
    usual = seconds_of_product(DIMENSIONS)
    seconds = _seconds_of(lambda: add_rows(places, weights, scales, norms, SCANS, correlations))
    scan = seconds / (SCANS * weights.size * STRIP)
    panels, _, _ = pack(torch.ones(STRIP, DIMENSIONS), torch.ones(STRIP))
    square = (STRIP, STRIP)
    seconds = _seconds_of(lambda: multiply(panels, 0, panels, 0, square, DIMENSIONS))
    product = seconds / (STRIP**2 * DIMENSIONS) / usual
    return Rates(min(product, 1.0), scan / usual)


def seconds_of_product(dim: int) -> float:
    """Measure one product of a float32 matrix product on one core, of as many rows as the solver multiplies."""
    rows = torch.ones(STRIP, dim)
    with full_precision():
        return _seconds_of(lambda: rows @ rows.T) / (STRIP**2 * dim)


def _seconds_of(work: Callable[[], object]) -> float:
    """Measure work on one core: the least time of eight, of which the first sets libraries up."""
    # In a thread of a pool, torch uses one core.
    (times,) = map_in_threads(lambda timed: timeit.repeat(timed, number=1, repeat=8), [work], 2)
    return min(times)
