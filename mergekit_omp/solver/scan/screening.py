"""Compute low-precision correlations of all atoms with an error bound.

Letters in shapes: B targets, N atoms, G groups of M atoms, d dimensions, Q pairs.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_omp.solver.least_squares import rows_at_a_time
from mergekit_omp.solver.tolerances import ROUNDING

SHORTEST = 1e-30
"""Smallest norm used for scaling; shorter rows are scaled as if they had it."""

LENGTH = 128.0
"""Norm to which rows are scaled before rounding: their float16 correlations are finite, and hardly any coordinate
underflows."""


def group_size(device: torch.device) -> int:
    """Return M, the number of atoms per group; a group is excluded by its highest correlation alone."""
    return 128 if device.type == "cuda" else 64


@dataclass(frozen=True)
class Correlations:
    """Estimated correlations of B residuals with all atoms, with an error bound.

    The exact |⟨rᵦ, aₙ⟩| differs from unitᵦ |valueᵦₙ| by at most unitᵦ (rounding · |valueᵦₙ| + errorᵦₙ).

    Attributes:
        values: (B, M, G) of a floating dtype; signs may be dropped.
        errors: float32 (1, G), the bound for all atoms of a group, the same for all residuals.
        unit: float32 (B,), unit of the values of each residual.
        order: int64 (M, G), the atom at each place, -1 for padding.
    """

    values: Tensor
    errors: Tensor
    unit: Tensor
    order: Tensor

    @property
    def rounding(self) -> float:
        """Relative rounding error of the values: half their spacing, and a margin for the arithmetic here."""
        return 0.501 * torch.finfo(self.values.dtype).eps

    def candidates(self, max_pairs: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Find all pairs of a residual and an atom that may have its highest correlation, in slices of residuals.

        Args:
            max_pairs: the number of pairs per slice; a slice of a single residual may have more.

        Yields:
            The slice of residuals; for each pair, in ascending order, the residual int64 (Q,) relative to the slice
            and the atom int64 (Q,). The slices cover all residuals in order.
        """
        peaks = self._peaks()
        needed = self._needed(peaks)
        rows, groups = (peaks >= needed).nonzero(as_tuple=True)
        count, size = len(peaks), self.values.shape[1]
        spans: Iterable[tuple[int, int, int, int]]
        if len(rows) * size <= max_pairs:
            spans = [(0, count, 0, len(rows))]
        else:
            spans = _spans(rows.bincount(minlength=count).cumsum(0).tolist(), max_pairs // size)
        for start, stop, first, last in spans:
            row, group = rows[first:last], groups[first:last]
            high = self.values[row, :, group].abs() >= needed[row, group, None]
            pair, member = high.logical_and_((self.order[:, group] >= 0).T).nonzero(as_tuple=True)
            yield slice(start, stop), row[pair] - start, self.order[member, group[pair]]

    def first_candidates(self, most: int) -> tuple[Tensor, Tensor]:
        """Find the candidates of each residual in tensors whose shapes do not depend on data.

        Args:
            most: the number of candidates P per residual, and of groups that hold them.

        Returns:
            Atoms int64 (B, P), -1 in unused places; bool (B,), whether the residual has more candidates, in which case
            the atoms are some of them.
        """
        peaks = self._peaks()
        needed = self._needed(peaks)
        groups, more_groups = _first_places(peaks >= needed, most)
        level = needed.gather(1, groups.clamp(min=0)).where(groups >= 0, torch.inf)
        groups = groups.clamp(min=0)
        values = self.values.gather(2, groups[:, None].expand(-1, self.values.shape[1], -1))  # (B, M, P)
        places, more = _first_places((values.abs() >= level[:, None]).flatten(1), most)
        at = places.clamp(min=0)
        atoms = self.order[at // most, groups.gather(1, at % most)]
        return atoms.where(places >= 0, -1), more | more_groups

    def _peaks(self) -> Tensor:
        """Return the highest magnitude float32 (B, G) of each group."""
        if self.values.device.type == "cuda":
            return torch.linalg.vector_norm(self.values, torch.inf, dim=1).float()
        # Non-negative floating point numbers are ordered as their bits are, and integers compare faster.
        bits = torch.int16 if self.values.element_size() == 2 else torch.int32
        return self.values.abs_().view(bits).amax(1).view(self.values.dtype).float()

    def _needed(self, peaks: Tensor) -> Tensor:
        """Return the magnitude (B, G) above which an atom may be the best, given the peaks (B, G)."""
        level = (peaks * (1 - self.rounding) - self.errors).amax(1, keepdim=True)
        return (level - self.errors).div_(1 + self.rounding)


def _first_places(marked: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the columns int64 (B, P) of the first P marks in each row of (B, C), then -1; whether there are more."""
    rank = marked.cumsum(1, dtype=torch.int32)
    wanted = torch.arange(1, most + 1, dtype=rank.dtype, device=rank.device).repeat(len(rank), 1)
    found = torch.searchsorted(rank, wanted)
    return found.where(found < rank.shape[1], -1), rank[:, -1] > most


def _spans(ends: list[int], max_pairs: int) -> Iterator[tuple[int, int, int, int]]:
    """Split a list of pairs, in which the pairs of row i end at ``ends[i]``, between rows.

    Yields the range of rows and the range of pairs of each span: at most ``max_pairs`` pairs, or a single row.
    """
    start = first = 0
    while start < len(ends):
        stop = max(start + 1, bisect_right(ends, first + max_pairs))
        yield start, stop, first, ends[stop - 1]
        start, first = stop, ends[stop - 1]


class Screen:
    """Atoms (N, d) with a copy, rounded to a floating dtype, that multiplies faster.

    A correlation ⟨r, a⟩ is estimated as ⟨r̂, â⟩. By the Cauchy-Schwarz inequality its error is at most
    ‖r - r̂‖ ‖a‖ + ‖r̂‖ ‖a - â‖, whatever the distribution of the rounding errors. Residuals are scaled to one norm and
    the atoms to norms near it, so that neither they nor the correlations leave the range of float16, and the bound is
    the same for all residuals.
    """

    def __init__(self, atoms: Tensor, norms: Tensor, dtype: torch.dtype) -> None:
        """Sort the atoms (N, d) by their norms (N,), and round them."""
        self.atoms, self.norms = atoms, norms
        # Groups of atoms with similar norms: the bound of a group is about as tight as that of one atom.
        order = norms.argsort(stable=True)
        group = group_size(atoms.device)
        empty = order.new_full((-len(order) % group,), -1)
        self.order = torch.cat([empty, order]).view(-1, group).T.contiguous()
        # Error of float32 sums of d products, relative to the norms of the factors.
        summing = (atoms.shape[1] + 16) * ROUNDING
        # A power of two: rows that are bfloat16 in the checkpoint are then exact in every dtype.
        longest = max(norms.max().item(), SHORTEST)
        self._scale = 2.0 ** math.floor(math.log2(LENGTH / longest))
        self.rounded = atoms.new_empty(self.order.numel(), atoms.shape[1], dtype=dtype)
        loss = atoms.new_empty(len(self.rounded))
        for places, part in self._parts():
            part.mul_(self._scale)
            self.rounded[places] = part
            loss[places] = (part - self.rounded[places]).norm(dim=1)
        norm, loss = norms[self.order].amax(0), loss.view_as(self.order).amax(0)
        finfo = torch.finfo(dtype)
        smallest = finfo.smallest_normal * finfo.eps  # absolute error of numbers near 0
        length = 1.001 * LENGTH  # upper bound on the norm of rounded residuals
        relative_error = length * (finfo.eps / 2 + summing) + math.sqrt(atoms.shape[1]) * smallest
        self._errors = (relative_error * self._scale * norm + length * loss + smallest)[None]

    def scan(self, residuals: Tensor, norms: Tensor) -> Correlations:
        """Estimate the correlations of residuals (B, d), with norms (B,) above zero, with all atoms."""
        unit = norms.clamp(min=SHORTEST).div_(LENGTH)
        rounded = torch.div(residuals, unit[:, None], out=torch.empty_like(residuals, dtype=self.rounded.dtype))
        values = (rounded @ self.rounded.T).unflatten(1, self.order.shape)
        return Correlations(values, self._errors, unit / self._scale, self.order)

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of places with the atoms (n, d) at these places, zero rows for padding."""
        step = rows_at_a_time(self.atoms)
        for start in range(0, self.order.numel(), step):
            places = slice(start, start + step)
            atoms = self.order.flatten()[places]
            yield places, self.atoms[atoms] * (atoms >= 0)[:, None]
