"""How much memory a solve may hold, and how many targets at a time fit into it."""

import os

import torch

from mergekit_omp.solver.gram.matrix import BLOCK, TILE, padded
from mergekit_omp.solver.least_squares import held
from mergekit_omp.solver.scan.screening import group_size

SHARE_OF_FREE = 0.6
"""What a solve takes of the memory that is free on a device, unless the caller sets a budget."""

LARGEST_CHUNK = {"cpu": 256, "cuda": 20_480}
"""Targets at a time: more gain nothing on a CPU, and fewer would leave a GPU waiting for its next commands."""

LARGEST_SCORES = 2**31 - 1
"""Scores at a time: more could not be counted in 32 bits, for which a GPU has its fastest operations."""

PAIR_BYTES = 140
"""What a pair of a target and an atom that may be its best one takes while the best is chosen."""

LARGEST_PAIRS = 2**24
"""Such pairs at a time: there are as many only where targets have nothing to do with the atoms."""

GRAM_CHUNK = 128
"""Targets at a time for each thread that solves by a Gram matrix: enough for the products of targets and atoms."""

KEPT_BLOCK = 2**25
"""Bytes of the largest block that glibc keeps when it is freed. A larger one is fetched from the system again at each
step and cleared, which takes a third of the time of the product that fills it."""


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def budget_on(device: torch.device, budget: int | None) -> int:
    """Bytes that a solve may hold on a device: what the caller says, or a share of what is free now."""
    return int(free_memory(device) * SHARE_OF_FREE) if budget is None else budget


def pairs_at_a_time(budget: int, atoms: int, lanes: int) -> int:
    """Pairs of a target and an atom that each of some lanes may hold at a time: an eighth of the budget, or all atoms
    for one target."""
    return max(atoms, min(LARGEST_PAIRS, budget // (8 * lanes * PAIR_BYTES)))


def chunk_size(
    device: torch.device, budget: int, targets: int, atoms: int, dim: int, k: int, lanes: int, score_bytes: int
) -> int:
    """Targets at a time.

    Args:
        device: where to work.
        budget: bytes that may be held there.
        targets: targets that this device solves.
        atoms: N.
        dim: d.
        k: the sparsity.
        lanes: chunks that are worked on at a time.
        score_bytes: bytes of a score in the screen's dtype.
    """
    room = budget - atoms * (dim * 6 + 64)  # float32, and a rounded copy, which int8 holds twice while it is packed
    room = room // lanes - PAIR_BYTES * pairs_at_a_time(budget, atoms, lanes)
    room -= 16 * held(device)  # what is settled and refitted in float64
    places = atoms + group_size(device)
    most = min(LARGEST_CHUNK.get(device.type, 512), LARGEST_SCORES // places)
    chunk = min(room // _bytes_per_target(places, dim, k, score_bytes), most)
    if device.type == "cpu":
        chunk = min(chunk, KEPT_BLOCK // (score_bytes * places))
    return _even(chunk, targets, lanes)


def _even(chunk: int, targets: int, lanes: int) -> int:
    """A chunk of at most that size, and at least 1, with which no lane waits for the last chunk of another."""
    rounds = -(-targets // (lanes * max(1, chunk)))
    return -(-targets // (lanes * rounds))


def _bytes_per_target(places: int, dim: int, k: int, score_bytes: int) -> int:
    """The most that is alive at a time for one target, counted generously, beside pairs."""
    state = 4 * (2 * k * dim + 8 * dim)  # the pursuit, and the copy when finished targets are dropped
    scores = places * (score_bytes + 1)  # with what is held of each group
    return state + scores + 8 * k


def gram_bytes(atoms: int, dim: int, lanes: int) -> int:
    """What a Gram matrix of N atoms holds, with its atoms, and while it is built."""
    return padded(atoms) * (2 * atoms + 32) + 4 * dim * atoms + lanes * 4 * BLOCK * (BLOCK + 2 * dim)


def _gram_lane_bytes(targets: int, atoms: int, dim: int, k: int) -> int:
    """What a thread holds that solves so many targets at a time by a Gram matrix."""
    return (
        targets * (4 * (padded(atoms) + 2 * BLOCK) + 24 * dim + 32 * k)
        + k * (8 * k + 4 * dim + 12 * TILE)
        + 200 * dim
        + 2**20
    )


def gram_chunk_size(budget: int, targets: int, atoms: int, dim: int, k: int, lanes: int) -> int:
    """Targets at a time for each thread that solves by a Gram matrix; 0 where the budget has no room for it.

    The arguments are those of :func:`chunk_size`.
    """
    room = (budget - gram_bytes(atoms, dim, lanes)) // lanes
    none = _gram_lane_bytes(0, atoms, dim, k)
    chunk = min(GRAM_CHUNK, (room - none) // (_gram_lane_bytes(1, atoms, dim, k) - none))
    return _even(chunk, targets, lanes) if chunk > 0 else 0
