"""Several threads that each take whole pieces of work.

A pursuit is many small operations. Threads that each work on pieces of their own never wait for each other, as those
of one operation do.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

CPU = torch.device("cpu")

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def in_lanes(
    work: Callable[[Piece], Result], pieces: Iterable[Piece], lanes: int, device: torch.device = CPU
) -> list[Result]:
    """``work`` of each piece, in order; ``lanes`` threads take turns.

    In each of them torch uses one CPU thread, or, for a GPU, a stream of its own. What the calling thread has put into
    its own stream is done before, and the results must not wait for anything in the stream that they come from.
    """
    if lanes == 1:
        return [work(piece) for piece in pieces]
    if device.type == "cuda":
        before = torch.cuda.current_stream(device)

        def enter() -> None:
            stream = torch.cuda.Stream(device)
            stream.wait_stream(before)
            torch.cuda.set_stream(stream)

        with ThreadPoolExecutor(lanes, initializer=enter) as pool:
            return list(pool.map(work, pieces))
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, pieces))
    finally:
        torch.set_num_threads(threads)
