"""Multiply rows as 16-bit integers, by the instruction that multiplies pairs of them and adds both products.

It multiplies twice as many numbers as one for float32 does, or four times as many where it adds to a sum, too (VNNI).
Each row is multiplied by a power of two, so that its integers keep nearly all digits of a row in bfloat16. Sums of a
BLOCK are exact; those of blocks are added in float32.

Letters in shapes: n rows, d dimensions, C chunks of dimensions, P panels of rows.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy import ndarray
from torch import Tensor

from mergekit_omp.solver.gram.kernels import entry_point
from mergekit_omp.solver.gram.layout import STRIP
from mergekit_omp.solver.gram.vectors import INTEGER, PLACE, SUM, WIDTH, add_products, element, pointer, repeated
from mergekit_omp.solver.threads import map_in_threads

LANES = WIDTH // 2
"""Sums in a vector."""

PANEL = 2 * LANES
"""Rows that are packed together: two vectors for each pair of dimensions."""

TILE = 4
"""Rows that are multiplied with all of a panel at a time; the sums fill half of the registers of 16."""

BLOCK, CHUNK = 16, 64
"""Pairs of dimensions whose products are added as integers, and pairs that are multiplied for all rows before the next
ones: those of a strip fit into the L2 cache, and lie one after the other, so that they do not displace each other."""

MOST, LONGEST = 2**15 - 1, 2**15.5 - 8
"""The largest number of a row, and the largest norm of a block of it, before numbers are rounded. That adds less than
6 to a norm, so that no sum of products exceeds 31 bits."""

FURTHEST = 1020
"""The largest exponent, in either direction, of the powers of two that rows are multiplied by."""


class Packed(NamedTuple):
    """Rows as integers.

    Attributes:
        panels: int32 (C, P, CHUNK, PANEL). Each holds two neighbouring numbers of a row; padding is zeros.
        factors: float32 (n,), the inverse norms of the rows that the integers stand for; 0 for a norm of 0.
        errors: float64 (n,), the norm of what rounding changes, divided by that of the row.
    """

    panels: ndarray
    factors: ndarray
    errors: ndarray


NOT_PACKED = np.empty((0, 0, CHUNK, PANEL), np.int32)
"""Stands for panels of rows that are multiplied in float32."""


def pack(rows: Tensor, norms: Tensor, threads: int = 1) -> Packed:
    """Round rows (n, d) of norms (n,), times powers of two, to integers."""
    count, dim = rows.shape
    panels = torch.empty(-(-dim // (2 * CHUNK)), -(-count // PANEL), CHUNK, PANEL, dtype=torch.int32)
    factors, errors = torch.empty(count), torch.empty(count, dtype=torch.float64)

    def pack_strip(start: int) -> None:
        part = slice(start, start + STRIP)
        scaled, lengths = rows[part].double(), norms[part].double()
        blocks = torch.stack([block.norm(dim=1) for block in scaled.split(2 * BLOCK, dim=1)])
        largest = torch.maximum(scaled.abs().amax(1) / MOST, blocks.amax(0) / LONGEST)
        exponents = -torch.frexp(largest)[1].clamp(-FURTHEST, FURTHEST)
        powers = torch.from_numpy(np.ldexp(1.0, exponents.numpy()))
        scaled *= powers[:, None]
        rounded = scaled.round()
        inverse = torch.where(lengths > 0, 1 / (lengths * powers), 0.0)
        factors[part], errors[part] = inverse, (rounded - scaled).norm(dim=1) * inverse
        padded = torch.nn.functional.pad(rounded.short(), (0, -dim % (2 * CHUNK), 0, -len(rounded) % PANEL))
        pairs = padded.view(torch.int32).unflatten(1, (-1, CHUNK)).unflatten(0, (-1, PANEL))
        panels[:, start // PANEL : (start + STRIP) // PANEL] = pairs.permute(2, 0, 3, 1)

    map_in_threads(pack_strip, range(0, count, STRIP), threads)
    return Packed(panels.numpy(), factors.numpy(), errors.numpy())


def blocks_of(dim: int) -> int:
    """Return the number of blocks of rows with so many dimensions, whose sums are added in float32."""
    return -(-dim // (2 * BLOCK))


def multiply(left: ndarray, row: int, right: ndarray, column: int, shape: tuple[int, int], dim: int) -> ndarray:
    """Return the inner products float32 of rows with ``dim`` numbers of two matrices.

    Args:
        left: panels of a matrix.
        row: its first row, the first of a panel.
        right: panels of a matrix.
        column: its first row, the first of a panel.
        shape: number of rows of both.
        dim: number of dimensions.
    """
    height, width = (-(-count // PANEL) * PANEL for count in shape)
    product = np.zeros((height, width), np.float32)
    _multiply_panels(left, row // PANEL, right, column // PANEL, blocks_of(dim), product)
    return np.ascontiguousarray(product[: shape[0], : shape[1]])


@entry_point
def _multiply_panels(left: ndarray, row: int, right: ndarray, column: int, blocks: int, product: ndarray) -> None:
    """Add inner products to ``product``: of so many rows of panels, from a ``row`` and a ``column`` of panels on."""
    rows, columns = product.shape[0] // PANEL, product.shape[1] // PANEL
    for chunk in range(len(left)):
        count = min(CHUNK // BLOCK, blocks - chunk * (CHUNK // BLOCK))
        for i in range(rows):
            for first in range(0, PANEL, TILE):
                for j in range(columns):
                    multiply_tile(left, row + i, first, right, column + j, chunk, count, product, i, j)


@intrinsic
def _multiply_tile(
    typing_context: Any,
    left: Any,
    row: Any,
    first: Any,
    right: Any,
    column: Any,
    chunk: Any,
    blocks: Any,
    product: Any,
    i: Any,
    j: Any,
) -> Any:
    """Multiply blocks of a chunk of two panels, all rows of one by TILE of the other from a ``first`` on.

    The sums are added to the ``product`` of panels i and j.
    """
    integers, sums = ir.VectorType(INTEGER, WIDTH), ir.VectorType(SUM, LANES)
    floats = ir.VectorType(ir.FloatType(), LANES)
    vectors = range(0, PANEL, LANES)
    tile = [(number, place) for number in range(TILE) for place in vectors]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, row, first, right, column, chunk, blocks, product, i, j = arguments
        kinds = signature.args
        ones = element(context, builder, kinds[0], left, chunk, row, PLACE(0), first)
        others = element(context, builder, kinds[3], right, chunk, column, PLACE(0), PLACE(0))

        def load(kind: Any, address: Any, number: int) -> Any:
            at = builder.add(address, PLACE(4 * number))
            return builder.load(builder.inttoptr(at, kind.as_pointer()), align=4)

        none = ir.Constant(floats, [0.0] * LANES)
        totals = {at: cgutils.alloca_once_value(builder, none) for at in tile}
        with cgutils.for_range(builder, blocks) as block:
            parts = {at: cgutils.alloca_once_value(builder, ir.Constant(sums, [0] * LANES)) for at in tile}
            before = builder.mul(block.index, PLACE(BLOCK))
            with cgutils.for_range(builder, PLACE(BLOCK)) as pair:
                offset = builder.mul(builder.add(before, pair.index), PLACE(4 * PANEL))
                one, other = builder.add(ones, offset), builder.add(others, offset)
                columns = {place: load(integers, other, place) for place in vectors}
                rows = [builder.bitcast(repeated(builder, load(SUM, one, at), LANES), integers) for at in range(TILE)]
                for (number, place), part in parts.items():
                    builder.store(add_products(builder, builder.load(part), columns[place], rows[number]), part)
            for at, part in parts.items():
                added = builder.fadd(builder.load(totals[at]), builder.sitofp(builder.load(part), floats))
                builder.store(added, totals[at])
        for (number, place), total in totals.items():
            at = builder.add(builder.mul(i, PLACE(PANEL)), builder.add(first, PLACE(number)))
            to = builder.add(builder.mul(j, PLACE(PANEL)), PLACE(place))
            entries = pointer(context, builder, floats, kinds[7], product, at, to)
            added = builder.fadd(builder.load(entries, align=4), builder.load(total))
            builder.store(added, entries, align=4)
        return context.get_dummy_value()

    integer = types.int64
    counts = (integer, integer, integer)
    return types.void(left, integer, integer, right, *counts, product, integer, integer), generate


multiply_tile: Any = _multiply_tile
