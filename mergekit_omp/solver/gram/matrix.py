"""Compute the cosines of all pairs of atoms; a correlation after t steps then costs t products instead of d.

Letters in shapes: B targets, N atoms, P atoms padded to whole strips, S strips, d dimensions.

Source: Rubinstein, Zibulevsky & Elad, "Efficient Implementation of the K-SVD Algorithm using Batch Orthogonal Matching
Pursuit" (2008). Here the matrix only selects the atoms to examine: see :mod:`mergekit_omp.solver.gram.search`.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from mergekit_omp.solver.gram.integers import NOT_PACKED, blocks_of, multiply, pack
from mergekit_omp.solver.gram.kernels import compiled, store_rows, store_square
from mergekit_omp.solver.gram.layout import LINE, STRIP, UNIT, matrix_places, padded
from mergekit_omp.solver.threads import map_in_threads
from mergekit_omp.solver.tolerances import ROUNDING

NEGLIGIBLE = 1e-30
"""Share of the largest norm below which an atom counts as zero."""

USUAL_EXPONENT = 40
"""Exponent of two that norms of usual rows do not exceed, in either direction."""


class Gram(NamedTuple):
    """Cosines of all pairs of atoms in 16-bit integers, as arrays for compiled code.

    Attributes:
        atoms: float32 (N, d).
        panels: int32 (C, n, CHUNK, PANEL), the atoms as integers; empty where products are in float32.
        scale: float32 (N,), the inverse norms of the rows of which products are made; 0 for negligible atoms.
        errors: float64 (N,), bound on the part of the errors of an atom's cosines that they share with a target's.
        rounding: the largest share of an atom's norm that changes where it is rounded to integers.
        largest_norm: largest norm of the atoms, the unit of norms and correlations.
        norms: float32 (P,), 0 for padding and negligible atoms.
        half: whether each pair of atoms is stored once.
        starts: int64 (S + 1,), the place in ``cosines`` where each strip begins, and the end.
        stride: places from a row of a strip to the next one.
        cosines: int16, all strips, in units of 1 / :data:`UNIT`. Those of padding have no meaning.
    """

    atoms: ndarray
    panels: ndarray
    scale: ndarray
    errors: ndarray
    rounding: float
    largest_norm: float
    norms: ndarray
    half: bool
    starts: ndarray
    stride: int
    cosines: ndarray

    def store_cosines(self, targets: Tensor, norms: Tensor, out: ndarray, rows: ndarray) -> ndarray:
        """Write the cosines of targets (B, d) of norms (B,) with all atoms to rows int64 (B,) of ``out`` int16 (T, P).

        What is there for padding is left. Returns the bounds on their errors, as those of :class:`Gram`.
        """
        in_integers, rounding = len(self.panels) > 0, np.zeros(len(targets))
        if in_integers:
            left, factors, rounding = pack(targets, norms)
        else:
            unit, factors = (targets / norms[:, None]).float(), np.ones(len(targets), np.float32)
        for start in range(0, len(self.atoms), STRIP):
            scale = self.scale[start : start + STRIP]
            if in_integers:
                product = multiply(left, 0, self.panels, start, (len(targets), len(scale)), targets.shape[1])
            else:
                product = (unit @ torch.from_numpy(self.atoms[start : start + STRIP]).T).numpy()
            store_rows(product, factors, scale, out, rows, start)
        return errors_of_cosines(rounding, targets.shape[1], in_integers=in_integers)


def errors_of_cosines(rounding: ndarray, dim: int, *, in_integers: bool) -> ndarray:
    """Bound the errors of the cosines of rows (n, dim), in their units.

    A cosine is a sum in float32, of products or of blocks of integers, and is rounded to a unit. ``rounding`` float64
    (n,) are the shares of the rows' norms that changed before. The cosines of a combination of rows are wrong by no
    more than the combination of these bounds, and by its norm times the rounding of the other row.
    """
    terms = blocks_of(dim) if in_integers else dim
    return 0.5 + UNIT * (rounding + (terms + 32) * (ROUNDING / 2))


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


def build_gram(atoms: Tensor, norms: Tensor, threads: int, *, half: bool, in_integers: bool = True) -> Gram:
    """Build the matrix of distinct atoms float32 (N, d) with norms (N,), on the CPU.

    Products are made in 16-bit integers if told, or in float32.
    """
    count, width = len(atoms), padded(len(atoms))
    tiny = torch.finfo(torch.float32).tiny  # smaller norms have an infinite inverse
    largest = max(norms.max().item(), tiny)
    known = norms > max(tiny, NEGLIGIBLE * largest)
    relative = torch.zeros(width)
    relative[:count] = (norms / largest) * known
    scale, rows, packed, rounding = torch.where(known, 1 / norms, 0.0).numpy(), atoms, NOT_PACKED, np.zeros(count)
    factors = scale
    if in_integers:
        packed, inverse, changes = pack(atoms, norms, threads)
        factors, rounding = (numbers * known.numpy() for numbers in (inverse, changes))
        scale = factors
    elif norms[known].log2().abs().gt(USUAL_EXPONENT).any():
        # Their products may be too small or too large for float32.
        rows, factors = atoms * torch.from_numpy(scale)[:, None], known.float().numpy()
    places, stride = matrix_places(count, half)
    starts, cosines = np.array(places), empty_places(places[-1])

    def fill_square(corner: tuple[int, int]) -> None:
        row, column = corner
        if in_integers:
            shape = min(STRIP, count - row), min(STRIP, count - column)
            product = multiply(packed, row, packed, column, shape, atoms.shape[1])
        else:
            product = (rows[row : row + STRIP] @ rows[column : column + STRIP].T).numpy()
        store_square(product, factors, row, column // STRIP, cosines, starts, stride, half)

    firsts = range(0, count, STRIP)
    map_in_threads(fill_square, [(row, column) for row in firsts for column in firsts if row <= column], threads)
    return Gram(
        atoms=atoms.contiguous().numpy(),
        panels=packed,
        scale=scale,
        errors=errors_of_cosines(rounding, atoms.shape[1], in_integers=in_integers),
        rounding=float(rounding.max()),
        largest_norm=largest,
        norms=relative.numpy(),
        half=half,
        starts=starts,
        stride=stride,
        cosines=cosines,
    )
