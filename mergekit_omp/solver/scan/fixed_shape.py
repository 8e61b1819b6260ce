"""Run OMP on a GPU in steps whose tensors keep their shapes and addresses.

A GPU computes a step faster than Python launches its operations one by one, and has nothing to do while the host waits
for the size of a result. Here no size depends on data, so that a step is captured once as a CUDA graph and replayed.
The state is in float64: a choice among the candidates of a scan needs no second opinion.

Letters in shapes: B targets, N atoms, d dimensions, k sparsity, P places for candidates.
"""

import logging
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from mergekit_omp.solver.scan.gpu_operations import correlate, orthogonalize
from mergekit_omp.solver.scan.screening import Screen
from mergekit_omp.solver.scan.tie_break import choose_in_float64
from mergekit_omp.solver.tolerances import TIE, ZERO

LOG = logging.getLogger(__name__)

PLACES = 16
"""Places for candidates per target. A float16 scan leaves more of them open once in thousands of steps of a target."""

CROWDED_SHARE = 8
"""Crowded targets are scanned again in parts of the chunk, one in so many, which bounds their memory."""

_CAPTURE = threading.Lock()
"""Serialises captures: each GPU has its own thread, and torch supports one capture at a time in a process."""

_NOT_CAPTURED: set[torch.device] = set()
"""Devices on which a capture failed."""


def find_supports_by_replay(targets: Tensor, screen: Screen, k: int, pairs: int) -> Tensor:
    """Select the atoms of each target.

    Arguments and support are those of :func:`mergekit_omp.solver.scan.search.find_supports`.
    """
    pursuit = FixedPursuit(targets, screen, k)
    pursuit.step()
    step = capture(pursuit.step, targets.device) if k > 1 else pursuit.step  # the first step compiled and allocated
    while True:
        active, crowded = pursuit.counts.tolist()  # the only synchronisation of a step
        if crowded:
            pursuit.step_of_crowded(pairs)
        if not active:
            return pursuit.support
        step()


class FixedPursuit:
    """State of B targets in float64, each after its own number of steps.

    Attributes:
        support: int64 (B, k), atoms in the order of selection, -1 in unused slots.
        size: int64 (B,), number of atoms in each support.
        residual: (B, d), the target minus its projection on the span of its support.
        residual_norm: (B,).
        basis: (B, k, d), orthonormal rows that span the support, and zeros.
        done: bool (B,), whether the pursuit of the target has ended.
        crowded: bool (B,), whether the last step left the target out, having more candidates than places.
        counts: int64 (2,), number of targets that are not done, and of those that are crowded.
    """

    def __init__(self, targets: Tensor, screen: Screen, k: int) -> None:
        count, dim = targets.shape
        self.screen = screen
        self.residual = targets.double()
        self.norm = self.residual.norm(dim=1)
        self.residual_norm = self.norm.clone()
        self.support = torch.full((count, k), -1, dtype=torch.int64, device=targets.device)
        self.size = torch.zeros_like(self.support[:, 0])
        self.basis = self.residual.new_zeros(count, k, dim)
        self.done = self.norm == 0
        self.crowded = torch.zeros_like(self.done)
        self.counts = self.size.new_zeros(2)

    def step(self) -> None:
        """Add an atom to the support of each target that is neither done nor crowded.

        No shape and no branch depends on data.
        """
        scanned = self.screen.scan(self.residual, self.residual_norm)
        candidates, crowded = scanned.first_candidates(PLACES)
        self.crowded.copy_(crowded & ~self.done)
        correlations = correlate(self.residual, self.screen.atoms, candidates)
        best = correlations.amax(1)
        tied = correlations >= best[:, None] * (1 - TIE)
        choice = candidates.where(tied, len(self.screen.atoms) - 1).amin(1).clamp(min=0)
        self._extend(choice, best, ~(self.done | self.crowded))
        self.counts.copy_(torch.stack([(~self.done).sum(), self.crowded.sum()]))

    def step_of_crowded(self, pairs: int) -> None:
        """Add an atom to the support of each crowded target, with any number of candidates.

        Args:
            pairs: limit on pairs of a target and a candidate atom in memory.
        """
        choice, best = torch.zeros_like(self.size), torch.zeros_like(self.norm)
        for rows in self.crowded.nonzero().flatten().split(-(-len(choice) // CROWDED_SHARE)):
            residual = self.residual[rows]
            scanned = self.screen.scan(residual, self.residual_norm[rows])
            for part, row, atoms in scanned.candidates(pairs):
                here = rows[part]
                choice[here], best[here] = choose_in_float64(residual[part], self.screen.atoms, row, atoms)
        self._extend(choice, best, self.crowded)

    def _extend(self, choice: Tensor, correlation: Tensor, active: Tensor) -> None:
        """Add the atom ``choice`` (B,), with ``correlation`` (B,) with the residual, to the supports that are active.

        As in :meth:`mergekit_omp.solver.scan.state.PursuitState.extend`, a target is done if that is of no use.
        """
        atom_norm = self.screen.norms[choice].double()
        useful = active & (correlation > ZERO * self.norm * atom_norm)
        added = orthogonalize(self.screen.atoms, choice, atom_norm, useful, self.basis, self.size, self.residual)
        slot = self.size.clamp(max=self.support.shape[1] - 1)[:, None]
        self.support.scatter_(1, slot, choice[:, None].where(added[:, None], self.support.gather(1, slot)))
        self.size.add_(added)
        self.residual_norm.copy_(self.residual.norm(dim=1))
        full = (self.size == self.support.shape[1]) | (self.residual_norm <= ZERO * self.norm)
        self.done.logical_or_(active & (~added | full))


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return a function that does what ``step`` does, on a CUDA device by replaying a graph of it.

    Args:
        step: function that changes tensors in place, without a synchronisation; it has run once before.
        device: device of the tensors.
    """
    if device.type != "cuda" or device in _NOT_CAPTURED:
        return step
    try:
        graph = torch.cuda.CUDAGraph()
        # Errors are those of this thread: other GPUs have threads that allocate memory meanwhile.
        with (
            _CAPTURE,
            torch.cuda.device(device),
            torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"),
        ):
            step()
    except RuntimeError as error:
        _NOT_CAPTURED.add(device)
        LOG.warning("Solving without CUDA graphs, which takes longer: %s", error)
        return step
    return graph.replay
