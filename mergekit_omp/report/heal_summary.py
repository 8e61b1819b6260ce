"""What a healing did, as tables."""

from collections.abc import Mapping
from typing import Any

from mergekit_omp.report.tables import Part, heading, indented, new_table


def heal_summary(heal: Mapping[str, Any]) -> list[Part]:
    """Make the parts to print of what a record tells under "heal"."""
    checks = new_table("tokens", "seconds", "bits/B", "gap closed", align="rrrr")
    first, ideal = heal["checks"][0]["bits_per_byte"], heal["base_bits_per_byte"]
    for check in heal["checks"]:
        gap = first - ideal
        closed = f"{(first - check['bits_per_byte']) / gap:.0%}" if gap > 0 else "-"
        checks.add_row(f"{check['tokens']:,}", f"{check['seconds']:.0f}", f"{check['bits_per_byte']:.3f}", closed)
    spans = new_table("", "ideal", "before", "after")
    for kind, before in heal["before"].items():
        after = heal["after"][kind]
        numbers = (before["ideal_bits_per_byte"], before["bits_per_byte"], after["bits_per_byte"])
        spans.add_row(kind, *(f"{number:.3f}" for number in numbers))
    return [
        heading(f"Held-out text (the base with its own tokenizer: {ideal:.3f} bits per byte)"),
        indented(checks),
        "",
        heading("Bits per byte by how tokens lie over the base's"),
        indented(spans),
    ]
