"""Measure the solver's own products on this CPU, in units of the time of one product of a float32 matrix product."""

from functools import cache

import numpy as np
import torch

from mergekit_omp.solver.gram.bfloat16 import is_supported, multiply, pack
from mergekit_omp.solver.gram.layout import GAP, STEPS, STRIP
from mergekit_omp.solver.gram.verify import add_rows
from mergekit_omp.solver.precision import full_precision, seconds_of

WORTHWHILE = 0.8
"""Time of a product in bfloat16 above which it is made in float32."""

DIMENSIONS = 640
"""Dimensions of the matrix products that are timed."""

ROWS, SCANS = 64, 16
"""Rows of the scans that are timed, and the number of scans."""


@cache
def measure_rates() -> tuple[float, float]:
    """Time small products on one core.

    Returns:
        The time of a product of two rows that bfloat16 holds, 1 where products in bfloat16 are not worth using; and
        that of a cosine and a weight in a scan of rows in the cache.
    """
    rows, products = torch.ones(STRIP, DIMENSIONS), STRIP**2 * DIMENSIONS
    cosines, places = np.ones((ROWS, STRIP + GAP), np.int16), np.empty(ROWS, np.int64)
    places[:] = cosines.ctypes.data + cosines.strides[0] * np.arange(ROWS)
    weights, sums = np.zeros((STEPS, ROWS), np.float32), np.empty((STEPS, STRIP), np.float32)
    with full_precision():
        usual = seconds_of(lambda: rows @ rows.T) / products
    scan = seconds_of(lambda: add_rows(places, weights, cosines[0], SCANS, sums)) / (SCANS * weights.size * STRIP)
    if not is_supported():
        return 1.0, scan / usual
    packed = pack(rows, torch.ones(STRIP))
    bfloat16 = seconds_of(lambda: multiply(packed, packed, STRIP, STRIP)) / products / usual
    return bfloat16 if bfloat16 < WORTHWHILE else 1.0, scan / usual
