"""Define the two innermost loops on vectors, in LLVM's instructions, which LLVM translates into those of any CPU.

numba vectorises one loop at a time. The sums over many rows would be loaded and stored for every few of them, which
takes as long as the products, and a transposition would move one number at a time.
"""

from collections.abc import Iterable
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mergekit_omp.solver.gram.layout import LINE, STEPS

COLUMNS = 8
"""Columns that are transposed in registers, with as many rows as a line of the cache has places."""


def has_feature(name: str) -> bool:
    """Tell whether the CPU has a feature, by LLVM's name of it."""
    try:
        return binding.get_host_cpu_features().get(name, False)
    except RuntimeError:  # LLVM cannot tell on every platform
        return False


WIDE = has_feature("avx512f")
"""Whether the CPU has vectors of 512 bits, and twice as many registers for them."""

MANY, FEW = (STEPS, STEPS // 2) if WIDE else (STEPS // 2, STEPS // 4)
"""Steps whose sums are computed together, in one pass over the rows: where many steps are left, and where few are."""

COLUMNS_OF_MANY, COLUMNS_OF_FEW = 32 if WIDE else 16, 32
"""Columns whose sums for so many steps fit into the registers."""

AHEAD = 256
"""Bytes of a row that are requested ahead of their use: a CPU does not follow as many rows by itself."""

READ, KEEP, DATA = 0, 3, 1
"""Arguments of LLVM's prefetch: for reading, into the nearest cache, not as code."""

CONTRACT = ("contract",)
"""A product and a sum may be rounded once, together."""


INTEGER, PLACE = ir.IntType(16), ir.IntType(64)


def element(context: Any, builder: Any, array_type: Any, array: Any, *indices: Any) -> Any:
    """Return the address of an element of an array."""
    view = context.make_array(array_type)(context, builder, array)
    address = builder.ptrtoint(view.data, PLACE)
    for index, stride in zip(indices, cgutils.unpack_tuple(builder, view.strides), strict=True):
        address = builder.add(address, builder.mul(index, stride))
    return address


def repeated(builder: Any, number: Any, width: int) -> Any:
    """Return a vector of ``width`` places that all hold a number."""
    vector, integers = ir.VectorType(number.type, width), ir.VectorType(ir.IntType(32), width)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(one, one, ir.Constant(integers, [0] * width))


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
        return element(context, builder, signature.args[0], *arguments)

    return types.int64(array, types.int64), generate


@intrinsic
def _integer_at(typing_context: Any, address: Any) -> Any:
    """Return the 16-bit integer at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], INTEGER.as_pointer()))

    return types.int16(types.int64), generate


@intrinsic
def _request_line(typing_context: Any, address: Any) -> Any:
    """Ask the memory for the line of the cache with an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _request(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


address: Any = _address
request_line: Any = _request_line
integer_at: Any = _integer_at


def make_accumulate(steps: int, width: int) -> Any:
    """Make a function for compiled code that adds rows to ``steps`` sums of ``width`` columns, all in registers.

    Its arguments are ``rows`` int64 (size,), the addresses of the rows; ``size``; ``inner`` int16, the first summand;
    ``weights`` float32 (n, k), of each row in each step; ``sums`` float32 (n, columns), which are written; the first
    ``step``, and the first ``column`` of rows, ``inner`` and ``sums``.
    """
    integers, floats = ir.VectorType(INTEGER, width), ir.VectorType(ir.FloatType(), width)

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
            address = element(context, builder, kinds[2], inner, column)
            _request(builder, builder.add(address, PLACE(AHEAD)))
            first = load_integers(builder, address)
            totals = [cgutils.alloca_once_value(builder, first) for _ in range(steps)]
            later = [builder.add(step, PLACE(number)) for number in range(steps)]
            offset = builder.mul(column, PLACE(2))
            with cgutils.for_range(builder, size) as loop:
                address = element(context, builder, kinds[0], rows, loop.index)
                row = builder.add(builder.load(builder.inttoptr(address, PLACE.as_pointer())), offset)
                _request(builder, builder.add(row, PLACE(AHEAD)))
                numbers = load_integers(builder, row)
                for total, number in zip(totals, later, strict=True):
                    address = element(context, builder, kinds[3], weights, number, loop.index)
                    weight = builder.load(builder.inttoptr(address, ir.FloatType().as_pointer()))
                    product = builder.fmul(numbers, repeated(builder, weight, width), flags=CONTRACT)
                    builder.store(builder.fadd(builder.load(total), product, flags=CONTRACT), total)
            for total, number in zip(totals, later, strict=True):
                address = element(context, builder, kinds[4], sums, number, column)
                builder.store(builder.load(total), builder.inttoptr(address, floats.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(rows, types.int64, inner, weights, sums, types.int64, types.int64), generate

    return accumulate


@intrinsic
def _transpose_block(
    typing_context: Any, source: Any, stride: Any, out: Any, out_stride: Any, start: Any, out_start: Any
) -> Any:
    """Transpose LINE rows and COLUMNS columns of int16 arrays (places,), from and to given first places.

    A row of the result is a line of the cache, and begins at one. Stores past the cache write it whole, and need not
    read it first. Other threads see them after the next lock, such as that of a barrier.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, stride, out, out_stride, start, out_start = arguments
        interleave = [
            _mask(place + vector for place in range(low, low + COLUMNS) for vector in (0, 2 * COLUMNS))
            for low in (0, COLUMNS)
        ]
        past_the_cache = builder.module.add_metadata([ir.IntType(32)(1)])

        def row(kind: Any, array: Any, first: Any, step: Any, number: int) -> Any:
            return element(context, builder, kind, array, builder.add(first, builder.mul(step, PLACE(number))))

        def load(number: int) -> Any:
            address = row(signature.args[0], source, start, stride, number)
            _request(builder, builder.add(address, PLACE(AHEAD)))
            return builder.load(builder.inttoptr(address, ir.VectorType(INTEGER, COLUMNS).as_pointer()), align=2)

        def columns(first: int) -> list:
            """Return the columns of 2 * COLUMNS rows: each perfect shuffle moves a bit of the row into the place."""
            pairs = [(load(first + number), load(first + number + 1)) for number in range(0, 2 * COLUMNS, 2)]
            vectors = [builder.shuffle_vector(one, other, _mask(range(2 * COLUMNS))) for one, other in pairs]
            for _ in range(COLUMNS.bit_length()):
                halves = zip(vectors[: COLUMNS // 2], vectors[COLUMNS // 2 :], strict=True)
                vectors = [builder.shuffle_vector(one, other, mask) for one, other in halves for mask in interleave]
            return vectors

        for number, parts in enumerate(zip(*(columns(first) for first in range(0, LINE, 2 * COLUMNS)), strict=True)):
            address = row(signature.args[2], out, out_start, out_stride, number)
            for place, part in enumerate(parts):
                at = builder.add(address, PLACE(4 * COLUMNS * place))
                store = builder.store(part, builder.inttoptr(at, part.type.as_pointer()), align=4 * COLUMNS)
                store.set_metadata("nontemporal", past_the_cache)
        return context.get_dummy_value()

    return types.void(source, types.int64, out, types.int64, types.int64, types.int64), generate


def _mask(places: Iterable[int]) -> Any:
    """Make the mask of a shuffle of two vectors."""
    places = list(places)
    return ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places)


transpose_block: Any = _transpose_block
accumulate_many = make_accumulate(MANY, COLUMNS_OF_MANY)
accumulate_few = make_accumulate(FEW, COLUMNS_OF_FEW)
