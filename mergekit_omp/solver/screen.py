"""A cheap look at all atoms, with a bound on how wrong it can be.

Letters in shapes: B targets, N atoms, G groups of atoms, d dimensions, Q pairs.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_omp.solver.pursuit import ROUNDING

GROUP = 64
"""Atoms that are first looked at as one."""

TINY = 1e-37
"""Added to the squares of errors, so that none is rounded to zero; and a length that none is."""

LENGTH = 128.0
"""Of the rows that are rounded: in float16, scores of such rows are finite, and next to no coordinate is lost."""


@dataclass(frozen=True)
class Look:
    """What a screen says of the scores |⟨rᵦ, aₙ⟩| of B residuals: they differ from unitᵦ magnitudeᵦₙ by no more than

        unitᵦ (rounding · magnitudeᵦₙ + errorᵦₙ)

    Attributes:
        magnitudes: (B, GROUP, G), not negative, in a floating dtype; zero where there is no atom.
        errors: float32 (B, G), the same for all atoms of a group.
        unit: float32 (B,). Scores of one residual are compared in its own.
        order: int64 (GROUP, G), which atom stands where; -1 for none.
    """

    magnitudes: Tensor
    errors: Tensor
    unit: Tensor
    order: Tensor

    @property
    def rounding(self) -> float:
        """Half of the distance to the next magnitude, relative to it, and a little for the arithmetic here."""
        return 0.501 * torch.finfo(self.magnitudes.dtype).eps

    def candidates(self) -> tuple[Tensor, Tensor]:
        """All pairs of a residual (Q,) and an atom (Q,) that may have its highest score, residual by residual."""
        peaks = self._peaks()
        needed = self.needed(peaks)
        rows, groups = (peaks >= needed).nonzero(as_tuple=True)
        pair, member = (self.magnitudes[rows, :, groups] >= needed[rows, groups, None]).nonzero(as_tuple=True)
        rows, atoms = rows[pair], self.order[member, groups[pair]]
        real = atoms >= 0
        return rows[real], atoms[real]

    def highest(self, count: int) -> tuple[Tensor, Tensor]:
        """The atoms of the highest scores, and what none of the others exceeds, as far as magnitudes tell.

        Args:
            count: M, at most as many as there are places.

        Returns:
            The atoms int64 (B, M), -1 for none, and the score float32 (B,).
        """
        # They all stand in the groups of the M highest peaks.
        groups = self._peaks().topk(min(count, self.order.shape[1]), dim=1).indices
        members = self.magnitudes[torch.arange(len(groups), device=groups.device)[:, None], :, groups]
        highest, places = members.flatten(1).topk(count, dim=1)
        atoms = self.order[places % GROUP, groups.gather(1, places // GROUP)]
        return atoms, highest[:, -1].float() * self.unit

    def _peaks(self) -> Tensor:
        """The highest magnitude float32 (B, G) of each group."""
        # Floating numbers that are not negative are in the order of their bits, and integers are compared faster.
        bits = torch.int16 if self.magnitudes.element_size() == 2 else torch.int32
        return self.magnitudes.view(bits).amax(1).view(self.magnitudes.dtype).float()

    def needed(self, peaks: Tensor) -> Tensor:
        """The magnitude (B, G) from which on an atom may have the highest score, given that of each group (B, G)."""
        level = (peaks * (1 - self.rounding) - self.errors).amax(1, keepdim=True)
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
        # Groups of about the same norm: their bounds are as tight as those of each atom.
        order = self.norms.argsort(stable=True)
        empty = order.new_full((-len(order) % GROUP,), -1)
        self.order = torch.cat([order, empty]).view(-1, GROUP).T.contiguous()
        # What rounding takes from sums of d products in float32, relative to the norms.
        self.summing = (atoms.shape[1] + 16) * ROUNDING

    @abstractmethod
    def look(self, residuals: Tensor) -> Look:
        """Bounds of the scores of float32 residuals (B, d) with all atoms."""

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Some places at a time, and the atoms (n, d) that stand there; zeros for none."""
        for start in range(0, self.order.numel(), 1024):
            places = slice(start, start + 1024)
            atoms = self.order.flatten()[places]
            yield places, self.atoms[atoms] * (atoms >= 0)[:, None]

    def _set_slack(self, norms: Tensor, loss: Tensor) -> None:
        """Of the norms of atoms (N,), and of ``loss``, one for each place, in units that :meth:`look` chooses."""
        slack = torch.stack([norms[self.order].amax(0), loss.view_as(self.order).amax(0)])
        self._slack = slack**self.power  # (2, G)

    def _seen(self, scores: Tensor, unit: Tensor, reach: list[Tensor]) -> Look:
        """Scores (B, N) in units (B,), off by (Σⱼ (reachᵦⱼ slackⱼₙ)ᵖ)^(1/p) beside the rounding to their dtype."""
        errors = torch.stack(reach, dim=1).pow_(self.power) @ self._slack
        if self.power == 2:
            errors.add_(TINY).sqrt_()
        return Look(scores.abs_().unflatten(1, self.order.shape), errors, unit, self.order)


class FloatScreen(Screen):
    """Atoms rounded to a floating dtype.

    A score ⟨r, a⟩ is estimated as ⟨r̂, â⟩. By Cauchy and Schwarz it is off by at most ‖r - r̂‖ ‖a‖ + ‖r̂‖ ‖a - â‖, and
    all these norms are measured. Nothing is assumed of how the errors fall. All rows are brought to lengths with which
    neither they nor the scores leave the range of float16.
    """

    def __init__(self, atoms: Tensor, dtype: torch.dtype) -> None:
        super().__init__(atoms)
        self.score_bytes = dtype.itemsize
        # A power of two, with which rows that were bfloat16 in the checkpoint are rounded by none of the dtypes.
        longest = self.norms.max().clamp(TINY, 1 / TINY).item()
        self._scale = 2.0 ** math.floor(math.log2(LENGTH / longest))
        self.low = atoms.new_empty(self.order.numel(), atoms.shape[1], dtype=dtype)
        loss = atoms.new_empty(len(self.low))
        for places, part in self._parts():
            part.mul_(self._scale)
            self.low[places] = part
            loss[places] = (part - self.low[places]).norm(dim=1)
        self._set_slack(self.norms * self._scale, loss)
        self._smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # what numbers near 0 are off by

    def look(self, residuals: Tensor) -> Look:
        """See :meth:`Screen.look`."""
        unit = residuals.norm(dim=1).clamp(min=TINY) / LENGTH
        scaled = residuals / unit[:, None]
        low = scaled.to(self.low.dtype)
        lost, norm = (scaled - low).norm(dim=1), low.float().norm(dim=1)
        look = self._seen(low @ self.low.T, unit / self._scale, [lost + self.summing * norm, norm])
        look.errors.add_(self._smallest)
        return look
