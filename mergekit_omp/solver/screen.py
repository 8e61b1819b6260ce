"""A cheap look at all atoms, with a bound on how wrong it can be.

Letters in shapes: B targets, N atoms, G groups of atoms, d dimensions, Q pairs.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_omp.solver.pursuit import ROUNDING

GROUP = 64
"""Atoms that are first looked at as one."""

TINY = 1e-37
"""Added to the squares of errors, so that none is rounded to zero."""


@dataclass(frozen=True)
class Look:
    """What a screen says of the scores |⟨rᵦ, aₙ⟩| of B residuals: they differ from unitᵦ magnitudeᵦₙ by no more than

        unitᵦ (rounding · magnitudeᵦₙ + errorᵦₙ)

    Attributes:
        magnitudes: (B, G, GROUP), not negative, in a floating dtype; zero for the rows that fill up the last group.
        errors: float32 (B, G), the same for all atoms of a group.
        unit: float32 (B,). Scores of one residual are compared in its own.
        count: N.
    """

    magnitudes: Tensor
    errors: Tensor
    unit: Tensor
    count: int

    @property
    def rounding(self) -> float:
        """Half of the distance to the next magnitude, relative to it, and a little for the arithmetic here."""
        return 0.501 * torch.finfo(self.magnitudes.dtype).eps

    def candidates(self) -> tuple[Tensor, Tensor]:
        """All pairs of a residual (Q,) and an atom (Q,) that may have its highest score, in ascending order."""
        # Floating numbers that are not negative are in the order of their bits, and integers are compared faster.
        bits = torch.int16 if self.magnitudes.element_size() == 2 else torch.int32
        peaks = self.magnitudes.view(bits).amax(2).view(self.magnitudes.dtype).float()
        needed = self.needed(peaks)
        rows, groups = (peaks >= needed).nonzero(as_tuple=True)
        members = self.magnitudes.flatten(0, 1).index_select(0, rows * peaks.shape[1] + groups)
        pair, member = (members >= needed[rows, groups, None]).nonzero(as_tuple=True)
        rows, atoms = rows[pair], groups[pair] * GROUP + member
        real = atoms < self.count
        return rows[real], atoms[real]

    def needed(self, peaks: Tensor) -> Tensor:
        """The magnitude (B, G) from which on an atom may have the highest score, given that of each group (B, G)."""
        level = torch.sub(peaks * (1 - self.rounding), self.errors).amax(1, keepdim=True)
        return (level - self.errors).div_(1 + self.rounding)


class Screen(ABC):
    """Atoms (N, d), and a rounded copy of them that is faster to multiply with."""

    power = 1
    """Errors add up (1), or, where they are independent of each other, their squares do (2)."""
    score_bytes: int
    """What one score of a :class:`Look` takes."""

    def __init__(self, atoms: Tensor) -> None:
        self.atoms = atoms
        self.norms = atoms.norm(dim=1)
        # What rounding takes from sums of d products in float32, relative to the norms.
        self.summing = (atoms.shape[1] + 16) * ROUNDING

    @abstractmethod
    def look(self, residuals: Tensor) -> Look:
        """Bounds of the scores of float32 residuals (B, d) with all atoms."""

    def _fill(self, rows: Tensor) -> Tensor:
        """Rows (N, …), and zeros up to whole groups."""
        missing = -len(rows) % GROUP
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows

    def _set_slack(self, loss: Tensor) -> None:
        """Of the atoms' norms and of ``loss`` (N,), which is in a unit that :meth:`look` chooses."""
        slack = self._fill(torch.stack([self.norms, loss], dim=1)).unflatten(0, (-1, GROUP)).amax(1)
        self._slack = (slack**self.power).T.contiguous()  # (2, G)

    def _seen(self, scores: Tensor, unit: Tensor, reach: list[Tensor]) -> Look:
        """Scores (B, N) in units (B,), off by (Σⱼ (reachᵦⱼ slackⱼₙ)ᵖ)^(1/p) beside the rounding to their dtype."""
        errors = torch.stack(reach, dim=1).pow_(self.power) @ self._slack
        if self.power == 2:
            errors.add_(TINY).sqrt_()
        return Look(scores.abs_().unflatten(1, (-1, GROUP)), errors, unit, len(self.atoms))


class FloatScreen(Screen):
    """Atoms rounded to a floating dtype.

    A score ⟨r, a⟩ is estimated as ⟨r̂, â⟩. By Cauchy and Schwarz it is off by at most ‖r - r̂‖ ‖a‖ + ‖r̂‖ ‖a - â‖, and
    all these norms are measured. Nothing is assumed of how the errors fall.
    """

    def __init__(self, atoms: Tensor, dtype: torch.dtype) -> None:
        super().__init__(atoms)
        self.score_bytes = dtype.itemsize
        self.low = self._fill(atoms).to(dtype)
        loss = torch.empty_like(self.norms)
        for start in range(0, len(atoms), 1024):
            part = slice(start, min(start + 1024, len(atoms)))
            loss[part] = (atoms[part] - self.low[part].float()).norm(dim=1)
        self._set_slack(loss)

    def look(self, residuals: Tensor) -> Look:
        """See :meth:`Screen.look`."""
        low = residuals.to(self.low.dtype)
        lost, norm = (residuals - low.float()).norm(dim=1), low.float().norm(dim=1)
        return self._seen(low @ self.low.T, torch.ones_like(norm), [lost + self.summing * norm, norm])
