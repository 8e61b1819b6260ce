"""Format a forecast as the text that ``mergekit-omp inspect`` prints."""

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit_omp.parameters import Approximation
from mergekit_omp.report.summary import label
from mergekit_omp.report.tables import Part, heading, indented, new_table, note


def describe_forecast(found: Mapping[str, Any]) -> Iterator[Part]:
    """Yield the parts of the text.

    Args:
        found: result of :func:`mergekit_omp.report.forecast.forecast`.
    """
    yield (
        f"{found['merge_method']}, with the tokenizer of {found['tokenizer_source']}: {found['tokens']:,} tokens, "
        f"{found['rows']:,} rows"
    )
    yield ""
    yield heading("Vocabularies")
    vocabularies = new_table("model", "numbers", "tokens", align="llr")
    for vocabulary in found["vocabularies"]:
        vocabularies.add_row(vocabulary["name"], vocabulary["numerals"], f"{vocabulary['tokens']:,}")
    yield indented(vocabularies)
    for model in found["inputs"]:
        yield ""
        yield from _describe_input(model, found["tokens"])
    yield ""
    yield heading("Solves")
    yield from _describe_solves(found)
    yield ""
    yield heading(f"Estimates for {found['device']}")
    estimate = found["estimate"]
    estimates = new_table("", "", header=False)
    if estimate["solve_seconds"] is not None:
        estimates.add_row("time to solve", duration(estimate["solve_seconds"]))
    estimates.add_row("peak memory", size(estimate["peak_memory_bytes"]))
    estimates.add_row("disk", size(estimate["output_bytes"]))
    yield indented(estimates)


def _describe_input(model: Mapping[str, Any], tokens: int) -> Iterator[Part]:
    yield heading(model["name"])
    yield f"  {model['kept']:,} of {tokens:,} tokens keep a row of this model, {model['lacking']:,} are new"
    reasons = new_table("", "", align="rl", header=False)
    for reason, count in model["match"].items():
        reasons.add_row(f"{count:,}", label(reason))
    yield indented(reasons, 4)
    if model["special_pairs"]:
        pairs = new_table("special token of the output", "of the model", "reason", align="lll")
        for pair in model["special_pairs"]:
            pairs.add_row(pair["output"], pair["model"], pair["reason"])
        yield indented(pairs, 4)
    if model["special_without_partner"]:
        yield f"  special tokens without a match: {' '.join(model['special_without_partner'])}"
    if model["examples"]:
        yield f"  new tokens, for example: {'  '.join(model['examples'])}"
    for copied in model["copied"]:
        yield f"  {describe_copies(copied)}"
    for sentence in model["advice"]:
        yield note(sentence)


def describe_copies(copied: Mapping[str, Any]) -> str:
    """Say what becomes of the tokens that an input lacks and another model of the recipe has."""
    tokens = f"{copied['tokens']:,} tokens that only {copied['model']} has"
    if copied["copied"] is None:
        return f"{tokens}: copied if the rows of shared tokens are similar, which is tested when the recipe runs"
    decision = f"{tokens}: {'copied' if copied['copied'] else 'approximated, since its embedding space differs'}"
    if copied["similarity"] is None:
        return decision
    return f"{decision} (median similarity of the rows of shared tokens: {copied['similarity']:.2f})"


def _describe_solves(found: Mapping[str, Any]) -> Iterator[Part]:
    if found["solves"]:
        solves = new_table("donor", "new tokens", "anchors", "k", "solves", "time")
        for solve in found["solves"]:
            solves.add_row(
                solve["donor"],
                f"{solve['targets']:,}",
                f"{solve['atoms']:,}",
                str(solve["k"]),
                str(solve["matrices"]),
                "" if solve["seconds"] is None else duration(solve["seconds"]),
            )
        yield indented(solves)
    others = [name for name in found["approximations"] if name != Approximation.OMP.value]
    if others:
        yield f"  none for tensors whose new rows are made by {' or '.join(others)}"
    elif not found["solves"]:
        yield "  none: there are no new tokens"


def size(count: int | None) -> str:
    """Format a number of bytes; None is unknown.

    Example:
        >>> size(2_300_000_000)
        '2.3 GB'
    """
    if count is None:
        return "unknown"
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Format a number of seconds, rounded.

    Example:
        >>> duration(200)
        '3 min'
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
