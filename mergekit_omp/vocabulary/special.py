"""Look up special tokens: strings with the same meaning across model families, and unused tokens."""

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import yaml


@cache
def table() -> Mapping[str, Any]:
    """Return the data of ``equivalents.yaml``."""
    return yaml.safe_load(resources.files(__package__).joinpath("equivalents.yaml").read_text(encoding="utf-8"))


@cache
def _unused_pattern() -> re.Pattern[str]:
    return re.compile("|".join(table()["unused"]))


@cache
def _meanings() -> Mapping[str, str]:
    return {text: meaning for meaning, texts in table()["equivalents"].items() for text in texts}


def is_unused_text(text: str) -> bool:
    """Tell whether a string marks a token that is reserved for later use, such as ``<unused12>``."""
    return text[-1:] in (">", "]") and _unused_pattern().fullmatch(text) is not None


def is_html(text: str) -> bool:
    """Tell whether a string of the table is an HTML tag unless its tokenizer declares it special."""
    return text in table()["html"]


def meaning_of(text: str) -> str | None:
    """Return the meaning of a control token by the built-in table ("end_of_turn" for ``<|im_end|>``), or None."""
    return _meanings().get(text)


def equivalents_of(text: str) -> tuple[str, ...]:
    """Return the other strings with the meaning of a control token, in the table's order of preference."""
    meaning = meaning_of(text)
    return () if meaning is None else tuple(other for other in table()["equivalents"][meaning] if other != text)
