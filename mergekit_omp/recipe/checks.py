"""Check the text of a recipe before any model is opened."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
from mergekit import merge_methods
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import ConditionalParameter, MergeConfiguration, ParameterSetting
from pydantic import ValidationError

from mergekit_omp.compat import chat_template_names
from mergekit_omp.errors import OmpError
from mergekit_omp.parameters import PREFIX, OmpParameters, check_names_are_free, is_ours
from mergekit_omp.recipe.blocks import blocks_of, leaves, parameter_scopes
from mergekit_omp.recipe.keys import did_you_mean, former_parameter

LARGEST_PADDING = 2**16
"""Hardware needs multiples of a few hundred at most; larger values are almost certainly a typo."""

REMOVED_PARAMETERS = {
    "scan_every": "every solve is exact now, and about as fast; leave it out",
}
"""Parameters of earlier versions, and the reason for their removal."""

_GENERATION_TAG = re.compile(r"{%-?\s*(end)?generation\s*-?%}")  # an extension of transformers, unknown to Jinja


def check_text(config: MergeConfiguration) -> None:
    """Raise an OmpError for the first mistake in a recipe that can be found without its models.

    Checks that mergekit itself reports clearly (number of inputs of a method, equal architectures) are not repeated.
    """
    _check_method(config)
    _check_tokenizer_section(config)
    _check_parameters(config)
    _check_dtypes(config)
    _check_chat_template(config)
    _check_duplicates(config)


def _check_method(config: MergeConfiguration) -> None:
    methods = {m.spec.name: m for m in merge_methods.registered_methods()}
    known = [name for name in methods if is_ours(name)]
    if config.merge_method not in known:
        inner = methods.get(config.merge_method.removeprefix(PREFIX))
        if inner is not None:
            check_names_are_free(config.merge_method, inner.spec)  # explains why it was not registered
        raise OmpError(
            f"merge_method: {config.merge_method} is unknown{did_you_mean(config.merge_method, known)}; "
            f"mergekit-omp has {', '.join(sorted(known))}."
        )


def _check_tokenizer_section(config: MergeConfiguration) -> None:
    if config.tokenizer is None and config.tokenizer_source is None:
        raise OmpError(
            f"tokenizer: is missing; merge_method: {config.merge_method} needs to know the output's tokenizer, "
            "so add, for example, `tokenizer: {source: <the donor model>}`."
        )
    if config.tokenizer and "" in (config.tokenizer.tokens or {}):
        raise OmpError("tokenizer.tokens: '' is not a token; write at least one character.")
    multiple = config.tokenizer and config.tokenizer.pad_to_multiple_of
    if multiple is not None and multiple < 1:
        raise OmpError(f"tokenizer.pad_to_multiple_of: {multiple} is not a positive integer; write one such as 64.")
    if multiple is not None and multiple > LARGEST_PADDING:
        raise OmpError(
            f"tokenizer.pad_to_multiple_of: {multiple} is more than {LARGEST_PADDING}; write a multiple such as 64."
        )


def _check_parameters(config: MergeConfiguration) -> None:
    specs = {p.name: p for p in merge_methods.get(config.merge_method).spec.parameters}
    known = list(specs)
    for place, settings in parameter_scopes(config):
        for name, setting in settings.items():
            if name in REMOVED_PARAMETERS and name not in known:
                raise OmpError(f"{place}.{name} was removed: {REMOVED_PARAMETERS[name]}.")
            if name not in known:
                if instead := former_parameter(name):
                    raise OmpError(f"{place}.{name} is not a parameter of {config.merge_method}; {instead}.")
                raise OmpError(
                    f"{place}.{name} is not a parameter of {config.merge_method}{did_you_mean(name, known)}; "
                    f"it has {', '.join(known)}."
                )
            if name in OmpParameters.model_fields:
                field = OmpParameters.model_fields[name]
                for value in leaves(f"{place}.{name}", setting):
                    if problem := _problem_of(value, specs[name].validate):
                        raise OmpError(
                            f"{place}.{name}: {value!r} is invalid: it {problem}; the default is {field.default}. "
                            f"({field.description})"
                        )
            else:
                for value in _scalars(setting):
                    if problem := _problem_of(value, specs[name].validate):
                        raise OmpError(f"{place}.{name}: {value!r} is invalid: it {problem}; write another value.")


def _problem_of(value: Any, validate: Callable[[Any], Any]) -> str | None:
    """Say what is wrong with the value of a parameter; return None for a valid one."""
    try:
        validate(value)
    except ValidationError as error:
        return error.errors()[0]["msg"].removeprefix("Input ")
    return None if not isinstance(value, float) or math.isfinite(value) else "should be a finite number"


def _scalars(setting: ParameterSetting) -> Iterator[Any]:
    """Yield the values of a parameter of mergekit, which may be a gradient over layers."""
    if isinstance(setting, ConditionalParameter):
        yield from _scalars(setting.value)
    elif isinstance(setting, list):
        for item in setting:
            yield from _scalars(item)
    else:
        yield setting


def _check_dtypes(config: MergeConfiguration) -> None:
    for key in ("dtype", "out_dtype"):
        name = getattr(config, key)
        try:
            dtype = dtype_from_name(name)
        except RuntimeError as error:
            raise OmpError(
                f"{key}: {name} is not a type that mergekit supports; write bfloat16, float16 or float32."
            ) from error
        if dtype is not None and not dtype.is_floating_point:
            raise OmpError(f"{key}: {name} is not a floating point type; write bfloat16, float16 or float32.")


def _check_chat_template(config: MergeConfiguration) -> None:
    """Check the template now: mergekit does so only after the merge."""
    template = config.chat_template
    if not template or template == "auto":
        return
    if "{" not in template:
        known = chat_template_names()
        if template not in known:
            raise OmpError(
                f"chat_template: unknown template {template!r}{did_you_mean(template, known)}; "
                f"write auto, {', '.join(known)}, or a Jinja template."
            )
        return
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION_TAG.sub("", template))
    except jinja2.TemplateSyntaxError as error:
        reason = str(error.message).rstrip(".")
        raise OmpError(f"chat_template: invalid Jinja in line {error.lineno} of the template: {reason}.") from error
    if len(template) < 20:
        raise OmpError(f"chat_template: {template!r} is too short; mergekit requires at least 20 characters.")


def _check_duplicates(config: MergeConfiguration) -> None:
    for path, block in blocks_of(config):
        lists = [(f"{path}models", block.models or ())]
        for i, part in enumerate(block.slices or ()):
            if not part.sources:
                raise OmpError(f"{path}slices[{i}].sources: the list is empty; name the models of this slice.")
            lists.append((f"{path}slices[{i}].sources", part.sources))
        for place, listed in lists:
            first_index: dict[ModelReference, int] = {}
            for i, entry in enumerate(listed):
                first = first_index.setdefault(entry.model, i)
                if first != i:
                    raise OmpError(
                        f"{place}[{i}].model: {entry.model} is already listed as {place}[{first}]; remove one of them."
                    )
