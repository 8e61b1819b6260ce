"""All steps of one chunk of targets.

Letters in shapes: B targets, d dimensions, k sparsity.
"""

import torch
from torch import Tensor

from mergekit_omp.solver.scan.screening import Screen
from mergekit_omp.solver.scan.shortlist import Shortlist
from mergekit_omp.solver.scan.state import Pursuit
from mergekit_omp.solver.scan.tie_break import choose


def find_supports(targets: Tensor, screen: Screen, k: int, scan_every: int, pairs: int) -> Tensor:
    """The atoms that represent each target.

    Args:
        targets: float32 (B, d).
        screen: of all atoms.
        k: the sparsity.
        scan_every: 1 looks at all atoms at each step, and is exact; more, see :class:`Shortlist`.
        pairs: of targets and atoms that may be the best ones, as many as may be held at a time.

    Returns:
        Support int64 (B, k) of each target, in the order of selection, -1 where the slot is unused.
    """
    supports = torch.full((len(targets), k), -1, dtype=torch.int64, device=targets.device)
    pursuit = Pursuit(targets, screen.atoms, screen.norms, k)
    shortlist = Shortlist(screen, scan_every, len(targets)) if scan_every > 1 else None
    rows = torch.arange(len(targets), device=targets.device)
    while True:
        if pursuit.done.any():
            supports[rows[pursuit.done]] = pursuit.support[pursuit.done]
            going = ~pursuit.done
            rows, pursuit = rows[going], pursuit.view(going)
            if shortlist is not None:
                shortlist.keep(going)
        if not len(rows):
            return supports
        if shortlist is not None:
            pursuit.extend(*shortlist.choose(pursuit))
        else:
            pursuit.extend(*_best(pursuit, screen, pairs))


def _best(pursuit: Pursuit, screen: Screen, pairs: int) -> tuple[Tensor, Tensor]:
    """The best of all atoms int64 (B,) for each target, and its score (B,)."""
    candidates = screen.look(pursuit.residual).candidates(pairs)
    choices, scores = zip(*(choose(pursuit.view(some), rows, atoms) for some, rows, atoms in candidates), strict=True)
    return torch.cat(choices), torch.cat(scores)
