"""What a run says in the log: once at its start what it will do, once at its end what it made."""

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click
from tqdm.contrib.logging import logging_redirect_tqdm

from mergekit_omp.recipe.transplant import RecipeModel, Transplant
from mergekit_omp.report.forecast import expected_costs
from mergekit_omp.report.forecast_text import duration, size
from mergekit_omp.report.record import Record, match_counts
from mergekit_omp.report.tables import next_steps, render

LOG = logging.getLogger(__name__)
PACKAGE = logging.getLogger("mergekit_omp")

NAMED = 20
"""Tokens without a row that are named."""


def best_effort(step: Callable[..., None]) -> Callable[..., None]:
    """Leave out lines that cannot be made: the log of a run must not stop it."""

    @functools.wraps(step)
    def attempt(*args: Any, **kwargs: Any) -> None:
        try:
            step(*args, **kwargs)
        except Exception:
            LOG.debug("Lines of the log are left out", exc_info=True)

    return attempt


class LineFormatter(logging.Formatter):
    """Write lines of this package as sentences, and those of others as they were."""

    def __init__(self, others: logging.Formatter | None, *, colours: bool) -> None:
        super().__init__("%(message)s")
        self._others = others or logging.Formatter()
        self._colours = colours

    def format(self, record: logging.LogRecord) -> str:
        """Begin the line with the name of the package, and with the level where that is a warning or worse."""
        if record.name.partition(".")[0] != PACKAGE.name:
            return self._others.format(record)
        level = f"{record.levelname.capitalize()}: " if record.levelno >= logging.WARNING else ""
        if level and self._colours:
            level = click.style(level, fg="yellow" if record.levelno == logging.WARNING else "red", bold=True)
        return f"mergekit-omp: {level}{super().format(record)}"


@contextmanager
def run_lines(*, quiet: bool) -> Iterator[None]:
    """Show this package's lines, above any progress bar, while a run lasts.

    Args:
        quiet: show errors alone, and nothing else, whatever the level that mergekit's ``-v`` sets for its own lines.
    """
    level, handlers = PACKAGE.level, list(logging.root.handlers)
    PACKAGE.setLevel(logging.ERROR if quiet else logging.INFO)
    try:
        with logging_redirect_tqdm() if any(map(_is_console, handlers)) else nullcontext():
            for handler in logging.root.handlers:
                if handler not in handlers and isinstance(handler, logging.StreamHandler):  # the redirection's own
                    colours = handler.stream.isatty() and "NO_COLOR" not in os.environ
                    handler.setFormatter(LineFormatter(handler.formatter, colours=colours))
            yield
    finally:
        PACKAGE.setLevel(level)


def _is_console(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)


@best_effort
def log_start(transplant: Transplant) -> None:
    """Log what the run will do, and what it will cost."""
    if not LOG.isEnabledFor(logging.INFO):
        return
    LOG.info(
        "%s of %s with the tokenizer of %s: %s tokens",
        transplant.config.merge_method,
        ", ".join(map(str, transplant.inputs)),
        transplant.source,
        f"{len(transplant.vocabulary.tokens):,}",
    )
    for model in transplant.inputs:
        LOG.info("%s", _describe_match(model))
    LOG.info("%s", _describe_plan(transplant))


def _describe_match(model: RecipeModel) -> str:
    match = model.match
    counts = ", ".join(f"{count:,} {reason}" for reason, count in match_counts(match).items())
    return f"{model}: {int((match.rows >= 0).sum()):,} tokens kept, {int(match.is_new().sum()):,} new ({counts})"


def _describe_plan(transplant: Transplant) -> str:
    costs = expected_costs(transplant)
    solves, estimate = costs["solves"], costs["estimate"]
    others = [name for name in costs["approximations"] if name != "omp"]
    count = sum(solve["matrices"] for solve in solves)
    parts = [
        f"{_solves(count)} of {_range([solve['targets'] for solve in solves])} new tokens over "
        f"{_range([solve['atoms'] for solve in solves])} anchors with k = {_range([solve['k'] for solve in solves])}"
        if solves
        else "no solve" + ("" if others else ": no new tokens")
    ]
    if others:
        parts.append(f"new rows by {' or '.join(others)}")
    if estimate["solve_seconds"]:
        parts.append(f"about {duration(estimate['solve_seconds'])} to solve on {transplant.options.device}")
    parts += [
        f"peak memory about {size(estimate['peak_memory_bytes'])}",
        f"output {size(estimate['output_bytes'])}",
    ]
    return "; ".join(parts)


def _solves(count: int) -> str:
    return "1 solve" if count == 1 else f"{count} solves"


def _range(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def log_summary(record: Record, out_path: str | os.PathLike[str], seconds: float) -> None:
    """Log what the user should know of each input, what was made, where, how long it took, and what to do next.

    Args:
        record: of the run.
        out_path: the finished output folder.
        seconds: of the run.
    """
    for model in record.transplant.inputs:
        _log_warnings(model, record)
    _log_result(record, Path(out_path), seconds)


@best_effort
def _log_warnings(model: RecipeModel, record: Record) -> None:
    _warn_of_uncovered(model, record)
    for sentence in record.warnings(model):
        LOG.warning("%s", sentence)


@best_effort
def _log_result(record: Record, out: Path, seconds: float) -> None:
    transplant = record.transplant
    made = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    if record.solves or not record.other_rows:
        LOG.info("%s: %s", _solves(len(record.solves)), _describe_solves(record))
    LOG.info(
        "%s has the model: %s tokens, %s rows, %s, made in %s",
        out,
        f"{len(transplant.vocabulary.tokens):,}",
        f"{transplant.rows:,}",
        size(made),
        duration(seconds),
    )
    LOG.info("%s", render(*next_steps(next_commands(str(out), str(transplant.base)))))


def next_commands(out: str, base: str) -> list[tuple[list[str], str]]:
    """List the commands to run after a transplant, each with what it is for.

    Args:
        out: the folder of the new model.
        base: the model before the transplant.

    Example:
        >>> from mergekit_omp.report.run_log import next_commands
        >>> next_commands("out", "google/gemma-3-270m")[0]
        (['mergekit-omp', 'report', 'out'], 'what the transplant did')
    """
    commands = [
        (["report", out], "what the transplant did"),
        (["eval", out, "--base", base], "how well it predicts texts, beside its base"),
        (["heal", out, f"{out.rstrip('/')}-healed"], "a short training, which takes back part of the loss"),
    ]
    return [(["mergekit-omp", *arguments], purpose) for arguments, purpose in commands]


def _warn_of_uncovered(model: RecipeModel, record: Record) -> None:
    ids = record.uncovered.get(model, [])
    if not ids:
        return
    names = [record.transplant.vocabulary.tokens[id_].text for id_ in ids]
    LOG.warning(
        "%s has no row for %d tokens and neither has a donor; they get the mean of the kept rows: %s%s",
        model,
        len(names),
        " ".join(map(repr, names[:NAMED])),
        " …" if len(names) > NAMED else "",
    )


def _describe_solves(record: Record) -> str:
    targets = sum(solve["targets"] for solve in record.solves)
    if not targets:
        return "no new tokens"
    mean = sum(solve["targets"] * solve["residuals"]["mean"] for solve in record.solves) / targets
    seconds = sum(solve["seconds"] for solve in record.solves)
    return f"{targets:,} rows approximated with a mean relative residual of {mean:.3f} in {seconds:.1f} s"
