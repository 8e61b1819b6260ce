"""Triton kernels of the operations in fixed shapes, which read no more of the atoms and bases than is used.

Letters in shapes: B targets, N atoms, d dimensions, k sparsity, P places for candidates.
"""

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

from mergekit_omp.solver.tolerances import CANCELLED, DEPENDENT

LARGEST = 2**13
"""Largest dimension at which a row in float64 fits into the registers of one program."""

COMPILING = threading.Lock()
"""Serialises compilation: each GPU has its own thread, and Triton does not document thread safety."""


def launch_correlate(residual: Tensor, atoms: Tensor, candidates: Tensor) -> Tensor:
    """Launch the kernel; see :func:`mergekit_omp.solver.scan.gpu_operations.correlate`."""
    width, warps = _program(residual)
    correlations = residual.new_empty(candidates.shape)
    with COMPILING, torch.cuda.device_of(residual):
        _correlate[(len(residual),)](
            residual,
            atoms.contiguous(),
            candidates.contiguous(),
            correlations,
            residual.shape[1],
            PLACES=candidates.shape[1],
            WIDTH=width,
            num_warps=warps,
        )
    return correlations


def launch_orthogonalize(
    atoms: Tensor, choice: Tensor, atom_norm: Tensor, useful: Tensor, basis: Tensor, size: Tensor, residual: Tensor
) -> Tensor:
    """Launch the kernel; see :func:`mergekit_omp.solver.scan.gpu_operations.orthogonalize`."""
    width, warps = _program(residual)
    added = torch.empty_like(useful)
    with COMPILING, torch.cuda.device_of(residual):
        _orthogonalize[(len(residual),)](
            atoms.contiguous(),
            choice.contiguous(),
            atom_norm.contiguous(),
            useful.contiguous(),
            basis,
            size,
            residual,
            added,
            residual.shape[1],
            basis.stride(0),
            CANCELLED,
            DEPENDENT,
            WIDTH=width,
            ROWS=min(32, LARGEST // width),
            num_warps=warps,
        )
    return added


def _program(rows: Tensor) -> tuple[int, int]:
    """Return the width that holds a row of (B, d), and the number of warps of a program for it."""
    width = max(16, triton.next_power_of_2(rows.shape[1]))
    return width, 4 if width <= 256 else 8 if width <= 2048 else 16


@triton.jit
def _correlate(residual, atoms, candidates, correlations, dim, PLACES: tl.constexpr, WIDTH: tl.constexpr):
    """Process one target per program."""
    target = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < dim
    left = tl.load(residual + target * dim + columns, mask=inside, other=0.0)
    for place in range(PLACES):
        atom = tl.load(candidates + target * PLACES + place)
        right = tl.load(atoms + atom * dim + columns, mask=columns < tl.where(atom >= 0, dim, 0), other=0.0)
        inner = tl.abs(tl.sum(left * right.to(tl.float64), axis=0))
        tl.store(correlations + target * PLACES + place, tl.where(atom >= 0, inner, -1.0))


@triton.jit
def _component_outside(vector, basis_at, size, dim, columns, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Subtract from a vector (d,) its projection on the span of orthonormal rows (size, d)."""
    component = vector
    for first in range(0, size, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < size)[:, None] & (columns < dim)[None, :]
        rows = tl.load(basis_at + row[:, None] * dim + columns[None, :], mask=inside, other=0.0)
        products = tl.sum(rows * vector[None, :], axis=1)
        component -= tl.sum(rows * products[:, None], axis=0)
    return component


@triton.jit
def _orthogonalize(
    atoms,
    choice,
    atom_norm,
    useful,
    basis,
    sizes,
    residual,
    added,
    dim,
    basis_stride,
    CANCELLED,
    DEPENDENT,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Process one target per program."""
    target = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < dim
    basis_at = basis + target * basis_stride
    wanted = tl.load(useful + target)
    size = tl.where(wanted, tl.load(sizes + target), 0).to(tl.int32)  # reads no basis where it is of no use
    norm = tl.load(atom_norm + target)
    component = tl.load(atoms + tl.load(choice + target) * dim + columns, mask=inside, other=0.0).to(tl.float64)
    component = _component_outside(component, basis_at, size, dim, columns, WIDTH, ROWS)
    long = tl.sqrt(tl.sum(component * component, axis=0))
    if long < CANCELLED * norm:
        component = _component_outside(component, basis_at, size, dim, columns, WIDTH, ROWS)
        long = tl.sqrt(tl.sum(component * component, axis=0))
    taken = wanted & (long > DEPENDENT * norm)
    direction = component / tl.where(taken, long, 1.0)
    stored = columns < tl.where(taken, dim, 0)
    before = tl.load(residual + target * dim + columns, mask=inside, other=0.0)
    amount = tl.sum(direction * before, axis=0)
    tl.store(basis_at + size * dim + columns, direction, mask=stored)
    tl.store(residual + target * dim + columns, before - amount * direction, mask=stored)
    tl.store(added + target, taken)
