"""Iterate over the parts of a recipe that list models and set parameters, with their keys."""

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, MergeConfiguration, ParameterSetting

from mergekit_omp.errors import OmpError
from mergekit_omp.parameters import OmpParameters

Settings = Mapping[str, ParameterSetting]


def blocks_of(config: MergeConfiguration) -> list[tuple[str, Any]]:
    """Return the blocks that list models or slices with their path: the recipe, and each of its modules."""
    return [("", config), *((f"modules.{name}.", module) for name, module in (config.modules or {}).items())]


def models_in_order(config: MergeConfiguration) -> tuple[ModelReference, ...]:
    """Return the models that a recipe merges: the base model, then in order of appearance (mergekit has no order)."""
    blocks = [block for _, block in blocks_of(config)]
    listed = [m.model for block in blocks for m in block.models or ()]
    sliced = [s.model for block in blocks for part in block.slices or () for s in part.sources]
    base = [config.base_model] if config.base_model else []
    return tuple(dict.fromkeys([*base, *listed, *sliced]))


def named_models(config: MergeConfiguration) -> tuple[ModelReference, ...]:
    """Return the models that a recipe names: those that it merges, and the one whose tokenizer the output gets."""
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    return (*models_in_order(config), *([source] if isinstance(source, ModelReference) else []))


def keys_of_models(config: MergeConfiguration) -> dict[ModelReference, str]:
    """Return the recipe key that first names each input."""
    keys: dict[ModelReference, str] = {}
    for path, block in blocks_of(config):
        for i, listed in enumerate(block.models or ()):
            keys.setdefault(listed.model, f"{path}models[{i}].model")
        for i, part in enumerate(block.slices or ()):
            for j, source in enumerate(part.sources):
                keys.setdefault(source.model, f"{path}slices[{i}].sources[{j}].model")
    if config.base_model:
        keys.setdefault(config.base_model, "base_model")
    return keys


def parameter_scopes(config: MergeConfiguration) -> Iterator[tuple[str, Settings]]:
    """Yield every ``parameters:`` of a recipe with its path."""
    for path, block in blocks_of(config):
        yield f"{path}parameters", block.parameters or {}
        for i, model in enumerate(block.models or ()):
            yield f"{path}models[{i}].parameters", model.parameters or {}
        for i, part in enumerate(block.slices or ()):
            yield f"{path}slices[{i}].parameters", part.parameters or {}
            for j, source in enumerate(part.sources):
                yield f"{path}slices[{i}].sources[{j}].parameters", source.parameters or {}


def leaves(key: str, setting: ParameterSetting) -> Iterator[Any]:
    """Yield the values of a setting: a single one, or one per filter.

    Raises:
        OmpError: for a gradient over layers, or an empty list.
    """
    if isinstance(setting, ConditionalParameter):
        yield from leaves(key, setting.value)
    elif isinstance(setting, list):
        if not setting:
            raise OmpError(f"{key}: the list is empty; write one value, or a list of filters.")
        if not all(isinstance(condition, ConditionalParameter) for condition in setting):
            raise OmpError(
                f"{key}: {setting} is a gradient over layers, but vocabulary tensors belong to no layer; "
                "write one value, or a list of filters."
            )
        for condition in setting:
            yield from leaves(key, condition)
    else:
        yield setting


def settings_of(config: MergeConfiguration, name: str) -> list[Any]:
    """Return every value of one of this package's parameters, including the default if an input is without a value."""
    named = [(key, scope[name]) for key, scope in parameter_scopes(config) if name in scope]
    values = [value for key, setting in named for value in leaves(f"{key}.{name}", setting)]
    if all(any(_sets(scope, name) for scope in scopes) for scopes in _scopes_of_inputs(config)):
        return values
    return [*values, OmpParameters.model_fields[name].default]


def _scopes_of_inputs(config: MergeConfiguration) -> Iterator[list[Settings | None]]:
    """Yield the ``parameters:`` that apply to each input, also to a base that mergekit adds since none lists it."""
    for _, block in blocks_of(config):
        of_block = [block.parameters, config.parameters]
        for listed in block.models or ():
            yield [listed.parameters, *of_block]
        for part in block.slices or ():
            for source in part.sources:
                yield [source.parameters, part.parameters, *of_block]
        if block.models and config.base_model not in [None, *(listed.model for listed in block.models)]:
            yield of_block


def _sets(scope: Settings | None, name: str) -> bool:
    """Tell whether a scope has a value of a parameter for every tensor, so without a filter."""
    if scope is None or name not in scope:
        return False
    conditions = scope[name] if isinstance(scope[name], list) else [scope[name]]
    return any(not isinstance(one, ConditionalParameter) or one.filter in (None, "*") for one in conditions)
