"""Several threads that each take whole pieces of work.

A pursuit is many small operations. Threads that each work on pieces of their own never wait for each other, as those
of one operation do.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def in_lanes(work: Callable[[Piece], Result], pieces: Iterable[Piece], lanes: int) -> list[Result]:
    """``work`` of each piece, in order; ``lanes`` threads, in each of which torch uses one thread, take turns."""
    if lanes == 1:
        return [work(piece) for piece in pieces]
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, pieces))
    finally:
        torch.set_num_threads(threads)
