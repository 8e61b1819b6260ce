"""Choose the method that solves a problem, and its chunk size.

Both methods find the same codes. With a Gram matrix a correlation costs t products in step t instead of d, at two
bytes per pair of atoms and the time to build the matrix. It is used on CPUs where it is faster and fits into memory.
"""

import logging
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from mergekit_omp.solver import memory
from mergekit_omp.solver.memory import ProblemShape
from mergekit_omp.solver.scan import int8

LOG = logging.getLogger(__name__)

SCAN_COST = {torch.int8: 0.3, torch.float16: 1.0, torch.float32: 1.0}
"""Measured time of one multiplication in a scan, by dtype, relative to a float32 matrix product on the device."""

GRAM_BUILD_COST, GRAM_STEP_COST = 1.0, 1.5
"""Measured time of one multiplication in the same unit: of the N² d to build the matrix, and of the N k² per
target."""

GRAM_MIN_GAIN = 2**39
"""Multiplications that a matrix has to save: some seconds, as long as compiling takes on first use."""


@dataclass(frozen=True)
class SolvePlan:
    """Describe how one problem is solved on one device.

    Attributes:
        method: ``gram`` (propose several steps, verify them in one scan) or ``scan`` (scan all atoms in every step).
        dtype: dtype of the Gram matrix, or of the rounded atoms.
        threads: number of chunks that are solved concurrently.
        chunk: targets per chunk.
        pairs: limit of a ``scan`` thread on pairs of a target and a candidate atom in memory.
        matrix_bytes: memory of the matrix and the atoms.
        speedup: estimated time of ``scan`` divided by the time of this method.
    """

    method: str
    dtype: torch.dtype
    threads: int
    chunk: int
    pairs: int
    matrix_bytes: int
    speedup: float

    def __str__(self) -> str:
        """Format the plan for the log."""
        name = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.method} in {name}, {self.threads} threads x {self.chunk} targets, "
            f"{self.matrix_bytes / 2**20:,.0f} MiB for matrices"
        )


def plan_solve(
    device: torch.device, shape: ProblemShape, *, memory_budget: int | None = None, sharing: int = 1
) -> SolvePlan:
    """Choose the method and the chunk size for a problem on a device.

    Args:
        device: device of the solve.
        shape: sizes of the problem, counting duplicate atoms once.
        memory_budget: memory limit in bytes, excluding the inputs; by default a share of the free memory.
        sharing: number of concurrent solves on this device, which share the budget and the cores.
    """
    budget = memory.budget_on(device, memory_budget) // sharing
    threads = max(1, torch.get_num_threads() // sharing) if device.type == "cpu" else 1
    pairs = memory.pairs_at_a_time(budget, shape.atoms, threads)
    speedup = gram_speedup(device, shape)
    chunk = memory.gram_chunk(budget, shape, threads) if speedup > 1 else 0
    if chunk > 0:
        matrix_bytes = memory.gram_matrix_bytes(shape, threads)
        return SolvePlan("gram", torch.int16, threads, chunk, pairs, matrix_bytes, speedup)
    dtype = scan_dtype(device)
    chunk = memory.scan_chunk(device, budget, shape, threads, pairs, dtype)
    return SolvePlan("scan", dtype, threads, chunk, pairs, memory.scan_matrix_bytes(shape, dtype), 1.0)


def gram_speedup(device: torch.device, shape: ProblemShape) -> float:
    """Estimate the speedup of a Gram matrix over a scan in every step; 1 where the matrix does not pay off.

    Memory is not considered.
    """
    targets, atoms, dim, k = shape
    scans = SCAN_COST[scan_dtype(device)] * targets * atoms * dim * k
    gram = GRAM_BUILD_COST * atoms**2 * dim + targets * atoms * (dim + GRAM_STEP_COST * k**2)
    if device.type != "cpu" or scans - gram <= GRAM_MIN_GAIN or load_gram_search() is None:
        return 1.0
    return scans / gram


def scan_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of the fastest matrix product on the device."""
    if device.type == "cpu" and int8.is_supported():
        return torch.int8
    tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
    return torch.float16 if tensor_cores else torch.float32


@cache
def load_gram_search() -> ModuleType | None:
    """Return the module that solves with a Gram matrix, or None without numba; results do not depend on it."""
    try:
        from mergekit_omp.solver.gram import search
    except ImportError as error:  # numba does not support every Python version
        LOG.warning("Solving without numba, which takes several times as long: %s", error)
        return None
    except RuntimeError as error:  # neither the package folder nor the user's cache is writable
        LOG.warning(
            "Solving without numba, which takes several times as long; set NUMBA_CACHE_DIR to a writable folder: %s",
            error,
        )
        return None
    return search
