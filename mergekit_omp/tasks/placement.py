"""Control the device of tensors that a task creates."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")


def on_the_cpu(execute: Callable[Arguments, Value]) -> Callable[Arguments, Value]:
    """Make the CPU torch's default device while a task runs, as it is without ``--multi-gpu``.

    mergekit's executor for several GPUs makes one of them the default device. Row indices, seeded random numbers and
    loaded models would be created there, while other tensors are on the CPU.
    """

    @wraps(execute)
    def placed(*arguments: Arguments.args, **named: Arguments.kwargs) -> Value:
        with torch.device("cpu"):
            return execute(*arguments, **named)

    return placed
