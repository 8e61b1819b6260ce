"""Render the record of a transplant as a self-contained HTML page from ``page.html.j2``."""

from collections.abc import Mapping
from typing import Any

import jinja2

from mergekit_omp.evaluation.spans import SpanClass
from mergekit_omp.report import summary
from mergekit_omp.report.audit_text import audit_lines
from mergekit_omp.report.pictures import (
    as_svg,
    draw_matches,
    draw_residuals,
    draw_spans,
    draw_texts,
    draw_usage,
    require_matplotlib,
    sides,
    solves_with_targets,
)
from mergekit_omp.report.scores import Spans, gap
from mergekit_omp.report.summary import JsonObject


def page(record: JsonObject, title: str) -> str:
    """Render the page.

    Args:
        record: a complete record, as :mod:`mergekit_omp.report.record` writes it.
        title: name of the model.

    Returns:
        The HTML.

    Raises:
        OmpError: if matplotlib is not installed.
    """
    require_matplotlib()
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("mergekit_omp", "report"),
        autoescape=True,  # names and tokens may contain markup
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    approximated = solves_with_targets(record)
    drawings = {"matches": draw_matches, "texts": draw_texts}
    if approximated:
        drawings |= {"residuals": draw_residuals, "usage": draw_usage}
    html = templates.get_template("page.html.j2").render(
        title=title,
        subtitle=summary.subtitle(record),
        facts=_facts(record),
        other_rows=summary.other_rows(record),
        advice=summary.advice(record),
        pictures={name: as_svg(draw, record) for name, draw in drawings.items()},
        most_used=[(sides(record, solve), solve["usage"]["most_used"]) for solve in approximated],
        classes=[kind.value for kind in SpanClass],
        spans=[_span_section(title, measured) for title, measured in summary.measured_spans(record)],
        audit=audit_lines(record),
        samples=record["samples"],
        details=_details(record),
    )
    return html.encode(errors="backslashreplace").decode()


def _facts(record: JsonObject) -> list[tuple[str, str]]:
    """Return the numbers at the top of the page with their labels."""
    first = summary.inputs(record)[0]
    targets = [problem["targets"] for problem in (*record["solves"], *record.get("other_rows", ()))]
    residuals = [solve["residuals"]["mean"] for solve in solves_with_targets(record)]
    return [
        (f"{record['tokens']:,}", "tokens in the output"),
        (f"{first['kept']:,}", "keep a row of the model"),
        (f"{max(targets, default=0):,}", "are approximated"),
        (f"{sum(residuals) / len(residuals):.3f}" if residuals else "–", "mean relative residual"),
        (_duration(record["seconds"]), "total time"),
    ]


def _span_section(title: str, measured: Mapping[str, Spans | None]) -> dict[str, Any]:
    """Prepare a section on where bits are lost; its picture leaves out the single texts of an evaluation."""
    known = {name: spans for name, spans in measured.items() if spans is not None}
    drawn = {"now": known["overall"]} if "overall" in known else known
    return {
        "title": title,
        "picture": as_svg(draw_spans, drawn) if drawn else None,
        "rows": [
            (
                name,
                gap(spans),
                [
                    span["bits_per_byte"] - span["ideal_bits_per_byte"]
                    for span in (spans[kind.value] for kind in SpanClass)
                ],
            )
            for name, spans in known.items()
        ],
    }


def _details(record: JsonObject) -> list[tuple[str, str]]:
    """Return all other properties of the run with their names."""
    rows = [("merge method", record["merge_method"]), ("tokenizer", record["tokenizer_source"])]
    for model in record["models"]:
        about = f"{model['tokens']:,} tokens; numbers as {model['numerals']}"
        revision = f"; revision {model['revision']}" if model["revision"] else ""
        rows.append((" and ".join(model["roles"]), f"{model['name']} ({about}{revision})"))
    for solve in record["solves"]:
        how = f"k = {solve['k']}, normalize_atoms = {solve['normalize_atoms']}"
        rows.append(("solve", f"{solve['tensor']} of {solve['donor']}: {how}; {_duration(solve['seconds'])}"))
    for tensor in record["tensors"]:
        settings = ", ".join(f"{name} = {value}" for name, value in tensor["parameters"].items())
        rows.append((tensor["side"], f"{tensor['name']} of {tensor['model']}: {settings}"))
    if record["peak_memory_bytes"]:
        rows.append(("peak memory", f"{record['peak_memory_bytes'] / 1e9:.1f} GB"))
    rows.append(("machine", ", ".join(f"{name} {value}" for name, value in record["machine"].items())))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())))
    return rows


def _duration(seconds: float) -> str:
    minutes, remainder = divmod(round(seconds), 60)
    return f"{minutes} min {remainder} s" if minutes else f"{seconds:.1f} s"
