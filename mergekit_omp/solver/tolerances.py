"""What the margins of the solver assume of matrix products."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

REDUCED = ("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")
"""What lets a GPU add up products of float16 numbers in float16; the second is in torch from 2.7 on."""


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products in float32, and sums of float16 products in float32; the process's settings come back after.

    Torch may be set to compute float32 products in TF32 or bfloat16, and on a GPU sums float16 products in float16 by
    default. Neither is covered by the solver's bounds.
    """
    with ExitStack() as changed:
        for get, put, value in _settings():
            changed.callback(put, get())
            put(value)
        yield


def _settings() -> Iterator[tuple[Callable[[], Any], Callable[[Any], None], Any]]:
    """How to read and to write each setting, and what it has to be."""
    matmul = torch.backends.cuda.matmul
    for name in REDUCED:
        if hasattr(matmul, name):
            yield partial(getattr, matmul, name), partial(setattr, matmul, name), False
    if hasattr(matmul, "fp32_precision"):
        # Each backend's own. Torch refuses to tell one for all of them where a process has set them apart.
        for backend in (matmul, torch.backends.mkldnn.matmul):
            yield partial(getattr, backend, "fp32_precision"), partial(setattr, backend, "fp32_precision"), "ieee"
    else:  # torch before 2.9
        yield torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"
