"""The pursuit of a batch of targets: supports, orthonormal bases and residuals, extended one atom at a time.

Letters in shapes: B targets, N atoms, d dimensions, k sparsity, m candidates, s support size.
"""

from copy import copy

import torch
from torch import Tensor

from mergekit_omp.solver.refit import least_squares

ROUNDING = torch.finfo(torch.float32).eps
"""Relative spacing of float32 numbers."""

ZERO = 8 * ROUNDING
"""A residual or a score of this share of the target's norm is rounding."""

DEPENDENT = 1e-5
"""An atom of which only this share lies outside the support's span is in that span."""

CANCELLED = 0.2
"""Where less than this share of an atom is left after Gram-Schmidt, it is repeated."""

TIE = 1e-12
"""Scores in float64 that differ by less than this share of the larger are equal; the lowest index is taken."""


class Pursuit:
    """State of B targets in float32. Every target has its own support size, so a batch may be ragged.

    Attributes:
        support: int64 (B, k), atoms in the order of selection, -1 where there is none yet.
        size: int64 (B,), the number of atoms selected.
        residual: (B, d), the target less its projection on the span of its support.
        basis: (B, k, d), orthonormal rows that span the support; zero rows beyond ``size``.
        path: (B, k + 1, k), least-squares coefficients after 0, 1, … ``size`` steps.
        done: bool (B,), nothing is left to select.
    """

    def __init__(self, targets: Tensor, atoms: Tensor, atom_norms: Tensor, k: int) -> None:
        count, dim = targets.shape
        new = targets.new_zeros
        self.targets, self.atoms, self.atom_norms, self.k = targets, atoms, atom_norms, k
        self.norm = targets.norm(dim=1)
        self.support = torch.full((count, k), -1, dtype=torch.int64, device=targets.device)
        self.size = torch.zeros(count, dtype=torch.int64, device=targets.device)
        self.residual = targets.clone()
        self.basis = new(count, k, dim)
        self.path = new(count, k + 1, k)
        self.done = self.norm == 0
        # Columns of R⁻¹, where the support's atoms are R-combinations of the basis.
        self._inverse = new(count, k, k)
        # Square of the rounding error in the residual, in units of ROUNDING, after each step.
        self._blur = new(count, k + 1) + self.norm[:, None] ** 2

    def view(self, rows: Tensor) -> "Pursuit":
        """A copy with these targets only (indices or mask)."""
        part = copy(self)
        for field, value in vars(self).items():
            if isinstance(value, Tensor) and not field.startswith("atom"):
                setattr(part, field, value[rows])
        return part

    def noise(self) -> Tensor:
        """(B,): rounding error of a score with an atom of norm 1, on the safe side."""
        here = torch.arange(len(self.size), device=self.size.device)
        return 8 * ROUNDING * self._blur[here, self.size].sqrt()

    def extend(self, choice: Tensor, go: Tensor) -> Tensor:
        """Add the atom ``choice`` (B,) to the targets where ``go`` (B,) holds; says where it was independent."""
        here = torch.arange(len(choice), device=choice.device)
        width = int(self.size.max())
        rest, shadow = self._orthogonalise(choice, width)
        length, whole = rest.norm(dim=1), self.atom_norms[choice]
        go = go & ~self.done & (length > DEPENDENT * whole)
        at, slot = here[go], self.size[go]

        share = 1 / length[go]
        direction = rest[go] * share[:, None]
        weight = (direction * self.residual[go]).sum(1)
        column = torch.zeros_like(self.path[:, 0])
        column[:, :width] = -torch.bmm(self._inverse[:, :width, :width], shadow[:, :, None]).squeeze(2)
        column = column[go]
        column[torch.arange(len(at), device=at.device), slot] = 1
        column *= share[:, None]

        self.support[at, slot] = choice[go]
        self.basis[at, slot] = direction
        self._inverse[at, :, slot] = column
        self.path[at, slot + 1] = self.path[at, slot] + weight[:, None] * column
        self._blur[at, slot + 1] = self._blur[at, slot] + (weight * whole[go] * share) ** 2
        self.residual[at] -= weight[:, None] * direction
        self.size[at] += 1
        self._finish()
        return go

    def _orthogonalise(self, choice: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The part (B, d) of each atom outside its target's basis, and its coordinates (B, width) in the basis."""
        atom, seen = self.atoms[choice], self.basis[:, :width]
        shadow = torch.bmm(seen, atom[:, :, None])
        rest = atom - torch.bmm(shadow.transpose(1, 2), seen).squeeze(1)
        # Gram-Schmidt loses digits where most of the atom cancels; a second pass there is enough (Kahan, Parlett).
        cancelled = (rest.norm(dim=1) < CANCELLED * self.atom_norms[choice]).nonzero().flatten()
        if len(cancelled):
            seen = seen[cancelled]
            again = torch.bmm(seen, rest[cancelled, :, None])
            rest[cancelled] -= torch.bmm(again.transpose(1, 2), seen).squeeze(1)
            shadow[cancelled] += again
        return rest, shadow.squeeze(2)

    def rewind(self, rows: Tensor, size: Tensor, residual: Tensor) -> None:
        """Take back steps of the targets ``rows`` (R,): to ``size`` (R,), where they had ``residual`` (R, d)."""
        gone = torch.arange(self.k, device=size.device) >= size[:, None]  # (R, k)
        self.size[rows] = size
        self.residual[rows] = residual
        self.support[rows] = self.support[rows].masked_fill(gone, -1)
        self.basis[rows] = self.basis[rows].masked_fill(gone[:, :, None], 0)
        self._inverse[rows] = self._inverse[rows].masked_fill(gone[:, None, :], 0)
        self.done[rows] = False
        self._finish()

    def _finish(self) -> None:
        self.done |= (self.size >= self.k) | (self.residual.norm(dim=1) <= ZERO * self.norm)


def decide(pursuit: Pursuit, candidates: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The best candidate of each target, as float64 arithmetic would choose it.

    Args:
        pursuit: the state in which the choice is made.
        candidates: int64 (B, m), atoms that may be the best; -1 for none.
        scores: (B, m), |⟨residual, atom⟩| in float32.

    Returns:
        The atom int64 (B,), and its score (B,).
    """
    norms = pursuit.atom_norms[candidates.clamp(min=0)]
    scores = scores.masked_fill(candidates < 0, -1)
    best, at = scores.max(dim=1)
    choice = candidates.gather(1, at[:, None]).squeeze(1)
    margin = pursuit.noise()[:, None] * norms
    rivals = (scores + margin >= (best - margin.gather(1, at[:, None]).squeeze(1))[:, None]) & (candidates >= 0)
    rows = ((rivals.sum(1) > 1) & ~pursuit.done).nonzero().flatten()
    if len(rows):
        choice[rows] = _settle(pursuit, rows, candidates[rows].masked_fill(~rivals[rows], -1))
    return choice, best


def _settle(pursuit: Pursuit, rows: Tensor, candidates: Tensor) -> Tensor:
    """Choose in float64 among candidates (R, m) that float32 cannot tell apart."""
    candidates = candidates.sort(dim=1, descending=True).values
    candidates = candidates[:, : int((candidates >= 0).sum(1).max())]
    _, residual = least_squares(pursuit.targets[rows], pursuit.atoms, pursuit.support[rows])
    atoms = pursuit.atoms[candidates.clamp(min=0)].double()
    scores = torch.bmm(atoms, residual[:, :, None]).squeeze(2).abs().masked_fill(candidates < 0, -1)
    tied = scores >= scores.max(dim=1, keepdim=True).values * (1 - TIE)
    return candidates.masked_fill(~tied, len(pursuit.atoms)).min(dim=1).values
