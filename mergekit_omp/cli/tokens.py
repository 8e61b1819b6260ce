"""``mergekit-omp tokens``: which new tokens matter most for a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from mergekit_omp.cli.options import JSON, TEXTS, print_json, read_texts, silence_transformers, working

if TYPE_CHECKING:
    from rich.table import Table

    from mergekit_omp.report.token_impact import Impact


@click.command(short_help="Rank the new tokens that matter most for a text.")
@click.argument("out", type=click.Path())
@TEXTS
@click.option("--most", type=click.IntRange(min=1), default=20, show_default=True, help="How many to print.")
@JSON
def tokens(out: str, texts: tuple[str, ...], most: int, as_json: bool) -> None:
    """Rank the approximated tokens of OUT by how often a text uses them times their relative residual.

    OUT is the folder of a model made with `merge_method: omp`. A token that ranks high is worth an override in the
    recipe.
    """
    silence_transformers()
    from mergekit_omp.checkpoints.models import tokenizer_of
    from mergekit_omp.report.record import read_record
    from mergekit_omp.report.tables import show
    from mergekit_omp.report.token_impact import rank_tokens

    record = read_record(out)
    with working("Splitting texts into tokens"):
        ranked, total = rank_tokens(record, tokenizer_of(out, key="OUT"), read_texts(texts).values())
    if as_json:
        print_json([{**vars(token), "impact": token.impact} for token in ranked])
        return
    uses = sum(token.uses for token in ranked)
    show(
        f"{uses:,} of {total:,} tokens in the texts are approximated ({uses / total:.1%}), {len(ranked):,} different."
    )
    if ranked:
        show("", impact_table(ranked[:most]), "", "Give tokens of high impact a row in the recipe: tokenizer.tokens.")


def impact_table(ranked: Sequence[Impact]) -> Table:
    """Make a table with a row for each token."""
    from mergekit_omp.report.tables import new_table

    table = new_table("token", "id", "uses", "residual", "impact")
    for token in ranked:
        residual, impact = f"{token.relative_residual:.3f}", f"{token.impact:.2f}"
        table.add_row(repr(token.text), str(token.id), str(token.uses), residual, impact)
    return table
