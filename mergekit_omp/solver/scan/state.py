"""Hold the state of a pursuit: supports, orthonormal bases and residuals, extended by one atom at a time.

Letters in shapes: B targets, N atoms, d dimensions, k sparsity.
"""

from copy import copy

import torch
from torch import Tensor

from mergekit_omp.solver.scan.projection import orthogonalize
from mergekit_omp.solver.tolerances import ROUNDING, ZERO

PER_TARGET = ("targets", "norm", "support", "residual", "residual_norm", "basis", "done", "_squared_error")


class PursuitState:
    """State of B targets in float32 after a common number of steps.

    Attributes:
        support: int64 (B, k), atoms in the order of selection, -1 in unused slots.
        size: number of steps so far.
        residual: (B, d), the target minus its projection on the span of its support.
        residual_norm: (B,).
        basis: (B, k, d), orthonormal rows that span the support; only the first ``size`` are valid.
        done: bool (B,), whether the pursuit of the target has ended; such a target must not be extended.
    """

    def __init__(self, targets: Tensor, atoms: Tensor, atom_norms: Tensor, k: int) -> None:
        count, dim = targets.shape
        self.targets, self.atoms, self.atom_norms, self.k = targets, atoms, atom_norms, k
        self.norm = self.residual_norm = targets.norm(dim=1)
        self.support = torch.full((count, k), -1, dtype=torch.int64, device=targets.device)
        self.size = 0
        self.residual = targets.clone()
        self.basis = targets.new_empty(count, k, dim)
        self.done = self.norm == 0
        self._squared_error = self.norm**2  # rounding error of the residual in units of ROUNDING

    def view(self, rows: Tensor | slice) -> "PursuitState":
        """Return the state of selected targets: a copy for a mask, a view for a slice."""
        part = copy(self)
        for name in PER_TARGET:
            setattr(part, name, getattr(self, name)[rows])
        return part

    def noise(self) -> Tensor:
        """Bound the rounding error (B,) of the correlation with an atom of norm 1."""
        return 8 * ROUNDING * self._squared_error.sqrt()

    def extend(self, choice: Tensor, correlation: Tensor) -> None:
        """Add the atom ``choice`` (B,), with ``correlation`` (B,) with the residual, to each support.

        A target is done if the atom is orthogonal to the residual or lies in the span of the support: no other atom
        would reduce the residual.
        """
        atom_norm = self.atom_norms[choice]
        useful = correlation > ZERO * self.norm * atom_norm
        length, weight = orthogonalize(self.atoms, choice, atom_norm, useful, self.basis, self.size, self.residual)
        added = length > 0
        self.support[:, self.size] = choice.where(added, self.support[:, self.size])
        self._squared_error += (weight * atom_norm / length).where(added, torch.zeros_like(length)) ** 2
        self.size += 1
        self.residual_norm = self.residual.norm(dim=1)
        self.done = ~added | (self.size >= self.k) | (self.residual_norm <= ZERO * self.norm)
