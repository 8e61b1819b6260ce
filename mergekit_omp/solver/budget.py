"""How much memory a solve may hold, and what fits into it."""

import os
from dataclasses import dataclass

import torch

from mergekit_omp.solver.gram import DIRECTIONS
from mergekit_omp.solver.speculate import POOL, RESCORED, STEPS, SUSPECTS

SHARE_OF_FREE = 0.5
"""What a solve takes of the memory that is free on a device, unless the caller sets a budget."""

LARGEST_CHUNK = {"cpu": 64, "cuda": 2048}
"""Targets at a time: on a CPU more would leave its cache, on a GPU fewer would leave it idle."""


LARGE_SCAN = 40_000_000
"""Numbers N d from which a trial on a pool costs less than the scans that it saves (measured on a CPU)."""


@dataclass(frozen=True)
class Plan:
    """What is held on one device: the Gram matrix or not, and the targets in one chunk."""

    use_gram: bool
    chunk: int


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def plan(
    device: torch.device, budget: int, targets: int, atoms: int, dim: int, k: int, itemsize: int, lanes: int
) -> Plan:
    """Choose by shape and memory.

    Args:
        device: where to work.
        budget: bytes that may be held there.
        targets: targets that this device solves.
        atoms: N.
        dim: d.
        k: the sparsity.
        itemsize: bytes of a number in the screen's dtype.
        lanes: chunks that are worked on at a time.
    """
    fixed = atoms * dim * (4 + itemsize)
    gram = atoms * (atoms + DIRECTIONS) * itemsize + atoms * dim * itemsize + atoms * DIRECTIONS * 4
    least = 8 * lanes * _bytes_per_target(atoms, dim, k, itemsize, True)
    # The matrix costs N² d products, and a scan at each step costs B k N d.
    pays = 2 * targets * k > atoms and atoms * dim >= LARGE_SCAN and k > 2 * STEPS and dim >= 4 * k
    use_gram = pays and fixed + gram + least <= budget
    room = budget - fixed - (gram if use_gram else 0)
    chunk = room // (lanes * _bytes_per_target(atoms, dim, k, itemsize, use_gram))
    return Plan(use_gram, max(1, min(chunk, LARGEST_CHUNK.get(device.type, 512), -(-targets // lanes))))


def _bytes_per_target(atoms: int, dim: int, k: int, itemsize: int, use_gram: bool) -> int:
    """The most that is alive at a time for one target, counted generously."""
    state = 4 * (3 * k * dim + 5 * k * k + 6 * dim)  # the pursuit, and the copy when finished targets are dropped
    scores = atoms * (3 * itemsize + 1)
    rescored = 4 * SUSPECTS * dim
    refit = 8 * (2 * k * dim + 3 * k * k)
    if not use_gram:
        return scores + max(state + rescored, refit)
    pool = POOL * (k * 16 + 4 * DIRECTIONS + 4 * RESCORED)
    trial = 4 * STEPS * (6 * dim + 2 * k) + 8 * k * dim
    return 2 * scores + max(state + rescored + pool + trial, refit)
