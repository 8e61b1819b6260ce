"""A step of a pursuit on a GPU, which reads the basis once: each row is used twice while it is in registers.

Letters in shapes: B targets, N atoms, d dimensions, k sparsity.
"""

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

from mergekit_omp.solver.scan.projection import CANCELLED, DEPENDENT

LARGEST = 2**14
"""Dimensions up to which a row fits into the registers of a program."""

COMPILING = threading.Lock()
"""Each GPU has a thread; Triton does not promise that two of them may compile at once."""


def take(
    atoms: Tensor, choice: Tensor, whole: Tensor, wanted: Tensor, basis: Tensor, size: int, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`mergekit_omp.solver.scan.projection.take`."""
    count, dim = residual.shape
    length, weight = torch.empty_like(whole), torch.empty_like(whole)
    width = max(16, triton.next_power_of_2(dim))
    with COMPILING, torch.cuda.device_of(residual):
        _take[(count,)](
            atoms.contiguous(),
            choice.contiguous(),
            whole.contiguous(),
            wanted.contiguous(),
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
def _outside(atom, rows_at, size, dim, places, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """What of an atom (d,) is outside the span of rows (size, d)."""
    rest = atom
    for first in range(0, size, ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < size)[:, None] & (places < dim)[None, :]
        seen = tl.load(rows_at + row[:, None] * dim + places[None, :], mask=there, other=0.0)
        shadow = tl.sum(seen * atom[None, :], axis=1)
        rest -= tl.sum(seen * shadow[:, None], axis=0)
    return rest


@triton.jit(do_not_specialize=["size"])
def _take(
    atoms,
    choice,
    whole,
    wanted,
    basis,
    residual,
    length,
    weight,
    size,
    dim,
    basis_step,
    residual_step,
    CANCELLED,
    DEPENDENT,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One target a program."""
    target = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, WIDTH)
    inside = places < dim
    rows_at = basis + target * basis_step
    norm = tl.load(whole + target)
    rest = tl.load(atoms + tl.load(choice + target) * dim + places, mask=inside, other=0.0)
    rest = _outside(rest, rows_at, size, dim, places, WIDTH, ROWS)
    long = tl.sqrt(tl.sum(rest * rest, axis=0))
    if long < CANCELLED * norm:
        rest = _outside(rest, rows_at, size, dim, places, WIDTH, ROWS)
        long = tl.sqrt(tl.sum(rest * rest, axis=0))
    taken = tl.load(wanted + target) & (long > DEPENDENT * norm)
    long = tl.where(taken, long, 0.0)
    direction = rest * tl.where(taken, 1.0 / tl.maximum(long, 1e-38), 0.0)
    left = tl.load(residual + target * residual_step + places, mask=inside, other=0.0)
    amount = tl.sum(direction * left, axis=0)
    tl.store(rows_at + size * dim + places, direction, mask=inside)
    tl.store(residual + target * residual_step + places, left - amount * direction, mask=inside)
    tl.store(length + target, long)
    tl.store(weight + target, amount)
