"""Tolerances of the solver, and the precision of matrix products that they assume."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

ROUNDING = torch.finfo(torch.float32).eps
"""Relative spacing of float32 numbers; one operation is off by at most half of it."""

ZERO = 8 * ROUNDING
"""A residual, or a correlation with an atom of norm 1, of this share of the target's norm is rounding."""

DEPENDENT = 1e-5
"""An atom with less than this share of its norm outside the span of the support is taken to lie in it."""

CANCELLED = 0.2
"""Gram-Schmidt is repeated where it leaves less than this share of an atom's norm; once is enough (Kahan, in Parlett
1980)."""

TIE = 1e-12
"""Float64 correlations that differ by less than this share are equal, and the atom of the lowest index is selected."""

REDUCED = ("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")
"""Settings that let a GPU add up products of float16 numbers in float16; torch has the second from 2.7 on."""


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32 and sum float16 products in float32; restore the process's settings after.

    Torch may be set to compute float32 products in TF32 or bfloat16, and on a GPU sums float16 products in float16 by
    default. The solver's error bounds cover neither.
    """
    with ExitStack() as changed:
        for get, put, value in _settings():
            changed.callback(put, get())
            put(value)
        yield


def _settings() -> Iterator[tuple[Callable[[], Any], Callable[[Any], None], Any]]:
    """Yield how to read and how to write each setting, and the value that it needs."""
    matmul = torch.backends.cuda.matmul
    for name in REDUCED:
        if hasattr(matmul, name):
            yield partial(getattr, matmul, name), partial(setattr, matmul, name), False
    if hasattr(matmul, "fp32_precision"):
        # Each backend has its own. Torch refuses to read one for all of them where a process has set them apart.
        for backend in (matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]  # set at run time
            yield partial(getattr, backend, "fp32_precision"), partial(setattr, backend, "fp32_precision"), "ieee"
    else:  # torch before 2.9
        yield torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"
