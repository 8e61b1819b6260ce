"""Multiply rows in bfloat16 with the CPU's own instruction for it (AVX512-BF16), which adds in float32.

Rows of most checkpoints are in bfloat16. A product of two such numbers is exact in float32, so errors are no larger
than those of float32, in less than half the time. On a CPU torch rounds the sums of bfloat16 products to bfloat16.

Letters in shapes: n rows, d dimensions, P panels of rows, q pairs of dimensions.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy import ndarray
from torch import Tensor

from mergekit_omp.solver.gram.kernels import entry_point
from mergekit_omp.solver.gram.layout import STRIP
from mergekit_omp.solver.gram.vectors import PLACE, has_feature, pointer, repeated

PANEL = 32
"""Rows that are packed together: two vectors of 512 bits for each pair of dimensions."""

LANES = 16
"""Sums in a vector."""

TILE = 8
"""Rows that are multiplied with all of a panel at a time; the sums fill half of the registers."""

binding.initialize_native_asmparser()  # LLVM's names of this instruction differ between its versions

NOT_PACKED = np.empty((0, 0, PANEL), np.int32)
"""Stands for rows that are not packed."""


def is_supported() -> bool:
    """Tell whether the CPU has the instruction."""
    return has_feature("avx512bf16")


def pack(rows: Tensor, powers: Tensor) -> ndarray:
    """Pack rows (n, d) times powers of two (n,), which bfloat16 holds, into panels int32 (P, q, PANEL).

    An integer is two neighbouring numbers of a row. Padding is zeros.
    """
    count, dim = rows.shape
    packed = torch.empty(-(-count // PANEL), -(-dim // 2), PANEL, dtype=torch.int32)
    for start in range(0, count, STRIP):  # in strips, for the memory
        part = slice(start, start + STRIP)
        scaled = (rows[part] * powers[part, None]).bfloat16()
        padded = torch.nn.functional.pad(scaled, (0, dim % 2, 0, -len(scaled) % PANEL))
        panels(packed, start)[:] = padded.view(torch.int32).unflatten(0, (-1, PANEL)).transpose(1, 2)
    return packed.numpy()


def panels(packed: Any, start: int) -> Any:
    """Return the panels of a strip of rows that begins at row ``start``."""
    return packed[start // PANEL : (start + STRIP) // PANEL]


def multiply(left: ndarray, right: ndarray, rows: int, columns: int) -> ndarray:
    """Return the inner products float32 (rows, columns) of so many rows of two packed matrices."""
    product = np.empty((len(left) * PANEL, len(right) * PANEL), np.float32)
    _multiply_panels(left, right, product)
    return np.ascontiguousarray(product[:rows, :columns])


@entry_point
def _multiply_panels(left: ndarray, right: ndarray, product: ndarray) -> None:
    for row in range(len(left)):
        for column in range(len(right)):
            for first in range(0, PANEL, TILE):
                multiply_tile(left, row, first, right, column, left.shape[1], product)


@intrinsic
def _multiply_tile(
    typing_context: Any, left: Any, row: Any, first: Any, right: Any, column: Any, pairs: Any, product: Any
) -> Any:
    """Multiply TILE rows of a panel, from a ``first`` one on, with all of another panel, and write the sums."""
    integer, integers = ir.IntType(32), ir.VectorType(ir.IntType(32), LANES)
    floats = ir.VectorType(ir.FloatType(), LANES)
    no_sum = ir.Constant(floats, [0.0] * LANES)
    multiply_add = ir.InlineAsm(
        ir.FunctionType(floats, [floats, integers, integers]), "vdpbf16ps $3, $2, $0", "=v,0,v,v"
    )
    vectors = range(0, PANEL, LANES)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, row, first, right, column, pairs, product = arguments
        kinds = signature.args

        at_element = partial(pointer, context, builder)
        sums = [[cgutils.alloca_once_value(builder, no_sum) for _ in vectors] for _ in range(TILE)]
        rows = [builder.add(first, PLACE(number)) for number in range(TILE)]
        with cgutils.for_range(builder, pairs) as loop:
            others = [
                builder.load(at_element(integers, kinds[3], right, column, loop.index, PLACE(start)), align=4)
                for start in vectors
            ]
            for number, totals in zip(rows, sums, strict=True):
                pair = builder.load(at_element(integer, kinds[0], left, row, loop.index, number))
                pair = repeated(builder, pair, LANES)
                for total, other in zip(totals, others, strict=True):
                    builder.store(builder.call(multiply_add, [builder.load(total), pair, other]), total)
        for number, totals in zip(rows, sums, strict=True):
            at = builder.add(builder.mul(row, PLACE(PANEL)), number)
            for start, total in zip(vectors, totals, strict=True):
                to = builder.add(builder.mul(column, PLACE(PANEL)), PLACE(start))
                builder.store(builder.load(total), at_element(floats, kinds[6], product, at, to), align=4)
        return context.get_dummy_value()

    return types.void(left, types.int64, types.int64, right, types.int64, types.int64, product), generate


multiply_tile: Any = _multiply_tile
