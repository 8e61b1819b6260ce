"""Special tokens: which strings mean the same across model families, and which are kept free for later use."""

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import yaml


@cache
def table() -> Mapping[str, Any]:
    """The data of ``equivalents.yaml``."""
    return yaml.safe_load(resources.files(__package__).joinpath("equivalents.yaml").read_text(encoding="utf-8"))


@cache
def _unused_pattern() -> re.Pattern[str]:
    return re.compile("|".join(table()["unused"]))


@cache
def _meanings() -> Mapping[str, str]:
    return {text: meaning for meaning, texts in table()["equivalents"].items() for text in texts}


def is_unused_text(text: str) -> bool:
    """Whether a token's string says that it is kept free for later use, such as ``<unused12>``."""
    return text[-1:] in (">", "]") and _unused_pattern().fullmatch(text) is not None


def is_html(text: str) -> bool:
    """Whether a string of the table is an HTML tag, unless its tokenizer says that it is special."""
    return text in table()["html"]


def meaning_of(text: str) -> str | None:
    """What a control token is for, by the built-in table: ``<|im_end|>`` is an "end_of_turn". None if not listed."""
    return _meanings().get(text)


def equivalents_of(text: str) -> tuple[str, ...]:
    """The strings that mean the same as a control token's, itself apart, in the table's order of preference."""
    meaning = meaning_of(text)
    return () if meaning is None else tuple(other for other in table()["equivalents"][meaning] if other != text)
