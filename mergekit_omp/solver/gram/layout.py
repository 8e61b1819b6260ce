"""Define the memory layout of the Gram matrix: its unit and its strips. Imports without numba.

The matrix is symmetric. A whole matrix is stored row by row. A half matrix is stored in strips of columns, each with
its rows one after the other, but only with the rows up to its own last column: all pairs of atoms are stored once.
"""

UNIT = 32_000
"""The 16-bit integer that stands for a cosine of 1; rounding may exceed it a little."""

MOST = 2**15 - 1
"""The largest 16-bit integer that numbers of rows and weights of a scan are rounded to."""

STRIP = 1024
"""Atoms that are scanned together, and rows and columns of the matrix that are computed together. The correlations of
a strip after several steps fit into the L1 cache, and the runs of a row are long enough for the memory."""

LINE = 32
"""Places of a line of the cache."""

GAP = LINE
"""Unused places after each row: rows that lie a multiple of 4,096 bytes apart would displace each other from the L1
cache."""

STEPS = 8
"""Steps of a draft whose correlations are computed together, at most."""


def padded(atoms: int) -> int:
    """Return P, the number of atoms rounded up to whole strips."""
    return -(-atoms // STRIP) * STRIP


def padded_steps(steps: int) -> int:
    """Return n, a number of steps rounded up to whole passes over the rows."""
    return -(-steps // STEPS) * STEPS


def padded_rows(atoms: int) -> int:
    """Return W, the rows that a scan adds up, rounded up to pairs: the target's cosines and those of its atoms."""
    return -(-(1 + atoms) // 2) * 2


def matrix_places(atoms: int, half: bool) -> tuple[list[int], int]:
    """Return the places where the strips begin and the last one ends, and how far rows of a strip lie apart."""
    width = padded(atoms)
    if not half:
        stride = width + GAP
        return [*range(0, width, STRIP), atoms * stride], stride
    stride, starts = STRIP + GAP, [0]
    for end in range(STRIP, width + 1, STRIP):
        starts.append(starts[-1] + end * stride)
    return starts, stride
