"""Compute how many targets at a time fit into a memory budget. All sizes are in bytes."""

from typing import NamedTuple

import psutil
import torch

from mergekit_omp.solver.gram.layout import BLOCK, TILE, padded
from mergekit_omp.solver.least_squares import block_numbers
from mergekit_omp.solver.scan.screening import group_size

SHARE_OF_FREE = 0.6
"""What a solve takes of the memory that is free on a device, unless the caller sets a budget."""

LARGEST_CHUNK = {"cpu": 256, "cuda": 20_480}
"""Targets at a time: more gain nothing on a CPU, and fewer would leave a GPU waiting for its next commands."""

LARGEST_SCAN = 2**31 - 1
"""Correlations at a time: more could not be counted in 32 bits, for which a GPU has its fastest operations."""

PAIR_BYTES = 140
"""What a pair of a target and an atom that may be its best one takes while the best is chosen."""

LARGEST_PAIRS = 2**24
"""Such pairs at a time: there are as many only where targets have nothing to do with the atoms."""

GRAM_CHUNK = 128
"""Targets at a time for each thread that solves by a Gram matrix: enough for the products of targets and atoms."""

KEPT_BLOCK = 2**25
"""The largest block that glibc keeps when it is freed. A larger one is fetched from the system again at each step and
cleared, which takes a third of the time of the product that fills it."""


class ProblemShape(NamedTuple):
    """How many ``targets`` are approximated by ``atoms`` of ``dim`` dimensions, with at most ``k`` for each target."""

    targets: int
    atoms: int
    dim: int
    k: int


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def budget_on(device: torch.device, budget: int | None) -> int:
    """Return the bytes that a solve may hold on a device: the caller's, or a share of what is free now."""
    return int(free_memory(device) * SHARE_OF_FREE) if budget is None else budget


def pairs_at_a_time(budget: int, atoms: int, threads: int) -> int:
    """Return how many pairs of a target and an atom each thread may hold.

    They take an eighth of the budget; all atoms of one target are possible whatever the budget.
    """
    return max(atoms, min(LARGEST_PAIRS, budget // (8 * threads * PAIR_BYTES)))


def scan_matrix_bytes(shape: ProblemShape) -> int:
    """Return what the atoms take in float32, and a rounded copy, which int8 holds twice while it is packed."""
    return shape.atoms * shape.dim * 6


def scan_chunk(
    device: torch.device, budget: int, shape: ProblemShape, threads: int, pairs: int, correlation_bytes: int
) -> int:
    """Return how many targets each thread takes at a time when every step scans all atoms.

    Args:
        device: where to work.
        budget: bytes that may be held there.
        shape: of the problem that this device solves.
        threads: chunks that are worked on at a time.
        pairs: of a target and an atom that each thread may hold.
        correlation_bytes: bytes of one correlation in the screen's dtype.
    """
    room = budget - scan_matrix_bytes(shape) - shape.atoms * 64
    room = room // threads - PAIR_BYTES * pairs
    room -= 16 * block_numbers(device)  # of float64 least squares
    places = shape.atoms + group_size(device)
    most = min(LARGEST_CHUNK.get(device.type, 512), LARGEST_SCAN // places)
    if device.type == "cpu":
        most = min(most, KEPT_BLOCK // (correlation_bytes * places))
    # Of one target, counted generously: the pursuit, and its copy when finished targets are dropped; the correlations,
    # with what is held of each group.
    each = 4 * (2 * shape.k * shape.dim + 8 * shape.dim) + places * (correlation_bytes + 1) + 8 * shape.k
    return _even(min(room // each, most), shape.targets, threads)


def gram_matrix_bytes(shape: ProblemShape, threads: int) -> int:
    """Return what a Gram matrix holds, with its atoms, and while it is built."""
    _, atoms, dim, _ = shape
    return padded(atoms) * (2 * atoms + 32) + 4 * dim * atoms + threads * 4 * BLOCK * (BLOCK + 2 * dim)


def gram_chunk(budget: int, shape: ProblemShape, threads: int) -> int:
    """Return how many targets each thread takes at a time with a Gram matrix; 0 where the budget has no room for it.

    The arguments are those of :func:`scan_chunk`.
    """
    targets, atoms, dim, k = shape
    room = (budget - gram_matrix_bytes(shape, threads)) // threads
    workspace = k * (8 * k + 4 * dim + 12 * TILE) + 200 * dim + 2**20
    each = 4 * (padded(atoms) + 2 * BLOCK) + 24 * dim + 32 * k
    chunk = min(GRAM_CHUNK, (room - workspace) // each)
    return _even(chunk, targets, threads) if chunk > 0 else 0


def _even(chunk: int, targets: int, threads: int) -> int:
    """A chunk of at most that size, and at least 1, with which no thread waits for the last chunk of another."""
    rounds = -(-targets // (threads * max(1, chunk)))
    return -(-targets // (threads * rounds))
