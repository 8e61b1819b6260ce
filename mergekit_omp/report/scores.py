"""Format the scores of models on texts as tables."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from mergekit_omp.evaluation.bits_per_byte import ModelScore, TextScore
from mergekit_omp.evaluation.spans import SpanClass
from mergekit_omp.report.tables import new_table, render


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
    table = new_table("", "gap", *(f"{kind.value}\nbits/B  ideal" for kind in SpanClass))
    for text in (*score.texts, score.overall):
        if text.spans is None:
            table.add_row(text.text, *["-"] * (len(SpanClass) + 1))
            continue
        cells = [(span.bits / text.n_bytes, span.ideal_bits / text.n_bytes) for span in text.spans.values()]
        gap = sum(bits - ideal for bits, ideal in cells)
        table.add_row(text.text, f"{gap:.3f}", *(f"{bits:.3f}  {ideal:.3f}" for bits, ideal in cells))
    return table


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
