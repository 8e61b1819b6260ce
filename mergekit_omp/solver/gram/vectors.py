"""Define the innermost loops on vectors, in LLVM's instructions, which LLVM translates into those of any CPU.

numba vectorises one loop at a time. The sums over many rows would be loaded and stored for every few of them, which
takes as long as the products, and a transposition would move one number at a time.
"""

from collections.abc import Iterable
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from mergekit_omp.solver.gram.layout import LINE, STEPS

COLUMNS = 8
"""Columns that are transposed in registers, with as many rows as a line of the cache has places."""


def has_feature(name: str) -> bool:
    """Tell whether this CPU has a feature, by LLVM's name of it, and numba compiles for this CPU."""
    overridden = config.CPU_NAME or config.CPU_FEATURES  # type: ignore[attr-defined]  # set at run time
    try:
        return not overridden and binding.get_host_cpu_features().get(name, False)
    except RuntimeError:  # LLVM cannot tell on every platform
        return False


WIDE = has_feature("avx512bw")
"""Whether the CPU has vectors of 512 bits, and twice as many registers for them."""

MANY, FEW = (STEPS, STEPS // 2) if WIDE else (STEPS // 2, STEPS // 4)
"""Steps whose sums are computed together, in one pass over the rows: where many steps are left, and where few are."""

WIDTH = 32 if WIDE else 16
"""Columns whose sums for so many steps fit into the registers."""

LANES = WIDTH // 2
"""Sums in a vector: one of each pair of products."""

MULTIPLY_PAIRS = "llvm.x86.avx512.pmaddw.d.512" if WIDE else "llvm.x86.avx2.pmadd.wd" if has_feature("avx2") else None
"""LLVM's name of the instruction that multiplies WIDTH pairs of 16-bit integers and adds neighbouring products. LLVM
lets a CPU add them to a sum in the same instruction, if it can (VNNI)."""

AHEAD = 256
"""Bytes of a row that are requested ahead of their use: a CPU does not follow as many rows by itself."""

GROUP = 64
"""Numbers that are compared together, with a result in the bits of one integer."""

READ, DATA = 0, 1
"""Arguments of LLVM's prefetch: for reading, not as code."""

NEAR, FARTHER = 3, 2
"""Levels of LLVM's prefetch: into the L1 cache, into the L2 cache."""

INTEGER, SUM, PLACE = ir.IntType(16), ir.IntType(32), ir.IntType(64)


def element(context: Any, builder: Any, array_type: Any, array: Any, *indices: Any) -> Any:
    """Return the address of an element of an array."""
    view = context.make_array(array_type)(context, builder, array)
    address = builder.ptrtoint(view.data, PLACE)
    for index, stride in zip(indices, cgutils.unpack_tuple(builder, view.strides), strict=True):
        address = builder.add(address, builder.mul(index, stride))
    return address


def pointer(context: Any, builder: Any, to: Any, array_type: Any, array: Any, *indices: Any) -> Any:
    """Return a pointer to an element of an array, from which a number or vector of a type is loaded or stored."""
    return builder.inttoptr(element(context, builder, array_type, array, *indices), to.as_pointer())


def repeated(builder: Any, number: Any, width: int) -> Any:
    """Return a vector of ``width`` places that all hold a number."""
    vector, integers = ir.VectorType(number.type, width), ir.VectorType(ir.IntType(32), width)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(one, one, ir.Constant(integers, [0] * width))


def _request(builder: Any, address: Any, level: int = NEAR) -> None:
    """Ask the memory for the line of the cache with an address, which need not exist."""
    pointer, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [pointer, flag, flag, flag])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(prefetch, [builder.inttoptr(address, pointer), flag(READ), flag(level), flag(DATA)])


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


def make_request(level: int) -> Any:
    """Make a function for compiled code that asks the memory for the line of the cache with an address."""

    @intrinsic
    def request(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _request(builder, arguments[0], level)
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return request


@intrinsic
def _exceeding(typing_context: Any, numbers: Any, first: Any, least: Any) -> Any:
    """Compare GROUP float32 numbers, from a ``first`` one on, with another; return a bit for each that exceeds it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers, first, least = arguments
        floats = ir.VectorType(ir.FloatType(), GROUP)
        group = builder.load(pointer(context, builder, floats, signature.args[0], numbers, first), align=4)
        exceeds = builder.fcmp_ordered(">", group, repeated(builder, least, GROUP))
        return builder.bitcast(exceeds, PLACE)

    return types.uint64(numbers, types.int64, types.float32), generate


@intrinsic
def _first_of(typing_context: Any, bits: Any) -> Any:
    """Return the place of the first bit that is set; one is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return types.int64(types.uint64), generate


address: Any = _address
integer_at: Any = _integer_at
exceeding: Any = _exceeding
first_of: Any = _first_of
request_line, request_early = make_request(NEAR), make_request(FARTHER)


def add_products(builder: Any, total: Any, pairs: Any, others: Any) -> Any:
    """Add both products of each pair of 16-bit integers, of two vectors of WIDTH, to a vector of sums."""
    integers, sums = ir.VectorType(INTEGER, WIDTH), ir.VectorType(SUM, LANES)
    if MULTIPLY_PAIRS is not None:
        kind = ir.FunctionType(sums, [integers, integers])
        multiply = cgutils.get_or_insert_function(builder.module, kind, MULTIPLY_PAIRS)
        return builder.add(total, builder.call(multiply, [pairs, others]))
    for parity in (0, 1):
        mask = _mask(range(parity, WIDTH, 2))
        one, other = (builder.sext(builder.shuffle_vector(each, each, mask), sums) for each in (pairs, others))
        total = builder.add(total, builder.mul(one, other))
    return total


def make_accumulate(steps: int) -> Any:
    """Make a function for compiled code that adds up weighted rows for ``steps`` steps and WIDTH columns.

    All sums are in registers. Products of 16-bit integers and their 32-bit sums are exact, but for a multiple of 2³²
    that the sum of the last row no longer has. The arguments are ``rows`` int64 (2 ``pairs``,), the addresses of the
    rows; ``pairs``; ``weights`` int16 (n, 2 ``pairs``), of each row in each step; ``scales`` float32 (n,) of steps and
    ``norms`` float32 (columns,), which sums are multiplied by; ``sums`` float32 (n, columns), their absolute values,
    which are written; the first ``step``, and the first ``column`` of rows, norms and sums.
    """
    integers, totals_of_half = ir.VectorType(INTEGER, WIDTH), ir.VectorType(SUM, LANES)
    floats = ir.VectorType(ir.FloatType(), WIDTH)
    # Interleaves two rows, as the CPU does: four columns of each eight at a time.
    halves = [[at for at in range(WIDTH) if at % 8 // 4 == half] for half in (0, 1)]
    interleave = [_mask(place for at in half for place in (at, WIDTH + at)) for half in halves]
    in_order = _mask(sorted(range(WIDTH), key=[*halves[0], *halves[1]].__getitem__))

    @intrinsic
    def accumulate(
        typing_context: Any,
        rows: Any,
        pairs: Any,
        weights: Any,
        scales: Any,
        norms: Any,
        sums: Any,
        step: Any,
        column: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            rows, pairs, weights, scales, norms, sums, step, column = arguments
            kinds = signature.args

            def load(of: Any, kind: Any, array: Any, *indices: Any) -> Any:
                return builder.load(pointer(context, builder, of, kind, array, *indices))

            none = ir.Constant(totals_of_half, [0] * LANES)
            totals = [[cgutils.alloca_once_value(builder, none) for _ in halves] for _ in range(steps)]
            later = [builder.add(step, PLACE(number)) for number in range(steps)]
            offset = builder.mul(column, PLACE(2))
            with cgutils.for_range(builder, pairs) as loop:
                first = builder.mul(loop.index, PLACE(2))
                numbers = []
                for place in (first, builder.add(first, PLACE(1))):
                    row = builder.add(load(PLACE, kinds[0], rows, place), offset)
                    _request(builder, builder.add(row, PLACE(AHEAD)))
                    numbers.append(builder.load(builder.inttoptr(row, integers.as_pointer()), align=2))
                both = [builder.shuffle_vector(*numbers, mask) for mask in interleave]
                for parts, number in zip(totals, later, strict=True):
                    weight = repeated(builder, load(SUM, kinds[2], weights, number, first), LANES)
                    weight = builder.bitcast(weight, integers)
                    for total, part in zip(parts, both, strict=True):
                        builder.store(add_products(builder, builder.load(total), part, weight), total)
            factors = builder.load(pointer(context, builder, floats, kinds[4], norms, column), align=4)
            absolute = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(floats, [floats]), f"llvm.fabs.v{WIDTH}f32"
            )
            for parts, number in zip(totals, later, strict=True):
                whole = builder.shuffle_vector(*map(builder.load, parts), in_order)
                scale = repeated(builder, load(ir.FloatType(), kinds[3], scales, number), WIDTH)
                scaled = builder.fmul(builder.fmul(builder.sitofp(whole, floats), scale), factors)
                to = pointer(context, builder, floats, kinds[5], sums, number, column)
                builder.store(builder.call(absolute, [scaled]), to, align=4)
            return context.get_dummy_value()

        return types.void(rows, types.int64, weights, scales, norms, sums, types.int64, types.int64), generate

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
accumulate_many, accumulate_few = make_accumulate(MANY), make_accumulate(FEW)
