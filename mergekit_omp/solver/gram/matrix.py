"""Compute the cosines of all pairs of atoms; a correlation after t steps then costs t products instead of d.

Letters in shapes: B targets, N atoms, P atoms padded to whole strips, S strips, d dimensions.

Source: Rubinstein, Zibulevsky & Elad, "Efficient Implementation of the K-SVD Algorithm using Batch Orthogonal Matching
Pursuit" (2008). Here the matrix only selects the atoms to examine: see :mod:`mergekit_omp.solver.gram.search`.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from mergekit_omp.solver.gram.bfloat16 import NOT_PACKED, multiply, pack, panels
from mergekit_omp.solver.gram.kernels import compiled, store_rows, store_square
from mergekit_omp.solver.gram.layout import LINE, STRIP, matrix_places, padded
from mergekit_omp.solver.threads import map_in_threads

NEGLIGIBLE = 1e-30
"""Share of the largest norm below which an atom counts as zero."""

USUAL_EXPONENT = 40
"""Exponent of two that norms of usual rows do not exceed, in either direction."""


class Gram(NamedTuple):
    """Cosines of all pairs of atoms in 16-bit integers, as arrays for compiled code.

    Attributes:
        atoms: float32 (N, d).
        packed: int32 (n, q, PANEL), the atoms times powers of two, in n panels for products of bfloat16; empty where
            products are in float32.
        scale: float32 (N,), the inverse norms of the rows of which products are made; 0 for negligible atoms.
        largest_norm: largest norm of the atoms, the unit of norms and correlations.
        norms: float32 (P,), 0 for padding and negligible atoms.
        half: whether each pair of atoms is stored once.
        starts: int64 (S + 1,), the place in ``cosines`` where each strip begins, and the end.
        stride: places from a row of a strip to the next one.
        cosines: int16, all strips, in units of 1 / :data:`UNIT`. Those of padding have no meaning.
    """

    atoms: ndarray
    packed: ndarray
    scale: ndarray
    largest_norm: float
    norms: ndarray
    half: bool
    starts: ndarray
    stride: int
    cosines: ndarray

    def store_cosines(self, targets: Tensor, norms: Tensor, out: ndarray, rows: ndarray) -> None:
        """Write the cosines of targets (B, d) of norms (B,) with all atoms to rows int64 (B,) of ``out`` int16 (T, P).

        What is there for padding is left.
        """
        power, rest = _powers_of_two(norms)
        factors = rest.float().numpy()
        in_bfloat16 = len(self.packed) > 0
        left: Any = pack(targets, power) if in_bfloat16 else (targets * power[:, None]).float()
        for start in range(0, len(self.atoms), STRIP):
            scale = self.scale[start : start + STRIP]
            if in_bfloat16:
                product = multiply(left, panels(self.packed, start), len(targets), len(scale))
            else:
                product = (left @ torch.from_numpy(self.atoms[start : start + STRIP]).T).numpy()
            store_rows(product, factors, scale, out, rows, start)


def _powers_of_two(norms: Tensor) -> tuple[Tensor, Tensor]:
    """Split the inverse of norms (B,) into a power of two and the rest, from 1 to 2; that of 0 is infinite."""
    most = math.frexp(torch.finfo(norms.dtype).max)[1] - 2
    exponents = torch.frexp(norms)[1].clamp(-most, most)
    powers = torch.from_numpy(np.ldexp(1.0, -exponents.numpy())).to(norms)
    return powers, 1 / (norms * powers)


@compiled
def place_of(gram: Gram, one: int, other: int) -> int:
    """Return the place of the cosine of two atoms."""
    row, column = (min(one, other), max(one, other)) if gram.half else (one, other)
    return gram.starts[column // STRIP] + row * gram.stride + column % STRIP


@compiled
def cosine(gram: Gram, one: int, other: int) -> int:
    """Return the cosine of two atoms, in units of 1 / UNIT."""
    return gram.cosines[place_of(gram, one, other)]


def empty_places(count: int) -> ndarray:
    """Allocate int16 (count,) for rows of cosines, from the beginning of a line of the cache on.

    numpy requests huge pages, so that rows that are read together lie on fewer pages.
    """
    room = np.empty(count + LINE, np.int16)
    first = -room.ctypes.data % (2 * LINE) // 2
    return room[first : first + count]


def build_gram(atoms: Tensor, norms: Tensor, threads: int, *, half: bool, bfloat16: bool = False) -> Gram:
    """Build the matrix of distinct atoms float32 (N, d) with norms (N,), on the CPU.

    Products are made in bfloat16 if told that it holds the atoms and all targets. Products of rows with unusual norms
    may be too small or too large for float32. Such rows are multiplied by powers of two before, which changes no
    digits, and their products by the rest.
    """
    count, width = len(atoms), padded(len(atoms))
    tiny = torch.finfo(torch.float32).tiny  # smaller norms have an infinite inverse
    largest = max(norms.max().item(), tiny)
    known = norms > max(tiny, NEGLIGIBLE * largest)
    relative = torch.zeros(width)
    relative[:count] = (norms / largest) * known
    power, rest = _powers_of_two(norms)
    packed = pack(atoms, power) if bfloat16 else NOT_PACKED
    scale = torch.where(known, rest if bfloat16 else 1 / norms, 0.0).numpy()
    rows, factors = atoms, scale
    if not bfloat16 and norms[known].log2().abs().gt(USUAL_EXPONENT).any():
        rows, factors = atoms * power[:, None], torch.where(known, rest, 0.0).numpy()
    places, stride = matrix_places(count, half)
    starts, cosines = np.array(places), empty_places(places[-1])

    def fill_square(corner: tuple[int, int]) -> None:
        row, column = corner
        if bfloat16:
            left, right = panels(packed, row), panels(packed, column)
            product = multiply(left, right, min(STRIP, count - row), min(STRIP, count - column))
        else:
            product = (rows[row : row + STRIP] @ rows[column : column + STRIP].T).numpy()
        store_square(product, factors, row, column // STRIP, cosines, starts, stride, half)

    firsts = range(0, count, STRIP)
    map_in_threads(fill_square, [(row, column) for row in firsts for column in firsts if row <= column], threads)
    return Gram(
        atoms=atoms.contiguous().numpy(),
        packed=packed,
        scale=scale,
        largest_norm=largest,
        norms=relative.numpy(),
        half=half,
        starts=starts,
        stride=stride,
        cosines=cosines,
    )
