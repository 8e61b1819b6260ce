"""Work on chunks of targets, several at a time.

A pursuit is many small operations. Threads that work on chunks of their own never wait for each other, as the threads
inside one operation do.
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


def map_in_threads(work: Callable[[Piece], Result], pieces: Iterable[Piece], threads: int) -> list[Result]:
    """Return ``work`` of each piece, in order; torch uses a single core in each of the threads."""
    if threads == 1:
        return [work(piece) for piece in pieces]
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, pieces))
    finally:
        torch.set_num_threads(before)


def map_chunks(solve: Callable[[Tensor], Result], targets: Tensor, chunk: int, threads: int) -> list[Result]:
    """Return ``solve`` of chunks of the targets (B, d), in order.

    On a GPU, which has one thread, the chunks are half as large from an out-of-memory error on.

    Raises:
        torch.cuda.OutOfMemoryError: a single target does not fit.
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
            LOG.warning("Out of memory with %d targets at a time: going on with %d.", len(part), chunk)
        torch.cuda.empty_cache()  # blocks of the larger size; the exception, which held them, is gone
    return solved
