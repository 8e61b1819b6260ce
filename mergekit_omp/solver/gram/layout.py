"""Define the memory layout of the Gram matrix: units, tiles and blocks. Imports without numba."""

UNIT = 32_000
"""The 16-bit integer that stands for a cosine of 1; rounding may exceed it a little."""

TILE = 512
"""Atoms that are scanned together: their correlations after several steps fit into the L1 cache."""

BLOCK = 1024
"""Rows and columns of the matrix that are computed together."""


def padded(atoms: int) -> int:
    """Return P, the number of atoms rounded up to whole tiles."""
    return -(-atoms // TILE) * TILE
