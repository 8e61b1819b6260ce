"""All steps of one chunk of targets."""

import torch
from torch import Tensor

from mergekit_omp.solver.gram import Gram
from mergekit_omp.solver.pursuit import Pursuit
from mergekit_omp.solver.scan import step
from mergekit_omp.solver.screen import FIRST, Screen
from mergekit_omp.solver.speculate import POOL, speculate

SETTLED = 4
"""Steps after which scores change slowly enough for a pool to last."""

WORTHWHILE = 2.0
"""Steps that a trial has to give, on average, for another one."""


def find_supports(targets: Tensor, screen: Screen, gram: Gram | None, k: int) -> Tensor:
    """Support int64 (B, k) of each target (B, d), in the order of selection, -1 where the slot is unused."""
    supports = torch.full((len(targets), k), -1, dtype=torch.int64, device=targets.device)
    pursuit = Pursuit(targets, screen.atoms, screen.norms, k)
    rows = torch.arange(len(targets), device=targets.device)
    while not pursuit.done.all():
        speculative = gram is not None and int(pursuit.size[~pursuit.done].min()) >= SETTLED
        origin, size = pursuit.residual.clone(), pursuit.size.clone()
        estimates, order = step(pursuit, screen, POOL if speculative else FIRST)
        if speculative and not pursuit.done.all():
            taken = speculate(pursuit, screen, gram, origin, size, estimates, order)
            # Where scores are too close for the bound, trials prove nothing; near the end they are short anyway.
            if taken < WORTHWHILE:
                gram = None
        if pursuit.done.any():
            supports[rows[pursuit.done]] = pursuit.support[pursuit.done]
            rows, pursuit = rows[~pursuit.done], pursuit.view(~pursuit.done)
    supports[rows] = pursuit.support
    return supports
