"""The pursuit of a batch of targets: supports, orthonormal bases and residuals, extended one atom at a time.

Letters in shapes: B targets, N atoms, d dimensions, k sparsity, Q pairs of a target and an atom.
"""

from copy import copy

import torch
from torch import Tensor

from mergekit_omp.solver.scan.projection import take

ROUNDING = torch.finfo(torch.float32).eps
"""Relative spacing of float32 numbers."""

ZERO = 8 * ROUNDING
"""A residual or a score of this share of the target's norm is rounding."""


class Pursuit:
    """State of B targets in float32, all after the same number of steps.

    Attributes:
        support: int64 (B, k), atoms in the order of selection, -1 where there is none yet.
        size: steps that were taken.
        residual: (B, d), the target less its projection on the span of its support.
        basis: (B, k, d), orthonormal rows that span the support; the first ``size`` count.
        done: bool (B,), nothing is left to select. Such a target is not to be extended.
    """

    def __init__(self, targets: Tensor, atoms: Tensor, atom_norms: Tensor, k: int) -> None:
        count, dim = targets.shape
        self.targets, self.atoms, self.atom_norms, self.k = targets, atoms, atom_norms, k
        self.norm = targets.norm(dim=1)
        self.support = torch.full((count, k), -1, dtype=torch.int64, device=targets.device)
        self.size = 0
        self.residual = targets.clone()
        self.basis = targets.new_empty(count, k, dim)
        self.done = self.norm == 0
        # Square of the rounding error in the residual, in units of ROUNDING.
        self._blur = self.norm**2

    def view(self, rows: Tensor | slice) -> "Pursuit":
        """The state of some targets only: a copy for a mask, and the same memory for a slice."""
        part = copy(self)
        for field, value in vars(self).items():
            if isinstance(value, Tensor) and not field.startswith("atom"):
                setattr(part, field, value[rows])
        return part

    def noise(self) -> Tensor:
        """(B,): rounding error of a score with an atom of norm 1, on the safe side."""
        return 8 * ROUNDING * self._blur.sqrt()

    def extend(self, choice: Tensor, score: Tensor) -> None:
        """Add the atom ``choice`` (B,), of ``score`` (B,), to each target.

        Where it is orthogonal to the residual, or in the support's span already, nothing is left that helps: the
        target is done.
        """
        whole = self.atom_norms[choice]
        wanted = score > ZERO * self.norm * whole
        length, weight = take(self.atoms, choice, whole, wanted, self.basis, self.size, self.residual)
        go = length > 0
        self.support[:, self.size] = choice.where(go, self.support[:, self.size])
        self._blur += (weight * whole / length).where(go, torch.zeros_like(length)) ** 2
        self.size += 1
        self.done = ~go | (self.size >= self.k) | (self.residual.norm(dim=1) <= ZERO * self.norm)
