"""Choose the method that solves a problem, and its chunk size.

Both methods find the same codes. With a Gram matrix a correlation costs t products in step t instead of d, at two
bytes per pair of atoms and the time to build the matrix. It is used on CPUs where it is faster and fits into memory.
"""

import logging
import math
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from mergekit_omp.solver import memory
from mergekit_omp.solver.gram.state import slot_bytes
from mergekit_omp.solver.memory import ProblemShape
from mergekit_omp.solver.rates import Rates, measure_rates

LOG = logging.getLogger(__name__)

BUILD_COST = 0.6
"""Measured time of one of the N² d products of a Gram matrix, of which half are made, in units of the time of one
product of a matrix product."""

MORE_SCANS, MORE_ROWS = 16, 32
"""A target takes about (k + MORE_SCANS) / 4 scans, and each as long as (k + MORE_ROWS) / 2 rows: it compares, too."""

WHOLE_SCAN_COST, HALF_SCAN_COST = 0.9, 1.4
"""Measured time of one of the N atoms in the scans of a target, divided by (k + MORE_SCANS) (k + MORE_ROWS), in units
of the time of one product in a scan of rows in the cache."""

FIT_COST = 16
"""Measured time of one of the d dimensions in a target's fits, residuals and exact correlations, divided by
k (k + MORE_SCANS); this and the costs below are in units of the time of one product of a float32 matrix product."""

MIRROR_COST = 1.0
"""Measured time in which one of the N² cosines of a half matrix is completed in the scans of a target, divided by
k + MORE_SCANS."""

CLEAR_COST = 100
"""Measured time in which the system clears and maps a byte of memory that was not in use."""

GRAM_MIN_GAIN = 2**38
"""Multiplications that a matrix has to save: some seconds, as long as compiling takes on first use."""


@dataclass(frozen=True)
class SolvePlan:
    """Describe how one problem is solved on one device.

    Attributes:
        method: ``gram`` (propose several steps, verify them in one scan) or ``scan`` (scan all atoms in every step).
        dtype: dtype of the Gram matrix, or of the rounded atoms.
        threads: number of chunks that are solved concurrently.
        chunk: targets per chunk, or with a Gram matrix targets that are solved together by all threads.
        half: whether a Gram matrix holds each pair of atoms once.
        in_integers: whether rows of a Gram matrix are multiplied as 16-bit integers, or in float32.
        pairs: limit of a ``scan`` thread on pairs of a target and a candidate atom in memory.
        matrix_bytes: memory of the matrix and the atoms, and of the targets that are solved together.
        products: float32 products of a matrix product that takes as long as the solve; for a scan 0.
    """

    method: str
    dtype: torch.dtype
    threads: int
    chunk: int
    pairs: int
    matrix_bytes: int
    products: float
    half: bool = False
    in_integers: bool = False

    def __str__(self) -> str:
        """Format the plan for the log."""
        name = str(self.dtype).removeprefix("torch.")
        if self.method == "gram":
            products = "integer" if self.in_integers else "float32"
            size = "half" if self.half else "whole"
            how = f"{size} gram in {name}, {products} products, {self.chunk} targets together"
        else:
            how = f"{self.method} in {name}, {self.threads} threads x {self.chunk} targets"
        return f"{how}, {self.matrix_bytes / 2**20:,.0f} MiB for matrices"


def plan_solve(
    device: torch.device,
    shape: ProblemShape,
    *,
    memory_budget: int | None = None,
    sharing: int = 1,
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
    rates = _rates_on(device, shape)
    plans = [_plan_gram(budget, shape, threads, pairs, rates, half=half) for half in (False, True)]
    fastest = min((plan for plan in plans if plan is not None), key=lambda plan: plan.products, default=None)
    if fastest is not None and gram_pays(device, shape, fastest.products):
        return fastest
    dtype = scan_dtype(device)
    chunk = memory.scan_chunk(device, budget, shape, threads, pairs, dtype)
    return SolvePlan("scan", dtype, threads, chunk, pairs, memory.scan_matrix_bytes(shape, dtype), 0.0)


def _plan_gram(
    budget: int, shape: ProblemShape, threads: int, pairs: int, rates: Rates, *, half: bool
) -> SolvePlan | None:
    """Plan a solve with a whole or half Gram matrix; return None if it does not fit into the budget."""
    slots = memory.gram_slots(budget, shape, threads, half=half)
    if not slots:
        return None
    held = memory.gram_matrix_bytes(shape, threads, half=half) + slots * slot_bytes(*shape[1:])
    products = gram_products(shape, slots, rates, half=half) + CLEAR_COST * held
    return SolvePlan("gram", torch.int16, threads, slots, pairs, held, products, half, rates.product < 1)


def gram_pays(device: torch.device, shape: ProblemShape, products: float) -> bool:
    """Tell whether a solve with a Gram matrix, which takes as long as so many products, is faster than a scan."""
    gain = math.prod(shape) - products
    return device.type == "cpu" and gain > GRAM_MIN_GAIN and load_gram_search() is not None


def gram_products(shape: ProblemShape, slots: int, rates: Rates, *, half: bool) -> float:
    """Return the number of products of a matrix product that takes as long as a solve in memory that was in use.

    Args:
        shape: sizes of the problem.
        slots: targets that are solved together, for which a half matrix is completed once.
        rates: times of the solver's own products.
        half: whether each pair of atoms is stored once.
    """
    targets, atoms, dim, k = shape
    scan = rates.scan * (HALF_SCAN_COST if half else WHOLE_SCAN_COST) * (k + MORE_ROWS) * atoms
    completion = MIRROR_COST * atoms**2 / slots if half else 0
    products = BUILD_COST * atoms**2 * dim + targets * atoms * dim
    return rates.product * products + targets * (k + MORE_SCANS) * (scan + FIT_COST * k * dim + completion)


def _rates_on(device: torch.device, shape: ProblemShape) -> Rates:
    """Return the rates of this CPU, measured where a Gram matrix could be faster than a scan."""
    return measure_rates() if gram_pays(device, shape, 0.0) else Rates()


def scan_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of the fastest matrix product on the device."""
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
