"""What the margins of the solver assume of matrix products."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

REDUCED = ("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")
"""What lets a GPU add up products of float16 numbers in float16; the second is in torch from 2.7 on."""


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products in float32, and sums of float16 products in float32; the process's settings come back after.

    Torch may be set to compute float32 products in TF32 or bfloat16, and on a GPU sums float16 products in float16 by
    default. Neither is covered by the solver's bounds.
    """
    matmul = torch.backends.cuda.matmul
    precision = torch.get_float32_matmul_precision()
    before = {name: getattr(matmul, name) for name in REDUCED if hasattr(matmul, name)}
    torch.set_float32_matmul_precision("highest")
    for name in before:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for name, value in before.items():
            setattr(matmul, name, value)
