"""Solve several chunks of targets concurrently.

A pursuit consists of many small operations. One thread per chunk avoids the synchronisation that multithreaded
operations need.
"""

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

LOG = logging.getLogger(__name__)

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def map_in_threads(
    work: Callable[[Piece], Result],
    pieces: Iterable[Piece],
    threads: int,
    *,
    stop: Callable[[], object] = lambda: None,
) -> list[Result]:
    """Apply ``work`` to each piece and return the results in order; torch uses one core in each thread.

    On an error or an interrupt, ``stop`` is called, and then all threads are waited for.
    """
    if threads == 1:
        return [work(piece) for piece in pieces]
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                return list(pool.map(work, pieces))
            except BaseException:
                stop()
                raise
    finally:
        torch.set_num_threads(before)


def map_chunks(solve: Callable[[Tensor], Result], targets: Tensor, chunk: int, threads: int) -> list[Result]:
    """Apply ``solve`` to chunks of the targets (B, d) and return the results in order.

    With a single thread, as on a GPU, an out-of-memory error halves the chunk size.

    Raises:
        torch.cuda.OutOfMemoryError: if a single target does not fit.
    """
    if threads > 1:
        return map_in_threads(solve, targets.split(chunk), threads)
    solved, start = [], 0
    while start < len(targets):
        part = targets[start : start + chunk]
        try:
            solved.append(solve(part))
            start += len(part)
            continue
        except torch.cuda.OutOfMemoryError:
            if len(part) == 1:
                raise
            chunk = len(part) // 2
            LOG.warning("Out of memory with %d targets per chunk: continuing with %d.", len(part), chunk)
        torch.cuda.empty_cache()  # frees the blocks of the larger size, now that the exception does not refer to them
    return solved
