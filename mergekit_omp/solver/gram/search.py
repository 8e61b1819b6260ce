"""Batched OMP: propose several steps from a candidate list and verify them in one scan.

After t steps the correlations of a residual with all atoms are ⟨a, x⟩ - Σⱼ cⱼ ⟨a, aⱼ⟩, over the t atoms of the
support. With the cosines of a :class:`~mergekit_omp.solver.gram.matrix.Gram` a correlation costs t products, but
reading the t rows of the matrix takes longer than the products. So several steps share one scan, as several tokens
share one forward pass of the large model in speculative decoding (Leviathan et al. 2023):

    draft = [the best atom for the target]
    repeat:
        # Verify: one scan of all atoms computes the correlations at every drafted step.
        wrong = first step of the draft at which another atom is better, or none
        candidates = the atoms with the highest correlations with the last residual
        if none is wrong and the draft was complete: return
        # Undo the steps after it, and use the better atom in it.
        support = the verified atoms
        # Propose: most of the time the list contains the atoms that the next steps select.
        draft = []
        until the draft is long enough, or complete:
            support += choice; fit; choice = best of the candidates
            draft += [choice]

Many targets are solved together, strip by strip of the matrix, so that its rows are read from the cache, and the
strips of a half matrix are completed once for all. A target that is finished makes room for the next one, as requests
do in continuous batching (Yu et al., Orca, 2022).

Letters in shapes: B targets, N atoms, P atoms padded to whole strips, d dimensions, k sparsity.
"""

from collections.abc import Callable
from threading import Barrier, BrokenBarrierError, Lock

import numpy as np
import torch
from torch import Tensor

from mergekit_omp.solver.gram.matrix import Gram, empty_places
from mergekit_omp.solver.gram.propose import LIST_LENGTH, advance, start
from mergekit_omp.solver.gram.state import EMPTY, MOST_STEPS, PART, empty_slots, no_results
from mergekit_omp.solver.gram.vectors import COLUMNS
from mergekit_omp.solver.gram.verify import mark_rows, mirror, verify
from mergekit_omp.solver.gram.workspace import Workspace, workspace
from mergekit_omp.solver.threads import map_in_threads


def solve_by_gram(
    targets: Tensor,
    gram: Gram,
    k: int,
    slots: int,
    threads: int,
    *,
    most_steps: int = MOST_STEPS,
    list_length: int = LIST_LENGTH,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve targets on the CPU.

    Args:
        targets: (B, d) of any floating dtype.
        gram: Gram matrix of all atoms.
        k: sparsity.
        slots: number of targets that are solved together.
        threads: number of threads, which share the slots.
        most_steps: steps of the longest draft.
        list_length: target length of the candidate list. Neither changes the result.
        progress: callback that receives the number of targets solved since its last call; unfinished ones count
            with their share of the steps.

    Returns:
        Support int64 (B, k) in the order of selection, -1 in unused slots; coefficients float32 (B, k), 0 there;
        relative residuals float32 (B,).
    """
    search = _Search(targets, gram, k, slots, threads, most_steps, list_length, progress)
    map_in_threads(search.run_thread, range(search.threads), search.threads, stop=search.stop)
    if progress is not None:
        progress(len(targets) - search.reported)
    support, coefficients, residuals = map(torch.from_numpy, search.results)
    return support, (coefficients * search.norms[:, None]).float(), residuals.float()


class _Search:
    """State that the threads of one solve share; each thread has a range of the slots to itself."""

    def __init__(
        self,
        targets: Tensor,
        gram: Gram,
        k: int,
        slots: int,
        threads: int,
        most_steps: int,
        list_length: int,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.targets, self.gram, self.k, self.threads = targets, gram, k, max(1, min(threads, slots))
        self.most_steps, self.list_length, self.progress = most_steps, list_length, progress
        self.norms = torch.cat([part.double().norm(dim=1) for part in targets.split(PART)])
        self.results = no_results(len(targets), k)
        atoms, dim = gram.atoms.shape
        self.pursuits = empty_slots(slots, atoms, dim, k, most_steps)
        self.below = [empty_places(len(gram.norms) * gram.stride if gram.half else 0) for _ in range(2)]
        self.needed = np.zeros((self.threads, len(gram.norms) // COLUMNS), np.bool_)
        self.waiting = self.norms.nonzero().flatten()  # a target of zeros has an empty support
        self.barrier, self.lock = Barrier(self.threads), Lock()
        self.busy, self.unfinished, self.reported = [True] * self.threads, [0.0] * self.threads, 0
        self.stopped = False

    def stop(self) -> None:
        """Let all threads end after their present scan."""
        self.stopped = True
        self.barrier.abort()

    def run_thread(self, thread: int) -> None:
        """Solve targets in a thread's slots until none is left, and help the other threads to complete strips."""
        slots = len(self.pursuits.status)
        first, last = (slots * bound // self.threads for bound in (thread, thread + 1))
        work, strips = workspace(self.targets.shape[1], self.k, self.most_steps), len(self.gram.starts) - 1
        try:
            while not self.stopped and self._advance(thread, first, last, work):
                if not self.gram.half:
                    verify(self.gram, 0, strips, self.below[0], self.pursuits, first, last, work)
                    continue
                needed = self.needed.any(axis=0)
                for strip in range(strips):
                    below, missing = self.below[strip % 2], strips - strip - 1
                    part = (strip + 1 + missing * bound // self.threads for bound in (thread, thread + 1))
                    mirror(self.gram, strip, *part, below, needed)
                    # One wait is enough: no thread writes this buffer again before all have used the other one.
                    self.barrier.wait()
                    verify(self.gram, strip, strip + 1, below, self.pursuits, first, last, work)
        except BrokenBarrierError:  # another thread failed, and its error is told
            return
        except BaseException:
            self.stop()
            raise

    def _advance(self, thread: int, first: int, last: int, work: Workspace) -> bool:
        """Draft the next steps in the slots of a thread, and fill free ones; return whether to scan again."""
        advance(self.gram, self.pursuits, first, last, self.most_steps, self.list_length, work, self.results)
        fewest = min(PART, -(-(last - first) // 4))  # fewer are too few for an efficient product
        while len(free := first + np.flatnonzero(self.pursuits.status[first:last] == EMPTY)) >= fewest:
            count = min(PART, len(free))
            with self.lock:
                rows, self.waiting = self.waiting[:count], self.waiting[count:]
            if self.stopped or not len(rows):
                break
            self._fill(free[: len(rows)], rows, work)
        self._report(thread, first, last)
        self.busy[thread] = len(free) < last - first
        if not self.gram.half:
            return self.busy[thread]
        mark_rows(self.pursuits, first, last, self.needed[thread])
        self.barrier.wait()
        return any(self.busy)

    def _fill(self, slots: np.ndarray, rows: Tensor, work: Workspace) -> None:
        """Put the targets at ``rows`` into empty slots, and draft their first steps."""
        targets, norms = self.targets[rows].double(), self.norms[rows]
        self.pursuits.rows[slots] = rows
        self.pursuits.targets[slots] = targets / norms[:, None]
        self.pursuits.inner_errors[slots] = self.gram.store_cosines(targets, norms, self.pursuits.inner, slots)
        start(self.gram, self.pursuits, slots, self.most_steps, self.list_length, work, self.results)

    def _report(self, thread: int, first: int, last: int) -> None:
        """Report the targets solved by all threads, unfinished ones with their share of the steps."""
        if self.progress is None:
            return
        status, verified = self.pursuits.status[first:last], self.pursuits.verified[first:last]
        with self.lock:
            self.unfinished[thread] = int((status != EMPTY).sum()) - float(verified[status != EMPTY].sum()) / self.k
            taken = len(self.norms) - len(self.waiting)
            solved = int(taken - sum(self.unfinished))
            if solved > self.reported:
                self.progress(solved - self.reported)
                self.reported = solved
