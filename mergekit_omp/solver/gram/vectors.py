"""Define the two innermost loops on vectors, in LLVM's instructions, which LLVM translates into those of any CPU.

numba vectorises one loop at a time. The sums over many rows would be loaded and stored for every few of them, which
takes as long as the products, and a transposition would move one number at a time.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

SIDE = 16
"""Rows and columns that are transposed in registers."""

WIDTH_OF_FOUR, WIDTH_OF_TWO = 16, 32
"""Columns whose sums for four and for two steps fit into the registers of a CPU with vectors of 256 bits."""

AHEAD, AHEAD_OF_SQUARE = 256, 512
"""Bytes of a row that are requested ahead of their use, in sums and in a transposition: a CPU does not follow as many
rows by itself."""

READ, KEEP, DATA = 0, 3, 1
"""Arguments of LLVM's prefetch: for reading, into the nearest cache, not as code."""

CONTRACT = ("contract",)
"""A product and a sum may be rounded once, together."""


PLACE = ir.IntType(64)


def _element(context: Any, builder: Any, array_type: Any, array: Any, *indices: Any) -> Any:
    """Return the address of an element of an array."""
    view = context.make_array(array_type)(context, builder, array)
    address = builder.ptrtoint(view.data, PLACE)
    for index, stride in zip(indices, cgutils.unpack_tuple(builder, view.strides), strict=True):
        address = builder.add(address, builder.mul(index, stride))
    return address


def _request(builder: Any, address: Any) -> None:
    """Ask the memory for the line of the cache with an address, which need not exist."""
    pointer, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [pointer, flag, flag, flag])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(prefetch, [builder.inttoptr(address, pointer), flag(READ), flag(KEEP), flag(DATA)])


@intrinsic
def _address(typing_context: Any, array: Any, place: Any) -> Any:
    """Return the address of a place of an array (places,), without counting a reference to a part of it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _element(context, builder, signature.args[0], *arguments)

    return types.int64(array, types.int64), generate


@intrinsic
def _integer_at(typing_context: Any, address: Any) -> Any:
    """Return the 16-bit integer at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], ir.IntType(16).as_pointer()))

    return types.int16(types.int64), generate


address: Any = _address
integer_at: Any = _integer_at


def make_accumulate(steps: int, width: int) -> Any:
    """Make a function for compiled code that adds rows to ``steps`` sums of ``width`` columns, all in registers.

    Its arguments are ``rows`` int64 (size,), the addresses of the rows; ``size``; ``inner`` int16, the first summand;
    ``weights`` float32 (n, k), of each row in each step; ``sums`` float32 (n, columns), which are written; the first
    ``step``, and the first ``column`` of rows, ``inner`` and ``sums``.
    """
    integers, floats = ir.VectorType(ir.IntType(16), width), ir.VectorType(ir.FloatType(), width)
    every = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)

    def load_integers(builder: Any, address: Any) -> Any:
        pointer = builder.inttoptr(address, integers.as_pointer())
        wide = builder.sext(builder.load(pointer, align=2), ir.VectorType(ir.IntType(32), width))
        return builder.sitofp(wide, floats)

    @intrinsic
    def accumulate(
        typing_context: Any, rows: Any, size: Any, inner: Any, weights: Any, sums: Any, step: Any, column: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            rows, size, inner, weights, sums, step, column = arguments
            kinds = signature.args
            first = load_integers(builder, _element(context, builder, kinds[2], inner, column))
            totals = [cgutils.alloca_once_value(builder, first) for _ in range(steps)]
            later = [builder.add(step, PLACE(number)) for number in range(steps)]
            offset = builder.mul(column, PLACE(2))
            with cgutils.for_range(builder, size) as loop:
                address = _element(context, builder, kinds[0], rows, loop.index)
                row = builder.add(builder.load(builder.inttoptr(address, PLACE.as_pointer())), offset)
                _request(builder, builder.add(row, PLACE(AHEAD)))
                numbers = load_integers(builder, row)
                for total, number in zip(totals, later, strict=True):
                    address = _element(context, builder, kinds[3], weights, number, loop.index)
                    weight = builder.load(builder.inttoptr(address, ir.FloatType().as_pointer()))
                    one = builder.insert_element(ir.Constant(floats, ir.Undefined), weight, ir.IntType(32)(0))
                    product = builder.fmul(numbers, builder.shuffle_vector(one, one, every), flags=CONTRACT)
                    builder.store(builder.fadd(builder.load(total), product, flags=CONTRACT), total)
            for total, number in zip(totals, later, strict=True):
                address = _element(context, builder, kinds[4], sums, number, column)
                builder.store(builder.load(total), builder.inttoptr(address, floats.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(rows, types.int64, inner, weights, sums, types.int64, types.int64), generate

    return accumulate


@intrinsic
def _transpose_square(
    typing_context: Any, source: Any, stride: Any, out: Any, out_stride: Any, start: Any, out_start: Any
) -> Any:
    """Transpose SIDE rows and columns of int16 arrays (places,) from ``start`` on to places from ``out_start`` on.

    Each of four rounds interleaves the first with the second half of the rows, in pairs, as a perfect shuffle does.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, stride, out, out_stride, start, out_start = arguments
        integers = ir.VectorType(ir.IntType(16), SIDE)
        both = [
            context.make_array(kind)(context, builder, array).data
            for kind, array in ((signature.args[0], source), (signature.args[2], out))
        ]

        def row(data: Any, first: Any, step: Any, number: int) -> Any:
            at = builder.add(first, builder.mul(step, PLACE(number)))
            return builder.bitcast(builder.gep(data, [at]), integers.as_pointer())

        for number in range(SIDE):
            address = builder.ptrtoint(row(both[0], start, stride, number), PLACE)
            _request(builder, builder.add(address, PLACE(AHEAD_OF_SQUARE)))

        low, high = (
            [pair for place_ in places for pair in (place_, place_ + SIDE)]
            for places in (range(SIDE // 2), range(SIDE // 2, SIDE))
        )
        masks = [ir.Constant(ir.VectorType(ir.IntType(32), SIDE), places) for places in (low, high)]
        rows = [builder.load(row(both[0], start, stride, number), align=2) for number in range(SIDE)]
        for _ in range(SIDE.bit_length() - 1):
            pairs = zip(rows[: SIDE // 2], rows[SIDE // 2 :], strict=True)
            rows = [builder.shuffle_vector(one, other, mask) for one, other in pairs for mask in masks]
        for number, numbers in enumerate(rows):
            builder.store(numbers, row(both[1], out_start, out_stride, number), align=2)
        return context.get_dummy_value()

    return types.void(source, types.int64, out, types.int64, types.int64, types.int64), generate


transpose_square: Any = _transpose_square
accumulate_four = make_accumulate(4, WIDTH_OF_FOUR)
accumulate_two = make_accumulate(2, WIDTH_OF_TWO)
