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
from mergekit_omp.solver.gram.layout import MOST, STRIP
from mergekit_omp.solver.gram.vectors import INTEGER, LANES, PLACE, SUM, WIDTH, add_products, repeated
from mergekit_omp.solver.threads import map_in_threads

PANEL = 2 * LANES
"""Rows that are packed together: two vectors for each pair of dimensions."""

TILE = 4
"""Rows that are multiplied with all of a panel at a time; the sums fill half of the registers of 16."""

BLOCK, CHUNK = 16, 64
"""Pairs of dimensions whose products are added as integers, and pairs that are multiplied for all rows before the next
ones: those of a strip fit into the L2 cache, and lie one after the other, so that they do not displace each other."""

LONGEST = 2**15.5 - 8
"""The largest norm of a block of a row, before numbers are rounded. That adds less than 6 to it, so that no sum of
products exceeds 31 bits."""

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
    panel_bytes, row_bytes = left.strides[1], product.strides[0]
    for chunk in range(len(left)):
        count = min(CHUNK // BLOCK, blocks - chunk * (CHUNK // BLOCK))
        one = left.ctypes.data + chunk * left.strides[0] + row * panel_bytes
        other = right.ctypes.data + chunk * right.strides[0] + column * panel_bytes
        for first in range(0, product.shape[0], TILE):
            ones = one + first // PANEL * panel_bytes + 4 * (first % PANEL)
            to = product.ctypes.data + first * row_bytes
            for panel in range(product.shape[1] // PANEL):
                multiply_tile(ones, other + panel * panel_bytes, count, to + 4 * PANEL * panel, row_bytes)


@intrinsic
def _multiply_tile(typing_context: Any, ones: Any, others: Any, blocks: Any, product: Any, row_bytes: Any) -> Any:
    """Multiply TILE rows of a panel by all rows of another, in some blocks of a chunk, and add to the product.

    Given are addresses, of the first pairs of dimensions and of the first entry, and how far rows of the product lie
    apart.
    """
    integers, sums = ir.VectorType(INTEGER, WIDTH), ir.VectorType(SUM, LANES)
    floats = ir.VectorType(ir.FloatType(), LANES)
    tile = [(row, column) for row in range(TILE) for column in range(0, PANEL, LANES)]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ones, others, blocks, product, row_bytes = arguments

        def at(kind: Any, address: Any, place: int) -> Any:
            return builder.inttoptr(builder.add(address, PLACE(4 * place)), kind.as_pointer())

        none = ir.Constant(floats, [0.0] * LANES)
        totals = {entry: cgutils.alloca_once_value(builder, none) for entry in tile}
        with cgutils.for_range(builder, blocks) as block:
            parts = {entry: cgutils.alloca_once_value(builder, ir.Constant(sums, [0] * LANES)) for entry in tile}
            before = builder.mul(block.index, PLACE(BLOCK))
            with cgutils.for_range(builder, PLACE(BLOCK)) as pair:
                offset = builder.mul(builder.add(before, pair.index), PLACE(4 * PANEL))
                one, other = builder.add(ones, offset), builder.add(others, offset)
                columns = [builder.load(at(integers, other, place), align=4) for place in range(0, PANEL, LANES)]
                rows = [builder.load(at(SUM, one, place)) for place in range(TILE)]
                rows = [builder.bitcast(repeated(builder, row, LANES), integers) for row in rows]
                for (row, column), part in parts.items():
                    added = add_products(builder, builder.load(part), columns[column // LANES], rows[row])
                    builder.store(added, part)
            for entry, part in parts.items():
                whole = builder.sitofp(builder.load(part), floats)
                builder.store(builder.fadd(builder.load(totals[entry]), whole), totals[entry])
        for (row, column), total in totals.items():
            entries = at(floats, builder.add(product, builder.mul(row_bytes, PLACE(row))), column)
            added = builder.fadd(builder.load(entries, align=4), builder.load(total))
            builder.store(added, entries, align=4)
        return context.get_dummy_value()

    place = types.int64
    return types.void(place, place, place, place, place), generate


multiply_tile: Any = _multiply_tile
