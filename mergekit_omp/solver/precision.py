"""Set how torch computes products of matrices while a solve runs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import Lock
from typing import Any

import torch

REDUCED = ("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")
"""Settings that let a GPU accumulate float16 products in float16; the second exists since torch 2.7."""

_lock, _running, _before = Lock(), 0, ExitStack()


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32 and sum float16 products in float32; restore the settings afterwards.

    A process may let torch compute float32 products in TF32 or bfloat16, and on a GPU torch accumulates float16
    products in float16 by default. The solver's error bounds cover neither. Several threads may solve at once.
    """
    global _running
    with _lock:
        for get, put, value in _settings():
            if not _running:
                _before.callback(put, get())
            put(value)
        _running += 1
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if not _running:
                _before.close()


def _settings() -> Iterator[tuple[Callable[[], Any], Callable[[Any], None], Any]]:
    """Yield a getter, a setter and the required value for each setting."""
    matmul = torch.backends.cuda.matmul
    for name in REDUCED:
        if hasattr(matmul, name):
            yield partial(getattr, matmul, name), partial(setattr, matmul, name), False
    if has_backends():
        # Set per backend: torch refuses to read the common setting where the backends differ.
        for backend in (matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]  # set at run time
            yield partial(getattr, backend, "fp32_precision"), partial(setattr, backend, "fp32_precision"), "ieee"
    else:
        yield torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"


def has_backends() -> bool:
    """Tell whether torch has a precision for each backend: since version 2.9."""
    return hasattr(torch.backends.cuda.matmul, "fp32_precision")
