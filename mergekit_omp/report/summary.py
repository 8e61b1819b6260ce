"""Format the record of a transplant as text, partly shared with the page."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergekit_omp.report.audit_text import audit_lines
from mergekit_omp.report.record import copied_rows
from mergekit_omp.report.scores import Spans, table_of_spans
from mergekit_omp.report.tables import Part, heading, indented, new_table, note

JsonObject = Mapping[str, Any]

_LABELS = {
    "no token": "no token has this id",
    "same string": "same string",
    "same bytes": "same bytes, other string",
    "byte token": "a single byte",
    "special content": "special token, same string",
    "special role": "special token, same role",
    "special equivalent": "special token, same meaning",
    "special renamed": "special token, renamed",
    "unused": "reserved for later use",
    "missing": "new token",
    "missing special": "new special token",
    "duplicate": "never written, since another token has the same bytes",
}
_WITHOUT_ROW = ("no token", "missing", "missing special", "duplicate")
"""Reasons for which no output row is a row of the input."""

_RESERVED = "unused"
"""The reason of tokens that are reserved for later use: some may have a row of the input."""


def summary(record: JsonObject) -> Iterator[Part]:
    """Yield the parts of the text.

    Args:
        record: a complete record, as :mod:`mergekit_omp.report.record` writes it.
    """
    yield subtitle(record)
    for model in inputs(record):
        yield ""
        yield heading(model["name"])
        yield f"  {model['kept']:,} of {record['tokens']:,} tokens keep a row of this model"
        reasons = new_table("", "", align="rl", header=False)
        for reason, count in matches(model):
            reasons.add_row(f"{count:,}", label(reason))
        yield indented(reasons, 4)
    for donor in dict.fromkeys(solve["donor"] for solve in record["solves"]):
        yield ""
        yield heading(f"Solves with the rows of {donor}")
        yield from _describe_solves([solve for solve in record["solves"] if solve["donor"] == donor])
    if other_rows(record):
        yield ""
    yield from other_rows(record)
    yield from (sentence for tensor in record["tensors"] for sentence in copied_rows(tensor))
    yield ""
    yield heading("Tokens per byte")
    texts = new_table("text", "before", "after")
    for text in record["texts"]:
        texts.add_row(text["name"], f"{text['before']:.3f}", f"{text['after']:.3f}")
    yield indented(texts)
    for title, measured in measured_spans(record):
        yield ""
        yield heading(title)
        yield indented(table_of_spans(measured))
    lines = audit_lines(record)
    if lines:
        yield ""
        yield heading("Audit, the part that runs no model")
        yield from (f"  {line}" for line in lines)
    notes = [sentence for sentence in advice(record) if sentence not in lines]
    if notes:
        yield ""
    yield from map(note, notes)


def _describe_solves(solves: Sequence[JsonObject]) -> Iterator[Part]:
    table = new_table("matrix", "new tokens", "anchors", "k", "seconds", "mean residual", "median", "p95")
    for solve in solves:
        table.add_row(
            solve["tensor"],
            f"{solve['targets']:,}",
            f"{solve['atoms']:,}",
            str(solve["k"]),
            f"{solve['seconds']:.1f}",
            *(f"{solve['residuals'][key]:.3f}" for key in ("mean", "median", "p95")),
        )
    yield indented(table)
    for solve in solves:
        anchors = " ".join(anchor["token"] for anchor in solve["usage"]["most_used"][:12])
        yield f"  most used anchors in {solve['tensor']}: {anchors}"


def subtitle(record: JsonObject) -> str:
    """Describe what was merged, and when."""
    models = ", ".join(model["name"] for model in inputs(record))
    return (
        f"{record['merge_method']}: {models} with the tokenizer of {record['tokenizer_source']}, {record['created']}"
    )


def inputs(record: JsonObject) -> list[JsonObject]:
    """Return the models that were merged."""
    return [model for model in record["models"] if "input" in model["roles"]]


def advice(record: JsonObject) -> list[str]:
    """Return the warnings about all inputs."""
    return [sentence for model in inputs(record) for sentence in model["advice"]]


def matches(model: JsonObject) -> list[tuple[str, int]]:
    """Return the reasons of an input's match with the number of tokens, most frequent first."""
    return sorted(model["match"].items(), key=lambda item: -item[1])


def kept_by_reason(model: JsonObject) -> dict[str, int]:
    """Return how many of the tokens of each reason of an input's match keep a row of the input.

    The record counts those of all reasons together; reserved tokens keep what no other reason does.
    """
    none = (*_WITHOUT_ROW, _RESERVED)
    kept = {reason: 0 if reason in none else count for reason, count in model["match"].items()}
    if _RESERVED in kept:
        kept[_RESERVED] = model["kept"] - sum(kept.values())
    return kept


def measured_spans(record: JsonObject) -> list[tuple[str, Mapping[str, Spans | None]]]:
    """List what was measured of where bits are lost, each with a title and the names of its rows.

    ``record["evaluation"]`` is what ``report --evaluate`` adds; ``record["heal"]`` is written by ``heal``.
    """
    found: list[tuple[str, Mapping[str, Spans | None]]] = []
    if evaluation := record.get("evaluation"):
        base, output = evaluation["base"], evaluation["output"]
        bits = ", ".join(
            f"{score['overall']['bits_per_byte']:.3f} {whose}"
            for score, whose in ((base, f"for {base['model']}"), (output, "now"))
        )
        scores = [*output["texts"], output["overall"]]
        found.append((f"Bits per byte: {bits}", {score["text"]: score["spans"] for score in scores}))
    if heal := record.get("heal"):
        found.append(("Bits per byte before and after healing", {key: heal.get(key) for key in ("before", "after")}))
    return found


def label(reason: str) -> str:
    """Return the label of a reason of :func:`matches`."""
    return _LABELS.get(reason, reason)


def other_rows(record: JsonObject) -> list[str]:
    """Describe the tensors whose new rows were made by other initializers than OMP."""
    made_by = [(tensor, tensor["parameters"].get("approximation", "omp")) for tensor in record["tensors"]]
    return [f"{tensor['name']} of {tensor['model']}: new rows by {name}" for tensor, name in made_by if name != "omp"]
