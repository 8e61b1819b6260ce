"""Define the solver's tolerances and set the precision of matrix products that they assume."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

ROUNDING = torch.finfo(torch.float32).eps
"""Relative spacing of float32 numbers; the error of one operation is at most half of it."""

ZERO = 8 * ROUNDING
"""Residuals, and correlations with an atom of norm 1, below this share of the target's norm count as rounding
errors."""

DEPENDENT = 1e-5
"""An atom with less than this share of its norm outside the span of the support counts as linearly dependent."""

CANCELLED = 0.2
"""Gram-Schmidt is repeated where it leaves less than this share of an atom's norm; once is enough (Kahan, in Parlett
1980)."""

TIE = 1e-12
"""Float64 correlations that differ by less than this share are equal, and the atom of the lowest index is selected."""

REDUCED = ("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")
"""Settings that let a GPU accumulate float16 products in float16; the second exists since torch 2.7."""


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32 and sum float16 products in float32; restore the settings afterwards.

    A process may let torch compute float32 products in TF32 or bfloat16, and on a GPU torch accumulates float16
    products in float16 by default. The solver's error bounds cover neither.
    """
    with ExitStack() as changed:
        for get, put, value in _settings():
            changed.callback(put, get())
            put(value)
        yield


def _settings() -> Iterator[tuple[Callable[[], Any], Callable[[Any], None], Any]]:
    """Yield a getter, a setter and the required value for each setting."""
    matmul = torch.backends.cuda.matmul
    for name in REDUCED:
        if hasattr(matmul, name):
            yield partial(getattr, matmul, name), partial(setattr, matmul, name), False
    if hasattr(matmul, "fp32_precision"):
        # Set per backend: torch refuses to read the common setting where the backends differ.
        for backend in (matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]  # set at run time
            yield partial(getattr, backend, "fp32_precision"), partial(setattr, backend, "fp32_precision"), "ieee"
    else:  # torch before 2.9
        yield torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"
