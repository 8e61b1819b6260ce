"""Format the scores of models on texts as tables."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from mergekit_omp.checkpoints.tokenizers import tokenizer_of
from mergekit_omp.evaluation.bits_per_byte import ModelScore, TextScore, evaluate
from mergekit_omp.evaluation.spans import SpanClass
from mergekit_omp.report.record import base_of
from mergekit_omp.report.tables import new_table, render

Spans = Mapping[str, Mapping[str, float]]
"""For each class of tokens "tokens", "bits_per_byte" and "ideal_bits_per_byte"."""


def score_table(scores: Sequence[ModelScore]) -> Table:
    """Build a table with a row per text and a group of numbers per model."""
    names = _short_names([score.model for score in scores])
    table = new_table("", *(f"{name}\nbits/B  tokens/B  agree" for name in names))
    rows = [(*score.texts, score.overall) for score in scores]
    for text_scores in zip(*rows, strict=True):
        table.add_row(text_scores[0].text, *map(_numbers, text_scores))
    return table


def span_table(score: ModelScore) -> Table:
    """Make a table of where a model loses bits against its base: bits per byte beside the ideal ones, by class."""
    return table_of_spans({text.text: text.as_dict()["spans"] for text in (*score.texts, score.overall)})


def table_of_spans(measured: Mapping[str, Spans | None]) -> Table:
    """Make the table of :func:`span_table` from what ``--json`` and the record have, with a name for each row."""
    table = new_table("", "gap", *(f"{kind.value}\nbits/B  ideal" for kind in SpanClass))
    for name, spans in measured.items():
        if spans is None:
            table.add_row(name, *["-"] * (len(SpanClass) + 1))
            continue
        cells = [(spans[kind.value]["bits_per_byte"], spans[kind.value]["ideal_bits_per_byte"]) for kind in SpanClass]
        table.add_row(name, f"{gap(spans):.3f}", *(f"{bits:.3f}  {ideal:.3f}" for bits, ideal in cells))
    return table


def gap(spans: Spans) -> float:
    """Bits per byte that a model loses against its base, given its spans of all classes."""
    return sum(span["bits_per_byte"] - span["ideal_bits_per_byte"] for span in spans.values())


def evaluate_output(
    record: Mapping[str, Any], folder: str | Path, base: str | None = None, **options: Any
) -> dict[str, Any]:
    """Measure a transplanted model beside its base on the built-in held-out texts.

    Args:
        record: of the model.
        folder: the model's.
        base: the model that it was made from; the record's first input if None.
        options: of :func:`mergekit_omp.evaluation.bits_per_byte.evaluate`.

    Returns:
        The scores of both, under "base" and "output", as ``ModelScore.as_dict`` has them.

    Raises:
        OmpError: a model cannot be loaded.
    """
    base = base or base_of(record)
    reader = partial(tokenizer_of, trust_remote_code=options.get("trust_remote_code", False))
    scores = evaluate([base, folder], base=base, read_tokenizer=reader, **options)
    return {"base": scores[0].as_dict(), "output": scores[1].as_dict()}


def format_scores(scores: Sequence[ModelScore]) -> str:
    """Format the table of :func:`score_table` as plain text."""
    return render(score_table(scores))


def _numbers(score: TextScore) -> str:
    agreement = "-" if score.agreement is None else f"{score.agreement:.1%}"
    return f"{score.bits_per_byte:.3f}  {score.tokens_per_byte:8.3f}  {agreement:>6}"


def _short_names(names: Sequence[str]) -> list[str]:
    """Shorten names to their last part if that is unambiguous."""
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(set(names)) else list(names)
