"""Steps that look only at the atoms that scored highest in the last look at all of them: faster, and not exact.

Letters in shapes: B targets, M atoms of a shortlist.
"""

import torch
from torch import Tensor

from mergekit_omp.solver.scan.screening import Screen
from mergekit_omp.solver.scan.state import Pursuit
from mergekit_omp.solver.scan.tie_break import choose

SIZE = 64
"""Atoms of a shortlist. Twice as many gain a tenth of a percent of the residual, and take twice the time to score."""

SETTLING = 4
"""A shortlist serves until the support has grown by one part in this many, as the first atoms change the residual, and
so all scores, the most."""

STALE = 0.5
"""A target gets a new list early where the best of its list scores less than this share of what
the others did."""


class Shortlist:
    """For each of B targets the atoms that had the highest scores when all were looked at.

    Between two looks, the scores of all others are taken not to have grown. Where a list is of no use any more, as one
    of near copies of an atom that has been taken, that target gets a new one at once.
    """

    def __init__(self, screen: Screen, scan_every: int, count: int) -> None:
        """``scan_every`` is the most steps that a list serves, ``count`` is B."""
        self._screen, self._every, self._due = screen, scan_every, 0
        size = min(SIZE, screen.order.numel())
        self._atoms = torch.full((count, size), -1, dtype=torch.int64, device=screen.atoms.device)
        self._others = torch.zeros(count, device=screen.atoms.device)

    def keep(self, targets: Tensor) -> None:
        """Go on with the targets of a mask (B,) only."""
        self._atoms, self._others = self._atoms[targets], self._others[targets]

    def choose(self, pursuit: Pursuit) -> tuple[Tensor, Tensor]:
        """The best atom of each target's list int64 (B,), and its score (B,)."""
        if pursuit.size >= self._due:
            self._due = pursuit.size + min(self._every, 1 + pursuit.size // SETTLING)
            return self._renewed(pursuit, torch.ones_like(pursuit.done))
        choice, score = self._best(pursuit, self._atoms)
        stale = score < STALE * self._others
        if stale.any():
            choice[stale], score[stale] = self._renewed(pursuit.view(stale), stale)
        return choice, score

    def _renewed(self, pursuit: Pursuit, targets: Tensor) -> tuple[Tensor, Tensor]:
        """New lists for the targets of a mask (B,), whose pursuit is given, and their choice and its score."""
        self._atoms[targets], self._others[targets] = self._screen.look(pursuit.residual).highest(self._atoms.shape[1])
        return self._best(pursuit, self._atoms[targets])

    @staticmethod
    def _best(pursuit: Pursuit, atoms: Tensor) -> tuple[Tensor, Tensor]:
        rows, places = (atoms >= 0).nonzero(as_tuple=True)
        return choose(pursuit, rows, atoms[rows, places])
