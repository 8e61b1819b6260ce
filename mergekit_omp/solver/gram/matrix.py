"""The inner products of all atoms with each other, with which a score takes t products after t steps instead of d.

Letters in shapes: B targets, N atoms, P atoms and what fills them up to whole tiles, d dimensions, k sparsity.

Source: Rubinstein, Zibulevsky & Elad, "Efficient Implementation of the K-SVD Algorithm using Batch Orthogonal Matching
Pursuit" (2008). Here the matrix only tells which atoms to look at: see :mod:`mergekit_omp.solver.gram.search`.
"""

import logging
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mergekit_omp.solver.threads import in_lanes

LOG = logging.getLogger(__name__)

TILE = 512
"""Atoms that are looked at together: their scores after several steps stay in a core's first cache."""

UNIT = 32_000
"""What a cosine of 1 is stored as; rounding may exceed it a little."""

BLOCK = 1024
"""Rows and columns of the matrix that are computed at a time."""

NO_ATOM = 1e30
"""The reach of what is no atom, or zero: a score that none has."""

BUILD_COST, STEP_COST = 1.0, 1.5
"""Multiplications by the matrix cost more than those of a plain product, as measured: of its N² d, and of the N k²
that a target takes."""

WORTH = 2**39
"""Multiplications to save that a matrix is built for: some seconds, which compiling takes on first use."""


class Gram:
    """Cosines of all pairs of atoms in 16-bit integers.

    Attributes:
        atoms: float32 (N, d).
        norms: float32 (P,), of the atoms, in units of the largest; 0 where there is no atom, or next to none.
        reach: float32 (P,), 1 / norms; :data:`NO_ATOM` where they are 0.
        largest: the largest norm.
        cosines: int16 (N, P), in units of 1 / :data:`UNIT`.
    """

    def __init__(self, atoms: Tensor, lanes: int) -> None:
        from mergekit_omp.solver.gram.search import store

        self.atoms = atoms
        norms = atoms.norm(dim=1)
        self.largest = max(norms.max().item(), torch.finfo(torch.float32).tiny)
        known = norms > self.largest / NO_ATOM
        width = padded(len(atoms))
        self.norms = torch.zeros(width)
        self.norms[: len(atoms)] = (norms / self.largest) * known
        self.reach = (1 / self.norms).clamp(max=NO_ATOM)
        # numpy asks for large pages, of which the rows that are read together are on fewer.
        self.cosines = np.empty((len(atoms), width), np.int16)
        self.cosines[:, len(atoms) :] = 0
        self._scale = (1 / norms).where(known, torch.zeros_like(norms))

        def fill(corner: tuple[int, int]) -> None:
            row, column = corner
            store((self._unit(row) @ self._unit(column).T).mul_(UNIT).numpy(), row, column, self.cosines)

        starts = range(0, len(atoms), BLOCK)
        in_lanes(fill, [(row, column) for row in starts for column in starts if row <= column], lanes)

    def inner(self, targets: Tensor) -> Tensor:
        """Cosines float32 (B, P) of targets (B, d) of norm 1 with all atoms; 0 where there is none."""
        cosines = targets.new_zeros(len(targets), self.cosines.shape[1])
        for start in range(0, len(self.atoms), BLOCK):
            part = slice(start, min(start + BLOCK, len(self.atoms)))
            torch.mul(targets @ self.atoms[part].T, self._scale[part], out=cosines[:, part])
        return cosines

    def _unit(self, start: int) -> Tensor:
        part = slice(start, start + BLOCK)
        return self.atoms[part] * self._scale[part, None]


def padded(atoms: int) -> int:
    """P of N atoms: whole tiles."""
    return -(-atoms // TILE) * TILE


def cost(targets: int, atoms: int, dim: int, k: int) -> float:
    """Time to build a matrix of N atoms and use it for B targets, in multiplications of a plain float32 product."""
    return BUILD_COST * atoms**2 * dim + targets * atoms * (dim + STEP_COST * k**2)


@cache
def is_supported() -> bool:
    """Whether numba is there, and may keep what it compiles: it is not needed for a right answer."""
    try:
        import mergekit_omp.solver.gram.search  # noqa: F401
    except ImportError as error:  # there is no numba for each Python
        LOG.warning("Solves take several times as long without numba: %s", error)
        return False
    except RuntimeError as error:  # neither the package's folder nor the user's cache can be written to
        LOG.warning("Solves take several times as long: set NUMBA_CACHE_DIR to a folder for numba's cache. %s", error)
        return False
    return True
