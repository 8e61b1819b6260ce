"""The texts of a healing: read, hashed, cut into windows, and a part held out."""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_omp.errors import OmpError
from mergekit_omp.evaluation.bits_per_byte import windows

WINDOW_BYTES = 768
"""Short, so that a step has several windows; some scripts take a token a byte."""
HELD_OUT_WINDOWS = 12
HELD_OUT_SHARE = 10
"""One of so many windows is held out, up to ``HELD_OUT_WINDOWS``."""
MIN_WINDOWS = 4


@dataclass(frozen=True)
class Texts:
    """Windows of texts.

    Attributes:
        training: in random order.
        held_out: for checks alone.
        sources: what the record has on them.
    """

    training: Sequence[str]
    held_out: Sequence[str]
    sources: Sequence[Mapping[str, Any]]


def read_texts(paths: Sequence[str], seed: int) -> Texts:
    """Read text files and ``.jsonl`` files with a ``text`` in each line.

    Raises:
        OmpError: a file that cannot be read, is not UTF-8, or is no JSON Lines with texts; too little text.
    """
    documents, sources = [], []
    for path in paths:
        data = _read(path)
        documents += list(_documents(path, data))
        sources.append({"name": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    return make_texts(documents, sources, seed)


def make_texts(documents: Sequence[str], sources: Sequence[Mapping[str, Any]], seed: int) -> Texts:
    """Cut documents into windows, shuffle these, and hold some out.

    Raises:
        OmpError: fewer than ``MIN_WINDOWS`` windows.
    """
    found = [window for document in documents for window in windows(document, WINDOW_BYTES) if window.strip()]
    if len(found) < MIN_WINDOWS:
        size = sum(len(document.encode()) for document in documents)
        raise OmpError(
            f"text: {size:,} bytes are too few to train on: name texts with at least {MIN_WINDOWS * WINDOW_BYTES:,}."
        )
    random.Random(seed).shuffle(found)
    count = max(1, min(HELD_OUT_WINDOWS, len(found) // HELD_OUT_SHARE))
    return Texts(found[count:], found[:count], sources)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise OmpError(f"text: {path} cannot be read ({error.strerror}); name a text file.") from error


def _documents(path: str, data: bytes) -> Iterator[str]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise OmpError(f"text: {path} is not UTF-8 (byte {error.start}); convert it, as with iconv.") from error
    if Path(path).suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield _text_of_line(path, number, line)


def _text_of_line(path: str, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise OmpError(f"text: {path}, line {number}: invalid JSON ({error}); one object a line.") from error
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise OmpError(f'text: {path}, line {number}: no "text"; write {{"text": "…"}} in each line.')
    return value["text"]
