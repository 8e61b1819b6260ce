"""The recipe that ``mergekit-omp init`` writes: keys that fit a base and a donor, and comments on why."""

import shlex
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from mergekit.config import MergeConfiguration
from transformers import PretrainedConfig

from mergekit_omp.checkpoints.architecture import is_tied
from mergekit_omp.parameters import Approximation, Numerals, OmpParameters
from mergekit_omp.recipe.transplant import Transplant
from mergekit_omp.report.forecast_text import describe_copies, size
from mergekit_omp.vocabulary.numerals import NumeralScheme

WIDTH = 100
WITHOUT_DONOR = Approximation.SUBWORD
"""For a donor that is a tokenizer alone: the best initializer of those that need nothing else (docs/methods.md)."""

_NAMED = 8
"""Tokens that a comment names."""


def transplant_recipe(base: str, donor: str, parameters: Mapping[str, Any]) -> MergeConfiguration:
    """Make the recipe that gives a base the tokenizer of a donor."""
    return MergeConfiguration.model_validate(
        {
            "merge_method": "omp",
            "models": [{"model": base}],
            "tokenizer": {"source": donor},
            "parameters": dict(parameters),
        }
    )


def whole_path(name: str) -> str:
    """Return the absolute path of a folder; of a relative one mergekit asks the hub first. Other names stay."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def recipe_text(transplant: Transplant, found: Mapping[str, Any], path: str) -> str:
    """Write a recipe for a transplant.

    Args:
        transplant: of one base, resolved.
        found: what :func:`mergekit_omp.report.forecast.forecast` says of it.
        path: where the recipe will be, for the commands in its comments.

    Returns:
        YAML that names the same models.
    """
    inspect = shlex.join(["mergekit-omp", "inspect", _printable(path)])
    commands = [
        (inspect, "what it will do and cost"),
        (shlex.join(["mergekit-yaml", _printable(path), "out/"]), "run it; out/ is a new folder"),
    ]
    lines = [
        *_comment(f"Give {transplant.base} the tokenizer of {transplant.source}. Made by `mergekit-omp init`."),
        "#",
        *(f"#   {command:{len(inspect)}}   {purpose}" for command, purpose in commands),
        "#",
        *(line for sentence in _findings(transplant, found) for line in _comment(sentence, bullet="- ")),
        "merge_method: omp",
        "models:",
        f"  - model: {_scalar(str(transplant.base))}  # keeps its body: config, layers, rows of shared tokens",
        "tokenizer:",
        f"  source: {_scalar(str(transplant.source))}  # the donor: its tokenizer becomes the output's",
        *_overrides(transplant, found),
        "parameters:",
        *_parameters(found, is_alone=transplant.donors[0].config is None),
        f"dtype: {_dtype(transplant.base.config)}  # as the base is stored",
    ]
    return "\n".join(lines) + "\n"


def _findings(transplant: Transplant, found: Mapping[str, Any]) -> Iterator[str]:
    """Yield sentences on what the configs and tokenizers say."""
    [model] = found["inputs"]
    examples = f", for example {'  '.join(model['examples'][:_NAMED])}" if model["examples"] else ""
    yield f"{model['kept']:,} of {found['tokens']:,} output tokens are shared and keep the base's rows."
    yield f"{model['lacking']:,} tokens are new{examples}." if model["lacking"] else "No token is new."
    if model["special_pairs"]:
        pairs = [f"{pair['output']} ({pair['model']})" for pair in model["special_pairs"]]
        yield f"Special tokens that take the row of the base's token in parentheses: {_names(pairs)}."
    yield from (f"{describe_copies(copied)}." for copied in model["copied"])
    yield from _heads(transplant)
    yield f"Numbers: {_numbers(transplant, found)}."
    estimate = found["estimate"]
    yield (
        f"The output has {found['rows']:,} rows and {size(estimate['output_bytes'])} of weights; a run takes about "
        f"{size(estimate['peak_memory_bytes'])} of memory."
    )
    yield from (f"Note: {sentence}" for sentence in model["advice"])


def _heads(transplant: Transplant) -> Iterator[str]:
    base, donor = (model.config for model in (transplant.base, transplant.donors[0]))
    if donor is None:
        yield "The donor is a tokenizer without a model, so new rows are made from the base alone."
        return
    yield (
        f"Input embedding and LM head are {_tied(base)} in the base and {_tied(donor)} in the donor: "
        + ("one solve serves both." if "tied" in (_tied(base), _tied(donor)) else "each is solved for by itself.")
    )


def _tied(config: PretrainedConfig | None) -> str:
    return "tied" if config is not None and is_tied(config) else "separate"


def _numbers(transplant: Transplant, found: Mapping[str, Any]) -> str:
    numerals = {vocabulary["name"]: vocabulary["numerals"] for vocabulary in found["vocabularies"]}
    base, donor = numerals[str(transplant.base)], numerals[str(transplant.donors[0])]
    return f"both tokenizers write {base}" if base == donor else f"the base writes {base}, the donor {donor}"


def _overrides(transplant: Transplant, found: Mapping[str, Any]) -> Iterator[str]:
    """Yield an example of an override, commented out, where special tokens have no partner in the base."""
    [model] = found["inputs"]
    lonely, known = model["special_without_partner"], transplant.base.tokenizer.eos_token
    if not lonely or not known:
        return
    sentence = f"The base has no special token like {_names(lonely)}. To give one the row of a token of the base:"
    yield from _comment(sentence, indent=2)
    yield "  # tokens:"
    yield f"  #   {_scalar(lonely[0])}:"
    source = {"kind": "model_token", "model": str(transplant.base), "token": known}
    yield f"  #     source: {{{', '.join(f'{key}: {_scalar(value)}' for key, value in source.items())}}}"


def _parameters(found: Mapping[str, Any], *, is_alone: bool) -> Iterator[str]:
    [model] = found["inputs"]
    defaults = OmpParameters()
    if is_alone:
        yield from _comment("OMP needs a donor's embeddings; docs/methods.md lists what needs none.", indent=2)
        yield f"  approximation: {WITHOUT_DONOR.value}"
    else:
        yield from _comment(OmpParameters.model_fields["k"].description or "", indent=2)
        yield f"  k: {max(1, min(defaults.k, model['anchors']))}"
    numerals = {vocabulary["numerals"] for vocabulary in found["vocabularies"]}
    if len(numerals) > 1 and found["vocabularies"][0]["numerals"] == NumeralScheme.SINGLE_DIGITS.value:
        yield from _comment(
            "The base knows single digits and the donor writes longer numbers: make the rows of these from the base's "
            "digits. It loads the whole base once; without the line, they are approximated as other tokens are.",
            indent=2,
        )
        yield f"  numerals: {Numerals.DIGITS.value}"


def _dtype(config: PretrainedConfig | None) -> str:
    dtype = getattr(config, "dtype", None) or getattr(config and config.get_text_config(), "dtype", None)
    return str(dtype or "float32").removeprefix("torch.")


def _names(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _comment(sentence: str, *, indent: int = 0, bullet: str = "") -> list[str]:
    begin = f"{' ' * indent}# "
    return textwrap.wrap(
        _printable(sentence),
        WIDTH,
        initial_indent=begin + bullet,
        subsequent_indent=begin + " " * len(bullet),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _printable(text: str) -> str:
    """Escape what YAML does not allow even in a comment, such as control characters in a token."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _scalar(text: str) -> str:
    """Write a string as YAML, quoted where it has to be."""
    return yaml.safe_dump([text], default_flow_style=True, allow_unicode=True, width=2**20).strip()[1:-1]
