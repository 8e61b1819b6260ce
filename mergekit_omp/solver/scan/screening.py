"""A cheap look at all atoms, with a bound on how wrong it can be.

Letters in shapes: B targets, N atoms, G groups of M atoms, d dimensions, Q pairs.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_omp.solver.scan.state import ROUNDING


def group_size(device: torch.device) -> int:
    """Atoms that are first looked at as one."""
    return 128 if device.type == "cuda" else 64


TINY = 1e-37
"""Added to the squares of errors, so that none is rounded to zero."""

SHORTEST = 1e-30
"""Rows that are shorter are not made longer by more than a row of that length."""

LENGTH = 128.0
"""Of the rows that are rounded: in float16, scores of such rows are finite, and next to no coordinate is lost."""


@dataclass(frozen=True)
class Look:
    """What a screen says of the scores |⟨rᵦ, aₙ⟩| of B residuals: they differ from unitᵦ |scoreᵦₙ| by no more than

        unitᵦ (rounding · |scoreᵦₙ| + errorᵦₙ)

    Attributes:
        scores: (B, M, G) in a floating dtype. Signs are not kept where it is faster to drop them first.
        errors: float32 (B, G), the same for all atoms of a group; or (1, G), the same for all residuals too.
        unit: float32 (B,). Scores of one residual are compared in its own.
        order: int64 (M, G), which atom stands where; -1 for none.
    """

    scores: Tensor
    errors: Tensor
    unit: Tensor
    order: Tensor

    @property
    def rounding(self) -> float:
        """Half of the distance to the next score, relative to it, and a little for the arithmetic here."""
        return 0.501 * torch.finfo(self.scores.dtype).eps

    def candidates(self, most: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """For some residuals after the others, all pairs with an atom that may have the highest score.

        Args:
            most: the most pairs at a time, where one residual has not got more.

        Yields:
            Which of the residuals, all of them one after the other; and of each pair, in their order, the residual
            (Q,), counted from the first of these, and the atom (Q,).
        """
        peaks = self._peaks()
        needed = self.needed(peaks)
        rows, groups = (peaks >= needed).nonzero(as_tuple=True)
        count, size = len(peaks), self.scores.shape[1]
        if len(rows) * size <= most:
            spans = [(0, count, 0, len(rows))]
        else:
            spans = _spans(rows.bincount(minlength=count).cumsum(0).tolist(), most // size)
        for start, stop, first, last in spans:
            row, group = rows[first:last], groups[first:last]
            high = self.scores[row, :, group].abs() >= needed[row, group, None]
            pair, member = high.logical_and_((self.order[:, group] >= 0).T).nonzero(as_tuple=True)
            yield slice(start, stop), row[pair] - start, self.order[member, group[pair]]

    def highest(self, count: int) -> tuple[Tensor, Tensor]:
        """The atoms of the highest scores, and what none of the others exceeds, as far as they tell.

        Args:
            count: of atoms, at most as many as there are places.

        Returns:
            The atoms int64 (B, count), -1 for none, and the score float32 (B,).
        """
        # They all stand in the groups of as many of the highest peaks.
        groups, size = self._peaks().topk(min(count, self.order.shape[1]), dim=1).indices, len(self.order)
        members = self.scores[torch.arange(len(groups), device=groups.device)[:, None], :, groups]
        highest, places = members.flatten(1).abs_().topk(count, dim=1)
        atoms = self.order[places % size, groups.gather(1, places // size)]
        return atoms, highest[:, -1].float() * self.unit

    def _peaks(self) -> Tensor:
        """The highest magnitude float32 (B, G) of each group."""
        if self.scores.device.type == "cuda":
            return torch.linalg.vector_norm(self.scores, torch.inf, dim=1).float()
        # Floating numbers that are not negative are in the order of their bits, and integers are compared faster.
        bits = torch.int16 if self.scores.element_size() == 2 else torch.int32
        return self.scores.abs_().view(bits).amax(1).view(self.scores.dtype).float()

    def needed(self, peaks: Tensor) -> Tensor:
        """The magnitude (B, G) from which on an atom may have the highest score, given that of each group (B, G)."""
        level = (peaks * (1 - self.rounding) - self.errors).amax(1, keepdim=True)
        return (level - self.errors).div_(1 + self.rounding)


def _spans(ends: list[int], most: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a list of pairs, of which those of row i end at ``ends[i]``, between rows: the rows and the pairs of each
    span, which has at most so many pairs, or one row."""
    start = first = 0
    while start < len(ends):
        stop = max(start + 1, bisect_right(ends, first + most))
        yield start, stop, first, ends[stop - 1]
        start, first = stop, ends[stop - 1]


class Screen(ABC):
    """Atoms (N, d), and a rounded copy of them that is faster to multiply with."""

    score_bytes: int
    """What one score of a :class:`Look` takes."""

    def __init__(self, atoms: Tensor) -> None:
        self.atoms = atoms
        self.norms = atoms.norm(dim=1)
        # Groups of about the same norm: their bounds are as tight as those of each atom.
        order = self.norms.argsort(stable=True)
        group = group_size(atoms.device)
        empty = order.new_full((-len(order) % group,), -1)
        self.order = torch.cat([empty, order]).view(-1, group).T.contiguous()
        # What rounding takes from sums of d products in float32, relative to the norms.
        self.summing = (atoms.shape[1] + 16) * ROUNDING

    @abstractmethod
    def look(self, residuals: Tensor) -> Look:
        """Bounds of the scores of float32 residuals (B, d), none of which is zero, with all atoms."""

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Some places at a time, and the atoms (n, d) that stand there; zeros for none."""
        for start in range(0, self.order.numel(), 1024):
            places = slice(start, start + 1024)
            atoms = self.order.flatten()[places]
            yield places, self.atoms[atoms] * (atoms >= 0)[:, None]

    def _largest(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """The largest norm (G,) of the atoms of each group, and its largest ``loss``, of which each place has one."""
        return self.norms[self.order].amax(0), loss.view_as(self.order).amax(0)


class FloatScreen(Screen):
    """Atoms rounded to a floating dtype.

    A score ⟨r, a⟩ is estimated as ⟨r̂, â⟩. By Cauchy and Schwarz it is off by at most ‖r - r̂‖ ‖a‖ + ‖r̂‖ ‖a - â‖.
    Nothing is assumed of how the errors fall. All residuals are brought to the same length, and the atoms to lengths
    near it, so that neither they nor the scores leave the range of float16, and the bounds are the same for all
    residuals.
    """

    def __init__(self, atoms: Tensor, dtype: torch.dtype) -> None:
        super().__init__(atoms)
        self.score_bytes = dtype.itemsize
        # A power of two, with which rows that were bfloat16 in the checkpoint are rounded by none of the dtypes.
        longest = max(self.norms.max().item(), SHORTEST)
        self._scale = 2.0 ** math.floor(math.log2(LENGTH / longest))
        self.low = atoms.new_empty(self.order.numel(), atoms.shape[1], dtype=dtype)
        loss = atoms.new_empty(len(self.low))
        for places, part in self._parts():
            part.mul_(self._scale)
            self.low[places] = part
            loss[places] = (part - self.low[places]).norm(dim=1)
        norm, loss = self._largest(loss)
        numbers = torch.finfo(dtype)
        smallest = numbers.smallest_normal * numbers.eps  # what numbers near 0 are off by
        length = 1.001 * LENGTH  # of rounded residuals, on the safe side
        lost = length * (numbers.eps / 2 + self.summing) + math.sqrt(atoms.shape[1]) * smallest
        self._errors = (lost * self._scale * norm + length * loss + smallest)[None]

    def look(self, residuals: Tensor) -> Look:
        """See :meth:`Screen.look`."""
        unit = residuals.norm(dim=1).clamp_(min=SHORTEST).div_(LENGTH)
        low = torch.div(residuals, unit[:, None], out=torch.empty_like(residuals, dtype=self.low.dtype))
        scores = (low @ self.low.T).unflatten(1, self.order.shape)
        return Look(scores, self._errors, unit / self._scale, self.order)
