"""Compute the cosines of all pairs of atoms; a correlation after t steps then costs t products instead of d.

Letters in shapes: B targets, N atoms, P atoms padded to whole tiles, d dimensions.

Source: Rubinstein, Zibulevsky & Elad, "Efficient Implementation of the K-SVD Algorithm using Batch Orthogonal Matching
Pursuit" (2008). Here the matrix only selects the atoms to examine: see :mod:`mergekit_omp.solver.gram.search`.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from mergekit_omp.solver.gram.kernels import store_symmetric
from mergekit_omp.solver.gram.layout import BLOCK, UNIT, padded
from mergekit_omp.solver.threads import map_in_threads

NO_ATOM = 1e30
"""Inverse norm of padding and zero atoms: the cosine that they would need for any correlation is out of reach."""


class Gram(NamedTuple):
    """Cosines of all pairs of atoms in 16-bit integers, as arrays for compiled code.

    Attributes:
        atoms: float32 (N, d).
        largest_norm: largest norm of the atoms, the unit of norms and correlations.
        norms: float32 (P,), 0 for padding and negligible atoms.
        inverse_norms: float32 (P,); :data:`NO_ATOM` where the norm is 0.
        cosines: int16 (N, P), in units of 1 / :data:`UNIT`.
    """

    atoms: ndarray
    largest_norm: float
    norms: ndarray
    inverse_norms: ndarray
    cosines: ndarray

    def cosines_with(self, targets: Tensor) -> Tensor:
        """Return the cosines float32 (B, P) of targets (B, d) of norm 1 with all atoms, 0 for padding."""
        count = len(self.atoms)
        atoms, norms = torch.from_numpy(self.atoms), torch.from_numpy(self.norms[:count])
        scale = (1 / (norms * self.largest_norm)).where(norms > 0, torch.zeros_like(norms))
        cosines = targets.new_zeros(len(targets), len(self.norms))
        for start in range(0, count, BLOCK):
            part = slice(start, min(start + BLOCK, count))
            torch.mul(targets @ atoms[part].T, scale[part], out=cosines[:, part])
        return cosines


def build_gram(atoms: Tensor, norms: Tensor, threads: int) -> Gram:
    """Build the matrix of distinct atoms float32 (N, d) with norms (N,), on the CPU."""
    count, width = len(atoms), padded(len(atoms))
    tiny = torch.finfo(torch.float32).tiny  # smaller norms have an infinite inverse
    largest = max(norms.max().item(), tiny)
    known = norms > max(tiny, largest / NO_ATOM)
    relative = torch.zeros(width)
    relative[:count] = (norms / largest) * known
    scale = (1 / norms).where(known, torch.zeros_like(norms))[:, None]
    # numpy requests huge pages, so that rows that are read together lie on fewer pages.
    cosines = np.empty((count, width), np.int16)
    cosines[:, count:] = 0

    def unit_rows(start: int) -> Tensor:
        return atoms[start : start + BLOCK] * scale[start : start + BLOCK]

    def fill_block(corner: tuple[int, int]) -> None:
        row, column = corner
        store_symmetric((unit_rows(row) @ unit_rows(column).T).mul_(UNIT).numpy(), row, column, cosines)

    starts = range(0, count, BLOCK)
    map_in_threads(fill_block, [(row, column) for row in starts for column in starts if row <= column], threads)
    inverse = (1 / relative).clamp(max=NO_ATOM)
    return Gram(atoms.contiguous().numpy(), largest, relative.numpy(), inverse.numpy(), cosines)
