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


@dataclass(frozen=True)
class Look:
    """What a screen says of the scores |⟨rᵦ, aₙ⟩| of B residuals: they differ from unitᵦ magnitudeᵦₙ by no more than

        rounding · unitᵦ magnitudeᵦₙ + (Σⱼ (reachᵦⱼ slackₙⱼ)ᵖ)^(1/p)

    Attributes:
        magnitudes: (B, G, GROUP), not negative, in a floating dtype; zero for the rows that fill up the last group.
        unit: float32 (B,).
        reach: float32 (B, 2).
        slack: float32 (2, G, GROUP).
        largest_slack: float32 (2, G), of each group.
        power: p. Errors add up (1), or, where they are independent of each other, their squares do (2).
        count: N.
    """

    magnitudes: Tensor
    unit: Tensor
    reach: Tensor
    slack: Tensor
    largest_slack: Tensor
    power: int
    count: int

    def candidates(self) -> tuple[Tensor, Tensor]:
        """All pairs of a residual (Q,) and an atom (Q,) that may have its highest score, in ascending order."""
        # Floating numbers that are not negative are in the order of their bits, and integers are compared faster.
        bits = torch.int16 if self.magnitudes.element_size() == 2 else torch.int32
        peaks = self.magnitudes.view(bits).amax(2).view(self.magnitudes.dtype)
        lowest, highest = self._bounds(
            self.unit[:, None], peaks, self.reach.T[:, :, None], self.largest_slack[:, None]
        )
        level = lowest.amax(1, keepdim=True)
        rows, groups = (highest >= level).nonzero(as_tuple=True)

        members = self.magnitudes.flatten(0, 1).index_select(0, rows * peaks.shape[1] + groups)
        slack = self.slack.index_select(1, groups)
        _, highest = self._bounds(self.unit[rows, None], members, self.reach[rows].T[:, :, None], slack)
        pair, member = (highest >= level[rows]).nonzero(as_tuple=True)
        rows, atoms = rows[pair], groups[pair] * GROUP + member
        real = atoms < self.count
        return rows[real], atoms[real]

    def _bounds(self, unit: Tensor, magnitudes: Tensor, reach: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the most that scores can be, for any shapes that broadcast; reach and slack are (2, …)."""
        parts = reach * slack
        error = parts.sum(0) if self.power == 1 else torch.hypot(*parts)
        # Half of the distance to the next number, and a little for the arithmetic here.
        scores, rounding = unit * magnitudes, 0.501 * torch.finfo(magnitudes.dtype).eps
        return scores * (1 - rounding) - error, scores * (1 + rounding) + error


class Screen(ABC):
    """Atoms (N, d), and a rounded copy of them that is faster to multiply with."""

    power = 1
    slack: Tensor
    largest_slack: Tensor

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
        self.slack = self._fill(torch.stack([self.norms, loss], dim=1)).T.unflatten(1, (-1, GROUP)).contiguous()
        self.largest_slack = self.slack.amax(2)

    def _seen(self, scores: Tensor, unit: Tensor, reach: list[Tensor]) -> Look:
        """Scores (B, N) rounded to their dtype, in units (B,)."""
        magnitudes = scores.abs_().unflatten(1, (-1, GROUP))
        reaches = torch.stack(reach, dim=1)
        return Look(magnitudes, unit, reaches, self.slack, self.largest_slack, self.power, len(self.atoms))


class FloatScreen(Screen):
    """Atoms rounded to a floating dtype.

    A score ⟨r, a⟩ is estimated as ⟨r̂, â⟩. By Cauchy and Schwarz it is off by at most ‖r - r̂‖ ‖a‖ + ‖r̂‖ ‖a - â‖, and
    all these norms are measured. Nothing is assumed of how the errors fall.
    """

    def __init__(self, atoms: Tensor, dtype: torch.dtype) -> None:
        super().__init__(atoms)
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
