"""An audit as text for a terminal."""

from collections.abc import Iterator, Sequence

from rich.table import Table

from mergekit_omp.audit.audit import Audit, RowCheck
from mergekit_omp.audit.bounds import EXCESS
from mergekit_omp.audit.scripts import SCRIPTS
from mergekit_omp.report.samples import printable, readable
from mergekit_omp.report.tables import Part, heading, indented, new_table
from mergekit_omp.vocabulary.tokens import Token

SHOWN = 20


def audit_summary(audit: Audit) -> Iterator[Part]:
    """Yield the parts of the text."""
    yield heading(f"Rows of {audit.model} beside {audit.base}")
    yield f"  {audit.kept:,} rows of tokens that the base has{_changed(audit)}; {audit.checked:,} others checked"
    yield f"  on {audit.states} states of the base"
    yield ""
    if audit.flagged:
        yield heading(f"{len(audit.flagged):,} rows are suspicious, the worst first")
        yield indented(_row_table(audit.flagged[:SHOWN]))
        yield from _more(len(audit.flagged))
    else:
        yield f"No row is suspicious: none is more than {EXCESS:g} times as likely as its bytes allow, or far"
        yield "from what the rows of its pieces predict."
    if audit.worst:
        yield ""
        yield heading("Other rows that are likelier than their bytes allow, on few states or by less")
        yield indented(_row_table(audit.worst))
    yield ""
    yield heading("Tokenizer")
    yield f"  {audit.free_rows:,} rows have no token"
    yield from _tokens("tokens are made of no text", audit.tokens.unreachable)
    yield from _tokens("added tokens hold a chat control string", audit.tokens.control)
    changed = audit.tokens.changed_scripts
    yield f"  {len(SCRIPTS) - len(changed)} of {len(SCRIPTS)} scripts are given back by encoding and decoding"
    if changed:
        yield f"    not given back: {', '.join(changed)}"


def _changed(audit: Audit) -> str:
    return f", {audit.changed:,} of them changed since" if audit.changed else ", all as in the base"


def _row_table(rows: Sequence[RowCheck]) -> Table:
    columns = ("token", "id", "states", "times bound", "probability", "mean logit", "kept", "distance", "why")
    table = new_table(*columns, align="lrrrrrrrl")
    for row in rows:
        table.add_row(
            printable(row.token),
            str(row.id),
            f"{row.share:.1%}",
            f"{row.ratio:.3g}",
            f"{row.probability:.2g}",
            f"{row.mean_logit:.2f}",
            f"{row.highest_kept:.2f}",
            f"{row.distance:.2f}",
            ", ".join(row.reasons),
        )
    return table


def _tokens(what: str, tokens: Sequence[Token]) -> Iterator[str]:
    yield f"  {len(tokens):,} {what}"
    if tokens:
        names = " ".join(f"{printable(readable(token))} ({token.id})" for token in tokens[:SHOWN])
        yield f"    {names}"
        yield from _more(len(tokens), "    ")


def _more(count: int, indent: str = "  ") -> Iterator[str]:
    if count > SHOWN:
        yield f"{indent}… and {count - SHOWN:,} more; --json lists all"
