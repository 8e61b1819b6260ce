"""Orthogonalise on a GPU in one Triton kernel, which reads the basis once and uses each row twice from registers.

Letters in shapes: B targets, N atoms, d dimensions, k sparsity.
"""

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

from mergekit_omp.solver.tolerances import CANCELLED, DEPENDENT

LARGEST = 2**14
"""Largest dimension at which a row fits into the registers of one program."""

COMPILING = threading.Lock()
"""Serialises compilation: each GPU has its own thread, and Triton does not document thread safety."""


def launch_orthogonalize(
    atoms: Tensor, choice: Tensor, atom_norm: Tensor, useful: Tensor, basis: Tensor, size: int, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; see :func:`mergekit_omp.solver.scan.projection.orthogonalize`."""
    count, dim = residual.shape
    length, weight = torch.empty_like(atom_norm), torch.empty_like(atom_norm)
    width = max(16, triton.next_power_of_2(dim))
    with COMPILING, torch.cuda.device_of(residual):
        _orthogonalize[(count,)](
            atoms.contiguous(),
            choice.contiguous(),
            atom_norm.contiguous(),
            useful.contiguous(),
            basis,
            residual,
            length,
            weight,
            size,
            dim,
            basis.stride(0),
            residual.stride(0),
            CANCELLED,
            DEPENDENT,
            WIDTH=width,
            ROWS=LARGEST // width if width > 256 else 64,
            num_warps=8 if width > 256 else 4,
        )
    return length, weight


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


@triton.jit(do_not_specialize=["size"])
def _orthogonalize(
    atoms,
    choice,
    atom_norm,
    useful,
    basis,
    residual,
    length,
    weight,
    size,
    dim,
    basis_stride,
    residual_stride,
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
    norm = tl.load(atom_norm + target)
    component = tl.load(atoms + tl.load(choice + target) * dim + columns, mask=inside, other=0.0)
    component = _component_outside(component, basis_at, size, dim, columns, WIDTH, ROWS)
    long = tl.sqrt(tl.sum(component * component, axis=0))
    if long < CANCELLED * norm:
        component = _component_outside(component, basis_at, size, dim, columns, WIDTH, ROWS)
        long = tl.sqrt(tl.sum(component * component, axis=0))
    taken = tl.load(useful + target) & (long > DEPENDENT * norm)
    long = tl.where(taken, long, 0.0)
    direction = component * tl.where(taken, 1.0 / tl.maximum(long, 1e-38), 0.0)
    before = tl.load(residual + target * residual_stride + columns, mask=inside, other=0.0)
    amount = tl.sum(direction * before, axis=0)
    tl.store(basis_at + size * dim + columns, direction, mask=inside)
    tl.store(residual + target * residual_stride + columns, before - amount * direction, mask=inside)
    tl.store(length + target, long)
    tl.store(weight + target, amount)
