"""Go through large arrays some rows at a time.

On a CPU an array beyond some 32 MB is asked from the system anew each time, which costs more than computing it.
"""

from collections.abc import Iterator

from torch import Tensor

_ELEMENTS = {"cpu": 2**22}
_ELEMENTS_ELSEWHERE = 2**27


def row_chunks(array: Tensor) -> Iterator[slice]:
    """Yield slices that cover the rows of an array (N, M)."""
    step = max(1, _ELEMENTS.get(array.device.type, _ELEMENTS_ELSEWHERE) // array.shape[1])
    for start in range(0, array.shape[0], step):
        yield slice(start, start + step)
