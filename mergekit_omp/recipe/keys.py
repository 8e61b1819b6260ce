"""Check the keys of a recipe and the types of their values before mergekit parses them.

mergekit ignores unknown keys, so a misspelt one has no effect, and raises a traceback for a wrong type. For recipes
with a method of this package both raise an OmpError.
"""

import difflib
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Union, get_args, get_origin

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import registered_methods
from mergekit.options import MergeOptions
from pydantic import BaseModel, ValidationError

from mergekit_omp.errors import OmpError

_IGNORED_KEYS = {"name"}
"""Top-level keys for the reader of a recipe, or for mergekit-multi."""

_MODEL = "the name or the folder of a model"
_EXPECTED = {
    "merge_method": "the name of a merge method, such as omp",
    "models": "a list, such as `- model: <name or folder>`",
    "slices": "a list of slices, each with `sources:`",
    "sources": "a list, such as `- {model: <name or folder>, layer_range: [0, 12]}`",
    "modules": "a mapping from the name of a module to its `models:` or `slices:`",
    "layer_range": "two numbers, such as [0, 12]",
    "model": _MODEL,
    "base_model": _MODEL,
    "tokenizer_source": f"{_MODEL}, union or base",
    "source": f"{_MODEL}, union or base",
    "tokenizer": "a mapping, such as `{source: <the donor model>}`",
    "tokens": "a mapping from a token to `{source: <an input model>}`",
    "pad_to_multiple_of": "a positive integer, such as 64",
    "parameters": "a mapping, such as `{k: 64}`",
    "dtype": "a type such as bfloat16",
    "out_dtype": "a type such as bfloat16",
    "chat_template": "auto, the name of a template or a template",
    "force": "true or false",
}
_EXPECTED_SETTING = "a value, or a list of filters such as `- {filter: lm_head, value: 64}`"
_EXPECTED_OVERRIDE = (
    f"{_MODEL}, `{{kind: zero}}`, or `{{kind: model_token, model: <name or folder>, token: <its token>}}`"
)
_ADVICE = {
    "Exactly one of": "write one of them",
    "Cannot specify both": "keep `tokenizer: {source: <the donor model>}`",
    "Invalid model path": "write <name>@<revision>",
    "Can't parse": "write <model>+<LoRA>",
    "Must specify either": "write one of models: and slices: in each module",
}

_MOE = (
    "is a key of mergekit-moe; give the experts one tokenizer with merge_method: omp first, and name the results there"
)
_BAKLLAMA = "is a key of mergekit's former bakllama; write `slices:`"
_FORMER_KEYS = {
    "gate_mode": _MOE,
    "experts": _MOE,
    "experts_per_token": _MOE,
    "layer_slices": _BAKLLAMA,
    "embedding_source": _BAKLLAMA,
    "lm_head_source": _BAKLLAMA,
}
_FORMER_PARAMETERS = {
    "embed_slerp": (
        "leave it out: the merge method itself merges embeddings since mergekit 0.0.5, by slerp in omp_slerp"
    ),
    "int8_mask": "leave it out: it saves memory in methods that have masks, and changes no result",
}
_FORMER_SOURCE = "model:"
"""Prefix of a model in ``tokenizer_source`` in earlier versions of mergekit."""


def check_keys(recipe: Mapping[Any, Any]) -> None:
    """Raise an OmpError for the first key that is unknown, at any depth, or of an earlier mergekit.

    So do a text that cannot be written as UTF-8, and a value that contains itself, which YAML allows.
    """
    _check_values(recipe, "", [], set())
    section = recipe.get("tokenizer")
    sources = {"tokenizer_source": recipe.get("tokenizer_source")}
    sources["tokenizer.source"] = section.get("source") if isinstance(section, dict) else None
    for key, source in sources.items():
        if isinstance(source, str) and source.startswith(_FORMER_SOURCE):
            now = source.removeprefix(_FORMER_SOURCE)
            raise OmpError(f"{key}: {source!r} is written without {_FORMER_SOURCE!r} now: {now}.")
    for place, key, known in _unknown_keys(recipe, MergeConfiguration, ""):
        if instead := _instead(key, known):
            raise OmpError(f"{place}{key}: {instead}.")
        raise OmpError(
            f"{place}{key}: no such key{did_you_mean(str(key), known)}; "
            f"{place.rstrip('.') or 'a recipe'} can have {', '.join(known)}."
        )


def _check_values(value: Any, place: str, above: list[int], checked: set[int]) -> None:
    """Check texts and aliases; ``above`` and ``checked`` have the identities of mappings and lists."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            place = place.removeprefix(".") or "a key"
            raise OmpError(f"{place}: {_shortened(value)} has half of a surrogate pair; rewrite it.") from error
    if id(value) in above:
        raise OmpError(f"{place.removeprefix('.')}: contains itself by a YAML alias; write a value without the alias.")
    if not isinstance(value, dict | list) or id(value) in checked:
        return
    above.append(id(value))
    members = value.items() if isinstance(value, dict) else enumerate(value)
    for key, member in members:
        if isinstance(value, dict):
            _check_values(key, place, above, checked)
        _check_values(member, f"{place}[{key}]" if isinstance(value, list) else f"{place}.{key}", above, checked)
    checked.add(above.pop())


def former_parameter(name: str) -> str | None:
    """Return the advice for a parameter of earlier versions of mergekit or of other methods; None for others."""
    return _FORMER_PARAMETERS.get(name)


def _instead(key: Any, known: list[str]) -> str | None:
    """Return the advice for an unknown key that belongs elsewhere; None for others."""
    if key in _FORMER_KEYS:
        return _FORMER_KEYS[key]
    if key in MergeOptions.model_fields:
        option = f"--{key.replace('_', '-')}"
        return f"is an option of mergekit's commands, not a key of a recipe; leave it out and write {option} there"
    parameters = {parameter.name for method in registered_methods() for parameter in method.spec.parameters}
    if key in parameters and "parameters" in known:
        return f"is a parameter; write `parameters: {{{key}: …}}`"
    return None


def explain(recipe: Mapping[Any, Any], error: Exception) -> OmpError:
    """Convert an exception that mergekit raises for a recipe's values to an OmpError.

    Args:
        recipe: the parsed YAML.
        error: a ``ValidationError`` for values of wrong types, or another exception with a message of mergekit.

    Returns:
        The error to raise.
    """
    if not isinstance(error, ValidationError):
        advice = next((text for start, text in _ADVICE.items() if str(error).startswith(start)), None)
        return OmpError(f"Invalid recipe: {error}{f'; {advice}' if advice else ''}.")
    first = error.errors()[0]
    path, value = _follow(recipe, first["loc"])
    if first["type"] == "missing" and first["loc"][-1] in _EXPECTED:
        path, problem = [*path, first["loc"][-1]], "is missing"
    else:
        problem = f"{_shortened(value)} is invalid"
    return OmpError(f"{_place(path)}: {problem}; write {_expected(path)}.")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean …?)`` if a known word is similar, else an empty string.

    Example:
        >>> from mergekit_omp.recipe.keys import did_you_mean
        >>> did_you_mean("slurp", ["linear", "slerp"])
        ' (did you mean slerp?)'
    """
    by_lower_case = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower_case, n=1)
    return f" (did you mean {by_lower_case[close[0]]}?)" if close else ""


def _unknown_keys(value: Any, annotation: Any, place: str) -> Iterator[tuple[str, Any, list[str]]]:
    """Yield each unknown key with its path and the keys that are known there.

    ``model_validate(..., extra="forbid")`` of pydantic 2.12 would find the keys. It does not report the known ones,
    and reports one error for every member of a union, so this walk would still be needed.

    Args:
        value: value in a recipe.
        annotation: its type in mergekit's models.
        place: its path, with a trailing dot unless it is empty.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        # pydantic decides which of several models a mapping is, such as the kind of an override.
        for argument in arguments if len([a for a in arguments if _is_schema(a)]) < 2 else ():
            yield from _unknown_keys(value, argument, place)
    elif origin is list and isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown_keys(item, arguments[0], f"{place.removesuffix('.')}[{index}].")
    elif origin is dict and isinstance(value, dict):
        for key, item in value.items():
            yield from _unknown_keys(item, arguments[1], f"{place}{key}.")
    elif _is_schema(annotation) and isinstance(value, dict):
        fields = annotation.model_fields
        for key, item in value.items():
            if key in fields:
                yield from _unknown_keys(item, fields[key].annotation, f"{place}{key}.")
            elif place or key not in _IGNORED_KEYS:
                yield place, key, list(fields)


def _is_schema(annotation: Any) -> bool:
    """Tell whether a mapping with fixed keys is expected. ModelReference validates itself."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation is not ModelReference


def _follow(recipe: Any, location: Iterable[int | str]) -> tuple[list[int | str], Any]:
    """Return the part of an error's location that is in the recipe, and the value there.

    The remainder of a location names types that pydantic tried.
    """
    path: list[int | str] = []
    value = recipe
    for step in location:
        is_key = isinstance(value, dict) and step in value
        is_index = isinstance(value, list) and isinstance(step, int) and step < len(value)
        if is_key or is_index:
            value = value[step]
            path.append(step)
    return path, value


def _expected(path: list[int | str]) -> str:
    """Describe the value that is expected at a path."""
    keys = [step for step in path if isinstance(step, str)]
    if "parameters" in keys[:-1]:
        return _EXPECTED_SETTING
    if "tokens" in keys[:-1]:
        return _EXPECTED_OVERRIDE
    if path and isinstance(path[-1], int):
        return f"an entry of {_EXPECTED[keys[-1]]}" if keys and keys[-1] in _EXPECTED else "another value"
    return _EXPECTED.get(keys[-1] if keys else "", "another value")


def _place(path: list[int | str]) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".") or "the recipe"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
