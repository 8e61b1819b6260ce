"""Spare the system's memory management, which costs a training on a CPU more than some of its arithmetic.

By default the C library asks the system for every array above 32 MB anew, and the system clears its pages again each
time.
"""

import ctypes
import sys
from collections.abc import Iterator

from torch import Tensor

_ELEMENTS = {"cpu": 2**22}
_ELEMENTS_ELSEWHERE = 2**27

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Have the C library reuse what was freed, in this process from here on; without effect where it is not glibc."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def row_chunks(array: Tensor) -> Iterator[slice]:
    """Yield slices that cover the rows of an array (N, M), of at most 16 MiB in float32 on a CPU."""
    step = max(1, _ELEMENTS.get(array.device.type, _ELEMENTS_ELSEWHERE) // array.shape[1])
    for start in range(0, array.shape[0], step):
        yield slice(start, start + step)
