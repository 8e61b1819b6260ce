"""Define the merge methods ``omp`` and ``omp_<method>``: methods of mergekit whose inputs are realigned first.

The tasks that :mod:`mergekit_omp.plugin.patches` adds before the merge realign the inputs. So a method only has to
accept the additional parameters and to pass the realigned tensors to the inner method.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from mergekit.merge_methods.base import (
    BatchOptions,
    MergeMethod,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)

from mergekit_omp.errors import OmpError
from mergekit_omp.parameters import PREFIX, TRANSPLANT, OmpParameters, check_names_are_free

PAPER = "https://arxiv.org/abs/2506.06607"


class RealignedMerge(MergeMethod):
    """An inner merge method under another name, with the parameters of this package in addition to its own.

    The inner method's parameters, input contract and optional-tensor policy are unchanged.

    Raises:
        OmpError: if a parameter of the inner method has the name of one of this package's.
    """

    def __init__(self, name: str, inner: MergeMethod) -> None:
        check_names_are_free(name, inner.spec)
        self.inner = inner
        self.supports_batching = inner.supports_batching
        self.spec = replace(
            inner.spec,
            name=name,
            parameters=(*inner.spec.parameters, *_parameter_specs()),
            pretty_name=_pretty_name(name, inner),
            reference_url=PAPER if name == TRANSPLANT else inner.spec.reference_url,
        )

    def validate_inputs(self, *args: Any, **kwargs: Any) -> None:
        """Check the inputs as the inner method does."""
        self.inner.validate_inputs(*args, **kwargs)

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        inner_parameters = [_inner_parameters(bound) for bound in parameters]
        return self.inner._execute(groups, inner_parameters, options, input_dtypes=input_dtypes, out_dtype=out_dtype)


def realigned_methods(registered: Sequence[MergeMethod]) -> list[RealignedMerge]:
    """Return the methods that are not yet registered; ``omp`` is ``omp_passthrough``.

    A method with conflicting parameters is omitted; a recipe that names it raises an OmpError.
    """
    known = {method.spec.name for method in registered}
    unregistered = []
    for inner in registered:
        if isinstance(inner, RealignedMerge):
            continue
        names = [PREFIX + inner.spec.name, *([TRANSPLANT] if inner.spec.name == "passthrough" else [])]
        with contextlib.suppress(OmpError):
            unregistered += [RealignedMerge(name, inner) for name in names if name not in known]
    return unregistered


def _parameter_specs() -> list[ParameterSpec]:
    return [
        ParameterSpec(
            name=name,
            value_type=OmpParameters.__annotations__[name],
            scope=ParameterScope.INPUT,
            default=field.default,
            description=field.description,
        )
        for name, field in OmpParameters.model_fields.items()
    ]


def _pretty_name(name: str, inner: MergeMethod) -> str:
    transplant = "OMP tokenizer transplantation"
    return transplant if name == TRANSPLANT else f"{transplant} + {inner.spec.pretty_name or inner.spec.name}"


def _inner_parameters(bound: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in bound.items() if name not in OmpParameters.model_fields}
