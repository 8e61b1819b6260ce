"""Compute low-precision correlations of all atoms with an error bound.

Letters in shapes: B targets, N atoms, G groups of M atoms, d dimensions, Q pairs.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_omp.solver.tolerances import ROUNDING

TINY = 1e-37
"""Added to the squares of errors, so that none is rounded to zero."""

SHORTEST = 1e-30
"""Rows that are shorter are scaled as a row of this norm."""

LENGTH = 128.0
"""Norm to which rows are scaled before they are rounded: in float16 their correlations are finite, and next to no
coordinate is lost."""


def group_size(device: torch.device) -> int:
    """Return M: a group of so many atoms is ruled out by its highest correlation alone."""
    return 128 if device.type == "cuda" else 64


@dataclass(frozen=True)
class Correlations:
    """Estimates of the correlations |⟨rᵦ, aₙ⟩| of B residuals, which differ from unitᵦ |valueᵦₙ| by no more than

        unitᵦ (rounding · |valueᵦₙ| + errorᵦₙ)

    Attributes:
        values: (B, M, G) in a floating dtype. Signs are not kept where it is faster to drop them first.
        errors: float32 (B, G), the same for all atoms of a group; or (1, G), the same for all residuals too.
        unit: float32 (B,). Correlations of one residual are compared in its own.
        order: int64 (M, G), the atom of each place; -1 for none.
    """

    values: Tensor
    errors: Tensor
    unit: Tensor
    order: Tensor

    @property
    def rounding(self) -> float:
        """Half of the distance to the next value, relative to it, and a little for the arithmetic here."""
        return 0.501 * torch.finfo(self.values.dtype).eps

    def candidates(self, most: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Find all pairs of a residual and an atom that may have its highest correlation, some residuals at a time.

        Args:
            most: the most pairs at a time, where one residual has not got more.

        Yields:
            Which of the residuals, all of them one after the other; and of each pair, in their order, the residual
            (Q,), counted from the first of these, and the atom (Q,).
        """
        peaks = self._peaks()
        needed = self._needed(peaks)
        rows, groups = (peaks >= needed).nonzero(as_tuple=True)
        count, size = len(peaks), self.values.shape[1]
        spans: Iterable[tuple[int, int, int, int]]
        if len(rows) * size <= most:
            spans = [(0, count, 0, len(rows))]
        else:
            spans = _spans(rows.bincount(minlength=count).cumsum(0).tolist(), most // size)
        for start, stop, first, last in spans:
            row, group = rows[first:last], groups[first:last]
            high = self.values[row, :, group].abs() >= needed[row, group, None]
            pair, member = high.logical_and_((self.order[:, group] >= 0).T).nonzero(as_tuple=True)
            yield slice(start, stop), row[pair] - start, self.order[member, group[pair]]

    def _peaks(self) -> Tensor:
        """The highest magnitude float32 (B, G) of each group."""
        if self.values.device.type == "cuda":
            return torch.linalg.vector_norm(self.values, torch.inf, dim=1).float()
        # Floating numbers that are not negative are in the order of their bits, and integers are compared faster.
        bits = torch.int16 if self.values.element_size() == 2 else torch.int32
        return self.values.abs_().view(bits).amax(1).view(self.values.dtype).float()

    def _needed(self, peaks: Tensor) -> Tensor:
        """The magnitude (B, G) from which on an atom may be the best, given the peaks (B, G)."""
        level = (peaks * (1 - self.rounding) - self.errors).amax(1, keepdim=True)
        return (level - self.errors).div_(1 + self.rounding)


def _spans(ends: list[int], most: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a list of pairs, of which those of row i end at ``ends[i]``, between rows.

    Yields the rows and the pairs of each span, which has at most ``most`` pairs, or one row.
    """
    start = first = 0
    while start < len(ends):
        stop = max(start + 1, bisect_right(ends, first + most))
        yield start, stop, first, ends[stop - 1]
        start, first = stop, ends[stop - 1]


class Screen(ABC):
    """Atoms (N, d), and a rounded copy of them that is faster to multiply with."""

    def __init__(self, atoms: Tensor, norms: Tensor) -> None:
        """Sort the atoms; ``norms`` (N,) are theirs."""
        self.atoms, self.norms = atoms, norms
        # Groups of about the same norm: their bounds are as tight as those of each atom.
        order = norms.argsort(stable=True)
        group = group_size(atoms.device)
        empty = order.new_full((-len(order) % group,), -1)
        self.order = torch.cat([empty, order]).view(-1, group).T.contiguous()
        # Error of float32 sums of d products, relative to the norms.
        self.summing = (atoms.shape[1] + 16) * ROUNDING

    @abstractmethod
    def scan(self, residuals: Tensor, norms: Tensor) -> Correlations:
        """Estimate the correlations of float32 residuals (B, d), of norms (B,) above zero, with all atoms."""

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

    A correlation ⟨r, a⟩ is estimated as ⟨r̂, â⟩. By Cauchy and Schwarz it is off by at most ‖r - r̂‖ ‖a‖ + ‖r̂‖ ‖a - â‖;
    nothing is assumed of how the errors fall. All residuals are brought to the same length, and the atoms to lengths
    near it, so that neither they nor the correlations leave the range of float16, and the bounds are the same for all
    residuals.
    """

    def __init__(self, atoms: Tensor, norms: Tensor, dtype: torch.dtype) -> None:
        super().__init__(atoms, norms)
        # A power of two, with which rows that were bfloat16 in the checkpoint are rounded by none of the dtypes.
        longest = max(norms.max().item(), SHORTEST)
        self._scale = 2.0 ** math.floor(math.log2(LENGTH / longest))
        self.rounded = atoms.new_empty(self.order.numel(), atoms.shape[1], dtype=dtype)
        loss = atoms.new_empty(len(self.rounded))
        for places, part in self._parts():
            part.mul_(self._scale)
            self.rounded[places] = part
            loss[places] = (part - self.rounded[places]).norm(dim=1)
        norm, loss = self._largest(loss)
        numbers = torch.finfo(dtype)
        smallest = numbers.smallest_normal * numbers.eps  # what numbers near 0 are off by
        length = 1.001 * LENGTH  # of rounded residuals, on the safe side
        lost = length * (numbers.eps / 2 + self.summing) + math.sqrt(atoms.shape[1]) * smallest
        self._errors = (lost * self._scale * norm + length * loss + smallest)[None]

    def scan(self, residuals: Tensor, norms: Tensor) -> Correlations:
        """See :meth:`Screen.scan`."""
        unit = norms.clamp(min=SHORTEST).div_(LENGTH)
        rounded = torch.div(residuals, unit[:, None], out=torch.empty_like(residuals, dtype=self.rounded.dtype))
        values = (rounded @ self.rounded.T).unflatten(1, self.order.shape)
        return Correlations(values, self._errors, unit / self._scale, self.order)
