"""Decide how a problem is solved, and how many targets at a time.

Both methods find the same codes. With a Gram matrix a correlation takes t products in step t instead of d, for two
bytes a pair of atoms and the time to build it; it is used on CPUs where it is faster and fits into the memory.
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
"""Time of a multiplication of a scan by its dtype, as measured; the unit is one of a plain product on the device."""

CORRELATION_BYTES = {torch.int8: 2, torch.float16: 2, torch.float32: 4}
"""Bytes of a correlation of a scan by its dtype."""

GRAM_BUILD_COST, GRAM_STEP_COST = 1.0, 1.5
"""Time of a multiplication by the Gram matrix, as measured: of its N² d, and of the N k² of a target."""

GRAM_MIN_GAIN = 2**39
"""Multiplications that a matrix has to save: some seconds, which compiling takes on first use."""


@dataclass(frozen=True)
class SolvePlan:
    """How to solve one problem on one device.

    Attributes:
        method: ``gram`` proposes steps and verifies several in one scan; ``scan`` scans all atoms in each step.
        dtype: of the matrix that rules atoms out: of the Gram matrix, or of the rounded atoms.
        threads: chunks of targets that are worked on at a time.
        chunk: targets in each of them.
        pairs: of a target and an atom that may be its best one, as many as a thread of ``scan`` holds at a time.
        matrix_bytes: memory that the matrix and the atoms take.
        speedup: the time that ``scan`` would take over that of this method.
    """

    method: str
    dtype: torch.dtype
    threads: int
    chunk: int
    pairs: int
    matrix_bytes: int
    speedup: float

    def __str__(self) -> str:
        """Describe the plan in a line of the log."""
        name = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.method} in {name}, {self.threads} x {self.chunk} targets at a time, "
            f"{self.matrix_bytes / 2**20:,.0f} MiB for matrices"
        )


def plan_solve(
    device: torch.device, shape: ProblemShape, *, memory_budget: int | None = None, sharing: int = 1
) -> SolvePlan:
    """Decide how a problem is solved on a device.

    Args:
        device: where to work.
        shape: of the problem, without copies of atoms.
        memory_budget: bytes that may be held there beside the inputs; by default a share of what is free.
        sharing: solves that run on this device at a time, and share the budget and the cores.
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
    chunk = memory.scan_chunk(device, budget, shape, threads, pairs, CORRELATION_BYTES[dtype])
    return SolvePlan("scan", dtype, threads, chunk, pairs, memory.scan_matrix_bytes(shape), 1.0)


def gram_speedup(device: torch.device, shape: ProblemShape) -> float:
    """Return the time of a scan in each step over that with a Gram matrix; 1 where the matrix does not pay.

    Whether there is room for it is another question.
    """
    targets, atoms, dim, k = shape
    scans = SCAN_COST[scan_dtype(device)] * targets * atoms * dim * k
    gram = GRAM_BUILD_COST * atoms**2 * dim + targets * atoms * (dim + GRAM_STEP_COST * k**2)
    if device.type != "cpu" or scans - gram <= GRAM_MIN_GAIN or gram_search() is None:
        return 1.0
    return scans / gram


def scan_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which the device multiplies fastest."""
    if device.type == "cpu" and int8.is_supported():
        return torch.int8
    tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
    return torch.float16 if tensor_cores else torch.float32


@cache
def gram_search() -> ModuleType | None:
    """Return the module that solves by a Gram matrix, or None without numba, which no right answer needs."""
    try:
        from mergekit_omp.solver.gram import search
    except ImportError as error:  # there is no numba for each Python
        LOG.warning("Solves take several times as long without numba: %s", error)
        return None
    except RuntimeError as error:  # neither the package's folder nor the user's cache can be written to
        LOG.warning("Solves take several times as long: set NUMBA_CACHE_DIR to a folder for numba's cache. %s", error)
        return None
    return search
