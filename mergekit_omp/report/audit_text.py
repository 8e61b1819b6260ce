"""Sentences on what a run's audit found."""

from collections.abc import Mapping
from typing import Any

from mergekit_omp.parameters import UnsafeTokens
from mergekit_omp.report.samples import printable

NAMED = 10

_REPLACED_BY = {UnsafeTokens.MEAN.value: "the mean row", UnsafeTokens.PIECES.value: "the mean of their pieces' rows"}


def unsafe_sentence(rows: Mapping[str, Any]) -> str:
    """Describe what the check of an input's approximated rows found, as the record has it."""
    replacement = _REPLACED_BY.get(rows["unsafe_tokens"])
    how = "suspicious" if replacement else "suspicious, as far as the rows alone tell"
    found = f"{rows['model']}: {rows['flagged']:,} of {rows['checked']:,} approximated rows are {how}"
    if not rows["flagged"]:
        return f"{found}."
    names = _names(rows["worst"], rows["flagged"])
    if replacement:
        return f"{found} and were replaced by {replacement}, the worst first: {names}."
    return f"{found}, the worst first: {names}. `mergekit-omp audit` tells more; unsafe_tokens: pieces replaces them."


def audit_lines(record: Mapping[str, Any]) -> list[str]:
    """Describe the audit of a record; [] for one of an earlier version, which has none."""
    audit = record.get("audit")
    if not audit:
        return []
    unchanged = audit["scripts"] - len(audit["changed_scripts"])
    not_given_back = f"; not {', '.join(audit['changed_scripts'])}" if audit["changed_scripts"] else ""
    return [
        _tokens("tokens are made of no text", audit["unreachable"]),
        _tokens("added tokens hold a chat control string", audit["control_strings"]),
        f"{audit['free_rows']:,} rows have no token",
        f"{unchanged} of {audit['scripts']} scripts are given back by encoding and decoding{not_given_back}",
        *map(unsafe_sentence, audit["rows"]),
    ]


def _tokens(what: str, tokens: Mapping[str, Any]) -> str:
    listed = f": {_names(tokens['first'], tokens['count'])}" if tokens["count"] else ""
    return f"{tokens['count']:,} {what}{listed}"


def _names(tokens: list[dict[str, Any]], count: int) -> str:
    return " ".join(printable(token["token"]) for token in tokens[:NAMED]) + (" …" if count > NAMED else "")
