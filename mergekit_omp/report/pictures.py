"""Draw the figures of the report page as SVG with matplotlib, an optional dependency imported on use."""

import io
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mergekit_omp.errors import OmpError
from mergekit_omp.evaluation.spans import SpanClass
from mergekit_omp.report.scores import Spans
from mergekit_omp.report.summary import JsonObject, inputs, kept_by_reason, label, matches

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEPT = "#2f6f9f"
NEW = "#c8553d"
GREY = "#8a8f98"


def require_matplotlib() -> None:
    """Raise an OmpError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise OmpError("The page's pictures need matplotlib; run `pip install 'mergekit-omp[report]'`.")


def draw_matches(record: JsonObject) -> "Figure":
    """Draw the number of output tokens with and without a row in each input, by reason."""
    models = inputs(record)
    most = max(len(model["match"]) for model in models)
    figure, axes = _new_figure(len(models), 0.9 + 0.34 * most)
    for axis, model in zip(axes, models, strict=True):
        counts, of_reason = matches(model)[::-1], kept_by_reason(model)
        labels, kept = [label(reason) for reason, _ in counts], [of_reason[reason] for reason, _ in counts]
        axis.barh(labels, kept, color=KEPT)
        bars = axis.barh(labels, [count - of_reason[reason] for reason, count in counts], left=kept, color=NEW)
        axis.bar_label(bars, [f"{count:,}" for _, count in counts], padding=4, fontsize=9)
        axis.margins(x=0.12)
        axis.xaxis.set_visible(False)
        axis.spines["bottom"].set_visible(False)
        if len(models) > 1:
            axis.set_title(model["name"], loc="left", fontsize=10)
    return figure


def draw_residuals(record: JsonObject) -> "Figure":
    """Draw a histogram of relative residuals for each solve."""
    solves = solves_with_targets(record)
    figure, axes = _new_figure(len(solves), 2.6)
    for axis, solve in zip(axes, solves, strict=True):
        residuals = solve["residuals"]
        axis.stairs(residuals["counts"], residuals["edges"], fill=True, color=KEPT)
        axis.axvline(residuals["median"], color=NEW, linewidth=1.5)
        axis.annotate(
            f"median {residuals['median']:.3f}",
            (residuals["median"], 1),
            xycoords=("data", "axes fraction"),
            xytext=(5, -2),
            textcoords="offset points",
            va="top",
            color=NEW,
            fontsize=9,
        )
        axis.margins(y=0.2)
        axis.set(xlim=(0, 1), xlabel="relative residual", ylabel="tokens")
        axis.set_title(sides(record, solve), loc="left", fontsize=10)
    return figure


def draw_usage(record: JsonObject) -> "Figure":
    """Draw a histogram of the number of uses of anchors for each solve."""
    solves = solves_with_targets(record)
    figure, axes = _new_figure(len(solves), 2.6)
    for axis, solve in zip(axes, solves, strict=True):
        bins = solve["usage"]["counts"]
        names = ["0", *(str(b["from"]) if b["from"] == b["to"] else f"{b['from']}–{b['to']}" for b in bins)]
        counts = [solve["usage"]["never"], *(b["anchors"] for b in bins)]
        bars = axis.bar(names, counts, color=[GREY] + [KEPT] * len(bins))
        axis.bar_label(bars, [f"{count:,}" for count in counts], padding=2, fontsize=9)
        axis.margins(y=0.15)
        axis.set(xlabel="new tokens that use an anchor", ylabel="anchors")
        axis.tick_params(axis="x", labelsize=8, rotation=30 if len(names) > 9 else 0)
        axis.set_title(sides(record, solve), loc="left", fontsize=10)
    return figure


def draw_texts(record: JsonObject) -> "Figure":
    """Draw tokens per byte of the built-in texts, before and after."""
    texts = record["texts"]
    figure, [axis] = _new_figure(1, 2.8)
    places = range(len(texts))
    for shift, key, colour in ((-0.2, "before", GREY), (0.2, "after", KEPT)):
        bars = axis.bar(
            [place + shift for place in places], [text[key] for text in texts], 0.38, color=colour, label=key
        )
        axis.bar_label(bars, fmt="{:.3f}", padding=2, fontsize=9)
    axis.set_xticks(list(places), [text["name"] for text in texts])
    axis.margins(y=0.15)
    axis.set_ylabel("tokens per byte")
    axis.legend(frameon=False, ncols=2, loc="upper left", bbox_to_anchor=(0, 1.15))
    return figure


def draw_spans(measured: Mapping[str, Spans]) -> "Figure":
    """Draw bits per byte beside the ideal: a group of bars for each class of tokens, a bar for each name."""
    figure, [axis] = _new_figure(1, 3.2)
    colours = [KEPT] if len(measured) == 1 else [NEW, KEPT]
    series = [("ideal", "ideal_bits_per_byte", next(iter(measured.values())), GREY)]
    series += [(name, "bits_per_byte", spans, colours[n]) for n, (name, spans) in enumerate(measured.items())]
    width = 0.8 / len(series)
    for n, (name, key, spans, colour) in enumerate(series):
        places = [group + (n - (len(series) - 1) / 2) * width for group in range(len(SpanClass))]
        bars = axis.bar(places, [spans[kind.value][key] for kind in SpanClass], 0.95 * width, color=colour, label=name)
        axis.bar_label(bars, fmt="{:.3f}", padding=2, fontsize=9)
    axis.set_xticks(range(len(SpanClass)), [kind.value for kind in SpanClass])
    axis.margins(y=0.15)
    axis.set_ylabel("bits per byte of text")
    axis.legend(frameon=False, ncols=3, loc="upper left", bbox_to_anchor=(0, 1.15))
    return figure


def solves_with_targets(record: JsonObject) -> list[JsonObject]:
    """Return the solves that have targets."""
    return [solve for solve in record["solves"] if solve["targets"]]


def sides(record: JsonObject, solve: JsonObject) -> str:
    """Describe the matrix of a solve and the sides of the output that use it."""
    index = record["solves"].index(solve)
    used_by = sorted({tensor["side"] for tensor in record["tensors"] if index in tensor["solves"]})
    return f"{solve['tensor']} of {solve['donor']}, for the {' and the '.join(used_by)}"


def as_svg(draw: Callable[[JsonObject], "Figure"], record: JsonObject) -> str:
    """Draw a figure as an ``<svg>`` element; equal records give equal bytes."""
    from matplotlib import rc_context

    image = io.StringIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "mergekit-omp"}):
        draw(record).savefig(image, format="svg", metadata={"Date": None})
    drawing = image.getvalue()
    return drawing[drawing.index("<svg") :]


def _new_figure(rows: int, height: float) -> tuple["Figure", Sequence["Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, squeeze=False)[:, 0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes
