"""A cheap look at all atoms, with a bound on how wrong it can be.

Letters in shapes: B targets, N atoms, d dimensions, m candidates.
"""

import torch
from torch import Tensor

from mergekit_omp.solver.pursuit import ROUNDING

FIRST, MORE = 16, 256
"""Candidates rescored at first, and where the bound says that the best may not be among those."""


class Screen:
    """Atoms (N, d) rounded to the dtype in which the device multiplies fastest.

    A score ⟨r, a⟩ is estimated as ⟨r̂, â⟩ from rounded vectors. By Cauchy and Schwarz it is off by at most
    ‖r - r̂‖ ‖a‖ + ‖r̂‖ ‖a - â‖, and all these norms are measured. Nothing is assumed of how the errors fall.
    """

    def __init__(self, atoms: Tensor, dtype: torch.dtype) -> None:
        self.atoms = atoms
        self.low = atoms.to(dtype)
        self.norms = atoms.norm(dim=1)
        parts = [slice(start, start + 8192) for start in range(0, len(atoms), 8192)]
        self.loss = max(self.relative(atoms[part] - self.low[part].float(), part) for part in parts)
        # The products are summed in float32 and the sum is rounded to the dtype.
        self.spacing = torch.finfo(dtype).eps
        self.summing = atoms.shape[1] * ROUNDING

    def relative(self, errors: Tensor, part: slice) -> float:
        """The largest norm of ``errors``, one row for each atom of ``part``, relative to the atom's norm."""
        return float((errors.norm(dim=1) / self.norms[part].clamp(min=torch.finfo(torch.float32).tiny)).max())

    def scores(self, vectors: Tensor) -> Tensor:
        """Estimates (B, N), signed, in the screen's dtype."""
        return vectors.to(self.low.dtype) @ self.low.T

    def reach(self, exact: Tensor, scored: Tensor, loss: float | None = None) -> Tensor:
        """Bound (…) on the error for an atom of norm 1 where ``scored`` (…, d) was multiplied for ``exact`` (…, d).

        ``loss`` is the relative rounding error of the atoms that were multiplied; default: of the screen's.
        """
        loss = self.loss if loss is None else loss
        return (exact - scored).norm(dim=-1) + scored.norm(dim=-1) * (loss + self.summing)

    def ceiling(self, estimates: Tensor, reach: Tensor) -> Tensor:
        """What |score| (B, N) can be at most, for |estimates| (B, N) with an error of ``reach`` (B,) a unit of norm.

        Rounding of this sum is covered by 1.5 :attr:`spacing`, which the caller adds.
        """
        return estimates.abs().addmm_(reach[:, None].to(estimates.dtype), self.norms[None].to(estimates.dtype))


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of each row of ``values`` (B, N) and their places, in descending order.

    The largest values lie in the groups with the largest maxima, so most of the row is only reduced, not sorted.
    """
    rows, width = values.shape
    group = 16 if count > 64 else 64
    whole = width // group * group
    if whole // group <= 2 * count:
        return values.topk(min(count, width), dim=1)
    best = values[:, :whole].unflatten(1, (-1, group)).amax(2).topk(count, dim=1, sorted=False).indices
    steps = torch.arange(group, device=values.device)
    places = (best[:, :, None] * group + steps).flatten(1)
    rest = torch.arange(whole, width, device=values.device).expand(rows, -1)
    places = torch.cat([places, rest], dim=1)
    top = values.gather(1, places).topk(count, dim=1)
    return top.values, places.gather(1, top.indices)


def score_exactly(atoms: Tensor, candidates: Tensor, vectors: Tensor) -> Tensor:
    """|⟨vector, atom⟩| (B, R, m) in float32 for candidates (B, m) and vectors (B, R, d)."""
    return torch.bmm(vectors, atoms[candidates].transpose(1, 2)).abs()
