"""Define the exception for users' mistakes, and explain failures of a run that are not bugs.

This module must import fast: every other module imports it.
"""

import errno
import logging
import os
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

LOG = logging.getLogger(__name__)

UNFINISHED = ".unfinished"
"""Ending of the folder that holds the files of an output until all are there."""


class OmpError(click.ClickException, ValueError):
    """Raised for an invalid recipe or model; the message is shown to the user.

    mergekit's commands are click commands, which print ``Error: <message>`` for this exception and exit with status 1,
    without a traceback. In Python it is a ``ValueError``.

    Example:
        >>> from mergekit_omp import OmpError
        >>> try:
        ...     raise OmpError("k is 0, but OMP needs at least one atom per token: write k: 1 or more.")
        ... except ValueError as error:
        ...     print(error)
        k is 0, but OMP needs at least one atom per token: write k: 1 or more.
    """

    def __init__(self, message: str) -> None:
        # Lone surrogates, which JSON and YAML can contain, cannot be printed.
        printable = message.encode(errors="backslashreplace").decode()
        super().__init__(_LONG_WORD.sub(r"\1…", printable))


_LONG_WORD = re.compile(r"(\S{200})\S{300,}")
"""A word that nobody reads to its end, such as a value of a damaged file."""

_LONGEST_REASON = 500


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, without the advice that follows.

    Example:
        >>> from mergekit_omp.errors import first_line
        >>> first_line(KeyError("vocab")), first_line(MemoryError())
        ("the key 'vocab' is missing", 'MemoryError')
    """
    if isinstance(error, KeyError):
        return f"the key {error} is missing"
    lines = [line.strip() for line in str(error).strip().splitlines()]
    heading = lines[:1] if not lines or not lines[0].endswith(":") else lines[:2]
    text = " ".join(heading).rstrip(" .:,") or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"


@contextmanager
def failures_as(sentence: Callable[[str], str]) -> Iterator[None]:
    """Raise whatever a library raises in the block as an OmpError; a panic of Rust is not an ``Exception``.

    Args:
        sentence: makes the message from the first line of the exception.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, OmpError):
        raise
    except BaseException as error:
        raise OmpError(sentence(first_line(error))) from error


_FULL = "free some space or name a folder on another disk"
_CANNOT_WRITE = {
    errno.ENOSPC: f"the disk is full; {_FULL}",
    errno.EDQUOT: f"the disk quota is used up; {_FULL}",
    errno.EFBIG: "a file would be larger than is allowed; set a smaller --out-shard-size",
    errno.EROFS: "the file system is read-only; name another folder",
    errno.EACCES: "permission is denied; grant it or name another folder",
}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # the form in which safetensors and tokenizers report it


@contextmanager
def explained(out_path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise known failures of the block as an OmpError; other exceptions are bugs and keep their traceback."""
    try:
        yield
    except OmpError:
        raise
    except Exception as error:
        sentence = explanation(error, out_path)
        if sentence is None:
            raise
        LOG.debug("%s", sentence, exc_info=error)
        is_of_output = cannot_write(error) and _other_file(error, out_path) is None
        raise OmpError(f"{sentence} Nothing was left there." if is_of_output else sentence) from error


def explanation(error: Exception, out_path: str | os.PathLike[str]) -> str | None:
    """Explain a failure of a run in a sentence for the user; return None for an unknown error."""
    if isinstance(error, OmpError):
        return error.message
    if problem := cannot_write(error):
        if name := _other_file(error, out_path):
            return f"{name} cannot be read or written: {problem}."
        return f"{out_path} cannot be written: {problem}."
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    ):
        return "Out of memory; use a machine with more, or see `mergekit-omp inspect` for what a recipe needs."
    if type(error) in (RuntimeError, ValueError) and _raised_by_mergekit(error):
        return f"mergekit rejects the recipe: {error}."
    return None


def cannot_write(error: Exception) -> str | None:
    """Return why the operating system does not let a file be written; None for other errors."""
    return _CANNOT_WRITE.get(_errno(error) or 0)


def _other_file(error: Exception, out_path: str | os.PathLike[str]) -> str | None:
    """Return the file that an error names, such as one of an input or a cache; None for one of the output."""
    name = getattr(error, "filename", None)
    if not isinstance(name, str):
        return None
    out, path = Path(os.path.realpath(out_path)), Path(os.path.realpath(name))
    folders = (out, out.with_name(out.name + UNFINISHED))
    return None if any(folder in (path, *path.parents) for folder in folders) else name


def _errno(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = _OS_ERROR.search(str(error))
    return int(found.group(1)) if found else None


def _raised_by_mergekit(error: Exception) -> bool:
    """Tell whether mergekit itself raised the exception, with a message for its users."""
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    module = frame.f_globals.get("__name__", "")
    return module == "mergekit" or module.startswith("mergekit.")
