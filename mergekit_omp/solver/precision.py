"""What the margins of the solver assume of matrix products."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products in float32, and sums of bfloat16 products in float32; the process's settings come back after.

    Torch may be set to compute float32 products in TF32 or bfloat16, and on a GPU sums bfloat16 products in bfloat16
    by default. Neither is covered by the solver's bounds.
    """
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision(), matmul.allow_bf16_reduced_precision_reduction
    torch.set_float32_matmul_precision("highest")
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        matmul.allow_bf16_reduced_precision_reduction = before[1]
