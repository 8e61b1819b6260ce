"""All inner products of atoms, and what they tell about a residual that is a combination of atoms.

A residual after t steps is r₀ - Σ cₛ aₛ over the support, so its scores with all atoms are those of r₀ less Σ cₛ Gₛ
with the rows of the Gram matrix G = A Aᵀ (Rubinstein, Zibulevsky & Elad, "Efficient implementation of the K-SVD
algorithm using Batch Orthogonal Matching Pursuit", 2008). That costs t N instead of d N, and many steps make one
matrix product.

Letters in shapes: B targets, N atoms, d dimensions, R steps, s support slots, M pool.
"""

import torch
from torch import Tensor

from mergekit_omp.solver.screen import Screen

BLOCK = 4096
"""Atoms of one block while the matrix is built."""

DIRECTIONS = 8
"""Strong directions that are kept apart."""


class Gram:
    """Inner products of atoms in the screen's dtype: a table (N + p, N).

    Embeddings share a few strong directions; inner products along those are large, and so are their rounding errors.
    They are kept apart: with p orthonormal directions M (p, d), row i < N of the table is ⟨a'ᵢ, a'ₙ⟩ of the atoms less
    their part in the span of M, and row N + j is ⟨mⱼ, aₙ⟩.

    Attributes:
        directions: float32 (p, d), M.
        shares: float32 (N, p), ⟨aₙ, mⱼ⟩.
        low: (N, d), the a'ₙ in the screen's dtype.
        loss: what rounding the a'ₙ changes, at most, relative to the norm of aₙ.
    """

    def __init__(self, screen: Screen) -> None:
        atoms, dtype = screen.atoms, screen.low.dtype
        self.directions = _strong_directions(atoms)
        self.shares = atoms @ self.directions.T
        self.count = len(atoms)
        self.low = torch.empty_like(screen.low)
        self.loss = 0.0
        self.table = torch.empty(self.count + self.shares.shape[1], self.count, dtype=dtype, device=atoms.device)
        self.table[self.count :] = self.shares.T
        blocks = [slice(start, min(start + BLOCK, self.count)) for start in range(0, self.count, BLOCK)]
        for place, rows in enumerate(blocks):
            rest = atoms[rows] - self.shares[rows] @ self.directions
            self.low[rows] = rest.to(dtype)
            self.loss = max(self.loss, screen.relative(rest - self.low[rows].float(), rows))
            for columns in blocks[: place + 1]:
                product = self.low[rows] @ self.low[columns].T
                self.table[rows, columns] = product
                self.table[columns, rows] = product.T

    @staticmethod
    def bytes(count: int, itemsize: int) -> int:
        """Memory of the matrix for ``count`` atoms."""
        return count * (count + DIRECTIONS) * itemsize

    def entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        """⟨a'ᵢ, a'ₙ⟩ in float32, for index tensors ``rows`` and ``columns`` of one (broadcast) shape."""
        return self.table[rows, columns].float()

    def peaks(self, rows: Tensor, weights: Tensor, base: Tensor, scale: Tensor) -> Tensor:
        """maxₜ |scaleₜ base + Σₛ weightsₜₛ table[rowsₛ]| for every atom: (B, N).

        Args:
            rows: int64 (B, s), rows of the table.
            weights: (B, R, s) in the screen's dtype.
            base: (B, N) in the screen's dtype.
            scale: (B, R) in the screen's dtype.
        """
        peaks = torch.empty_like(base)
        slots = rows.shape[1]
        left = torch.cat([weights, scale[:, :, None]], dim=2)  # (B, R, s + 1)
        right = base.new_empty(slots + 1, self.count)
        for target, chosen in enumerate(rows):
            torch.index_select(self.table, 0, chosen, out=right[:slots])
            right[slots] = base[target]
            torch.amax((left[target] @ right).abs_(), dim=0, out=peaks[target])
        return peaks


def _strong_directions(atoms: Tensor) -> Tensor:
    """Orthonormal (p, d), near the leading right singular vectors of the atoms (N, d), by subspace iteration.

    They need not be exact: any orthonormal rows give a right table, better ones a more precise one.
    """
    seed = torch.Generator().manual_seed(0)
    count = min(DIRECTIONS, atoms.shape[1])
    start = torch.randn(atoms.shape[1], count, generator=seed).to(atoms.device)
    directions = torch.linalg.qr(start).Q
    for _ in range(4):
        directions = torch.linalg.qr(atoms.T @ (atoms @ directions)).Q
    return directions.T.contiguous()
