"""Draw the figures of README and the documentation: ``python docs/scripts/figures.py``.

- ``docs/assets/bits-per-byte.png``: what a transplant costs, from the numbers in ``bits_per_byte.json`` beside this.
- ``docs/assets/dataflow.svg``: the way of a recipe through the packages.

Needs matplotlib, which the ``docs`` extra brings. The same input gives the same files.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams |= {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "svg.hashsalt": "mergekit-omp",
    "svg.fonttype": "none",
}

from matplotlib.axes import Axes  # noqa: E402, the backend is chosen first
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

HERE = Path(__file__).parent
ASSETS = HERE.parent / "assets"

COLOURS = {"original": "#8a8f98", "tokensurgeon": "#c8553d", "default": "#2f6f9f", "healed": "#2e8b6f"}
INK, MUTED, PAPER = "#1f2328", "#59636e", "#ffffff"


def main() -> None:
    """Draw all figures."""
    numbers = json.loads((HERE / "bits_per_byte.json").read_text(encoding="utf-8"))
    draw_bits_per_byte(numbers).savefig(ASSETS / "bits-per-byte.png", dpi=160, metadata={"Software": None})
    draw_dataflow().savefig(ASSETS / "dataflow.svg", metadata={"Date": None})


def draw_bits_per_byte(numbers: dict[str, Any]) -> Figure:
    """Draw a group of horizontal bars for each pair of models; a bar whose number is null is left out."""
    pairs, names = numbers["pairs"], numbers["bars"]
    shown = [[bar for bar in names if pair[bar] is not None] for pair in pairs]
    figure = Figure(figsize=(8, 0.75 + sum(0.34 * len(bars) + 0.62 for bars in shown)), facecolor=PAPER)
    axes = figure.subplots(len(pairs), squeeze=False, sharex=True, height_ratios=[len(bars) for bars in shown])[:, 0]
    highest = max(pair[bar] for pair, bars in zip(pairs, shown, strict=True) for bar in bars)
    for axis, pair, bars in zip(axes, pairs, shown, strict=True):
        values = [pair[bar] for bar in bars]
        drawn = axis.barh([names[bar] for bar in bars], values, color=[COLOURS[bar] for bar in bars], height=0.72)
        axis.bar_label(drawn, [f"{value:.2f}" for value in values], padding=5, color=INK)
        axis.axvline(pair["original"], color=COLOURS["original"], linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axis.set_title(pair["title"], loc="left", fontsize=11, fontweight="bold", color=INK)
        axis.set_xlim(0, 1.1 * highest)
        axis.invert_yaxis()
        _bare(axis)
    axes[-1].set_xlabel("bits per UTF-8 byte on held-out text (lower is better)", color=MUTED)
    figure.tight_layout(h_pad=1.6)
    return figure


def _bare(axis: Axes) -> None:
    """Leave only names and bars of a plot."""
    for side in axis.spines.values():
        side.set_visible(False)
    axis.tick_params(axis="y", length=0, labelcolor=INK)
    axis.tick_params(axis="x", bottom=False, labelbottom=False)


STEPS = (
    ("resolve", "recipe/", "check the recipe,\nread configurations\nand tokenizers"),
    ("plan", "tasks/", "which solves each\nvocabulary tensor\nneeds"),
    ("match", "vocabulary/", "tokens by the bytes\nthat they stand for:\nanchors, new tokens"),
    ("solve", "solver/", "donor rows of new\ntokens as sparse codes\nover the anchors"),
    ("realign", "realign/, initializers/", "one row for each\noutput token"),
    ("merge", "mergekit", "passthrough for omp,\nthe inner method for\nomp_<method>"),
    ("write", "output/, report/", "weights, tokenizer,\nconfiguration, card,\nrecord"),
)


def draw_dataflow() -> Figure:
    """Draw the steps of a run in two rows, with what goes in at the top and what comes out at the bottom."""
    figure = Figure(figsize=(9.2, 5.6), facecolor=PAPER)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(0, 9.2)
    axis.set_ylim(0, 5.6)
    axis.axis("off")
    width, height = 1.95, 1.25
    columns = (0.2, 2.48, 4.76, 7.04)
    places = [(x, 2.95) for x in columns] + [(x, 0.95) for x in columns[::-1][:3]]
    for (name, package, text), (x, y) in zip(STEPS, places, strict=True):
        ours = package != "mergekit"
        _box(axis, x, y, width, height, "#eaf2f8" if ours else "#f1f1f3", "#2f6f9f" if ours else "#8a8f98")
        axis.text(x + width / 2, y + height - 0.19, name, ha="center", va="center", fontweight="bold", color=INK)
        axis.text(x + width / 2, y + 0.62, text, ha="center", va="center", fontsize=8.2, color=INK)
        axis.text(x + width / 2, y + 0.12, package, ha="center", va="center", fontsize=7.6, color=MUTED)
    for (x, y), (next_x, next_y) in pairwise(places):
        if y != next_y:
            _arrow(axis, (x + width / 2, y), (next_x + width / 2, next_y + height))
        elif next_x > x:
            _arrow(axis, (x + width, y + height / 2), (next_x, y + height / 2))
        else:
            _arrow(axis, (x, y + height / 2), (next_x + width, y + height / 2))
    inputs = (("recipe.yml", 0), ("tokenizers of the inputs\nand of the donor", 2), ("donor's embeddings", 3))
    for text, column in inputs:
        middle = columns[column] + width / 2
        axis.text(middle, 5.15, text, ha="center", va="center", fontsize=8.8, color=MUTED, style="italic")
        _arrow(axis, (middle, 4.88), (middle, 2.95 + height), MUTED)
    axis.text(
        columns[3] + width / 2,
        0.3,
        "inputs' vocabulary tensors",
        ha="center",
        fontsize=8.8,
        color=MUTED,
        style="italic",
    )
    _arrow(axis, (columns[3] + width / 2, 0.52), (columns[3] + width / 2, 0.95), MUTED)
    axis.text(columns[2] + width / 2, 0.3, "all other tensors", ha="center", fontsize=8.8, color=MUTED, style="italic")
    _arrow(axis, (columns[2] + width / 2, 0.52), (columns[2] + width / 2, 0.95), MUTED)
    axis.text(columns[0] + width / 2, 1.575, "out/", ha="center", va="center", fontweight="bold", color=INK)
    _arrow(axis, (columns[1], 1.575), (columns[0] + width / 2 + 0.32, 1.575))
    return figure


def _box(axis: Axes, x: float, y: float, width: float, height: float, face: str, edge: str) -> None:
    shape = "round,pad=0,rounding_size=0.09"
    axis.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=face, edgecolor=edge, linewidth=1.2)
    )


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    axis.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.2, "shrinkA": 2, "shrinkB": 2}
    )


if __name__ == "__main__":
    main()
