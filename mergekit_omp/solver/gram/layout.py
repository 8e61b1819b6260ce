"""How the Gram matrix lies in memory: units, tiles and blocks. Needs no numba, unlike the rest of this package."""

UNIT = 32_000
"""The 16-bit integer that stands for a cosine of 1; rounding may exceed it a little."""

TILE = 512
"""Atoms that are scanned together: their correlations after several steps stay in a core's first cache."""

BLOCK = 1024
"""Rows and columns of the matrix that are computed at a time."""


def padded(atoms: int) -> int:
    """Return P, the number of columns for N atoms: whole tiles."""
    return -(-atoms // TILE) * TILE
