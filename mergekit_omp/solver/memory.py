"""Compute chunk sizes that fit into a memory budget. All memory sizes are in bytes."""

from typing import NamedTuple

import psutil
import torch

from mergekit_omp.solver.control_groups import free_in_control_groups
from mergekit_omp.solver.gram.layout import STRIP, matrix_places, padded
from mergekit_omp.solver.gram.state import LISTED, PART, slot_bytes
from mergekit_omp.solver.least_squares import block_values
from mergekit_omp.solver.scan.fixed_shape import CROWDED_SHARE, PLACES
from mergekit_omp.solver.scan.screening import group_size

SHARE_OF_FREE = 0.6
"""Share of a device's free memory that a solve uses by default."""

LARGEST_CHUNK = {"cpu": 256, "cuda": 20_480}
"""Targets per chunk: more do not help a CPU, and with fewer, the small kernels of a step take a GPU longer than its
product."""

LARGEST_SCAN = 2**31 - 1
"""Correlations per chunk: beyond this, indices need 64 bits, which are slower on a GPU."""

PAIR_BYTES = 140
"""Memory of one pair of a target and a candidate atom during selection."""

LARGEST_PAIRS = 2**24
"""Pairs in memory: there are that many only where targets are unrelated to the atoms."""

SLOTS, SLOTS_OF_HALF, FEWEST_OF_HALF = 256, 8192, 1024
"""Targets that are solved together: by each thread with a whole Gram matrix, by all threads with a half one, whose
strips are completed for all of them. With fewer, that takes longer than the scans."""

SCAN_BYTES = {torch.float16: 2, torch.float32: 4}
"""Bytes of a number of the rounded atoms, and of a correlation, by dtype of the scan."""

KEPT_BLOCK = 2**25
"""The largest block that glibc keeps when it is freed. The system allocates and clears a larger one again in every
step, which takes a third of the time of the product that fills it."""


class ProblemShape(NamedTuple):
    """Sizes of a problem: number of ``targets`` and ``atoms``, their dimension ``dim`` and the sparsity ``k``."""

    targets: int
    atoms: int
    dim: int
    k: int


def free_memory(device: torch.device) -> int:
    """Return the free memory of a device; for the CPU what the machine and the limits of a container or job leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *free_in_control_groups()])


def budget_on(device: torch.device, budget: int | None) -> int:
    """Return the given budget, or the default share of the device's free memory."""
    return int(free_memory(device) * SHARE_OF_FREE) if budget is None else budget


def pairs_at_a_time(budget: int, atoms: int, threads: int) -> int:
    """Return the number of pairs of a target and a candidate atom that each thread may hold.

    They take an eighth of the budget, but never fewer than all atoms of one target.
    """
    return max(atoms, min(LARGEST_PAIRS, budget // (8 * threads * PAIR_BYTES)))


def scan_matrix_bytes(shape: ProblemShape, dtype: torch.dtype) -> int:
    """Return the memory of the float32 atoms and a copy that is rounded to the dtype of the scan."""
    return shape.atoms * shape.dim * (4 + SCAN_BYTES[dtype])


def scan_chunk(
    device: torch.device, budget: int, shape: ProblemShape, threads: int, pairs: int, dtype: torch.dtype
) -> int:
    """Return the number of targets per chunk when every step scans all atoms.

    Args:
        device: device of the solve.
        budget: memory limit on it, in bytes.
        shape: sizes of the problem on this device.
        threads: number of chunks that are solved concurrently.
        pairs: number of pairs of a target and a candidate atom that each thread may hold.
        dtype: dtype of the scan.
    """
    room = budget - scan_matrix_bytes(shape, dtype) - shape.atoms * 64
    room = room // threads - PAIR_BYTES * pairs
    room -= 16 * block_values(device)  # float64 least squares
    places = shape.atoms + group_size(device)
    most = min(LARGEST_CHUNK.get(device.type, 512), LARGEST_SCAN // places)
    if device.type == "cpu":
        most = min(most, KEPT_BLOCK // (SCAN_BYTES[dtype] * places))
    # An upper bound for one target: the pursuit and its copy when finished targets are dropped; the correlations and
    # the peaks of their groups.
    target_bytes = 4 * (2 * shape.k * shape.dim + 8 * shape.dim) + places * (SCAN_BYTES[dtype] + 1) + 8 * shape.k
    if device.type == "cuda":  # a single copy of the pursuit, in float64; places for candidates; the crowded again
        target_bytes += 16 * shape.dim + 16 * PLACES * group_size(device)
        target_bytes += places * SCAN_BYTES[dtype] // CROWDED_SHARE
    return _balance(min(room // target_bytes, most), shape.targets, threads)


def gram_matrix_bytes(shape: ProblemShape, threads: int, *, half: bool) -> int:
    """Return the memory of a whole or half Gram matrix and its atoms, including buffers while it is built."""
    _, atoms, dim, _ = shape
    places, stride = matrix_places(atoms, half)
    matrix = 2 * places[-1] + (4 * stride * padded(atoms) if half else 0)
    return matrix + 8 * dim * atoms + 32 * atoms + threads * 4 * STRIP * (2 * STRIP + 2 * dim)


def gram_slots(budget: int, shape: ProblemShape, threads: int, *, half: bool) -> int:
    """Return the number of targets that are solved together with a Gram matrix, or 0 if too few fit.

    The arguments are those of :func:`scan_chunk`; ``half`` tells whether each pair of atoms is stored once.
    """
    targets, atoms, dim, k = shape
    room = budget - gram_matrix_bytes(shape, threads, half=half)
    room -= threads * (4 * k * LISTED + PART * (4 * STRIP + 20 * dim) + 2**20)
    room -= targets * (12 * k + 24)
    slots = min(SLOTS_OF_HALF if half else SLOTS * threads, targets, room // slot_bytes(atoms, dim, k))
    return slots if slots >= min(FEWEST_OF_HALF if half else threads, targets) else 0


def _balance(chunk: int, targets: int, threads: int) -> int:
    """Reduce a chunk size so that all threads finish at about the same time; the result is at least 1."""
    rounds = -(-targets // (threads * max(1, chunk)))
    return -(-targets // (threads * rounds))
