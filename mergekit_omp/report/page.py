"""The record of a transplant as one HTML page with pictures in it, and as a few lines for a terminal."""

import html
import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mergekit_omp.errors import OmpError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]

KEPT = "#2f6f9f"
LACKING = "#c8553d"
GREY = "#8a8f98"
_LABELS = {
    "no token": "no token has this id",
    "same string": "same string",
    "same bytes": "same bytes, other string",
    "byte token": "a single byte",
    "special content": "special token, same string",
    "special role": "special token, same role",
    "special equivalent": "special token, same meaning",
    "unused": "kept free for later use",
    "missing": "text that the model lacks",
    "missing special": "special token that it lacks",
}
_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2129; background: #fff; margin: 0 auto; max-width: 60rem;
       padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p, figure { margin: .5rem 0 1rem; }
.muted, figcaption { color: #5b616b; font-size: .9rem; }
.facts { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; padding: 0; list-style: none; }
.facts li { border: 1px solid #d9dce1; border-radius: .5rem; padding: .6rem .9rem; min-width: 8.5rem; flex: 1; }
.facts b { display: block; font-size: 1.35rem; font-weight: 600; }
.facts span { color: #5b616b; font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; width: 100%; }
th, td { text-align: left; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid #e6e8ec; vertical-align: top; }
th { font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
code { font: .88em ui-monospace, monospace; background: #f1f3f5; border-radius: .25rem; padding: .05rem .3rem;
       white-space: nowrap; }
.samples { min-width: 52rem; }
.samples td { width: 27%; }
.samples td:nth-child(-n+2) { width: auto; }
svg { max-width: 100%; height: auto; }
.advice { border-left: 4px solid #d99a2b; padding: .5rem .9rem; background: #fdf6e8; }
"""


def page(record: Record, title: str) -> str:
    """One self-contained HTML page.

    Raises:
        OmpError: where matplotlib is not installed.
    """
    _require_matplotlib()
    parts = [
        f"<h1>{_escape(title)}</h1>",
        f'<p class="muted">{_escape(_subtitle(record))}</p>',
        _facts(record),
        *(f'<p class="muted">{_escape(sentence)}</p>' for sentence in _other_rows(record)),
        *(f'<p class="advice">{_escape(sentence)}</p>' for sentence in _advice(record)),
        "<h2>Where the rows come from</h2>",
        _figure(_draw_matches(record), "Tokens of the output, by what they have in common with the model's own."),
    ]
    if any(solve["targets"] for solve in record["solves"]):
        parts += [
            "<h2>How well new tokens are approximated</h2>",
            _figure(
                _draw_residuals(record),
                "Relative residual ‖x − x̂‖ / ‖x‖ of each new token's donor row: 0 is exact, 1 is nothing found.",
            ),
            "<h2>How often anchors are used</h2>",
            _figure(_draw_usage(record), "Anchors by the number of new tokens that they are part of."),
            _most_used(record),
        ]
    parts += [
        "<h2>Tokens per byte</h2>",
        _figure(_draw_texts(record), "Texts that come with mergekit-omp. Fewer tokens a byte make a text shorter."),
    ]
    if record["samples"]:
        parts += [
            "<h2>Some new tokens</h2>",
            '<p class="muted">From the best approximated to the worst. Neighbours are by cosine similarity of input '
            "embeddings; where both columns tell of the same meaning, the transplant has kept it.</p>",
            _samples(record["samples"]),
        ]
    parts += ["<h2>Details</h2>", _details(record)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}: tokenizer transplantation</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def summary(record: Record) -> str:
    """What a terminal shows."""
    lines = [_subtitle(record), ""]
    for model in _inputs(record):
        lines.append(f"{model['name']}: {model['kept']:,} of {record['tokens']:,} tokens keep a row of their own")
        lines += [f"  {count:>9,}  {_LABELS.get(reason, reason)}" for reason, count in _by_count(model["match"])]
    for solve in record["solves"]:
        residuals = solve["residuals"]
        lines += [
            "",
            f"{solve['tensor']} of {solve['donor']}: {solve['targets']:,} new tokens from {solve['atoms']:,} anchors, "
            f"k = {solve['k']}, {solve['seconds']:.1f} s",
            f"  relative residual: mean {residuals['mean']:.3f}, median {residuals['median']:.3f}, "
            f"95 % below {residuals['p95']:.3f}",
            f"  most used anchors: {' '.join(each['token'] for each in solve['usage']['most_used'][:12])}",
        ]
    lines += ["", *_other_rows(record)]
    lines += ["", f"{'tokens per byte':<16}{'before':>8}{'after':>8}"]
    lines += [f"  {text['name']:<14}{text['before']:>8.3f}{text['after']:>8.3f}" for text in record["texts"]]
    lines += ["", *(f"Note: {sentence}" for sentence in _advice(record))]
    return "\n".join(lines).rstrip()


def _other_rows(record: Record) -> list[str]:
    """A sentence for each tensor whose new rows are not OMP's."""
    made_by = [(t, t["parameters"].get("approximation", "omp")) for t in record["tensors"]]
    return [f"{t['name']} of {t['model']}: new rows by {name}" for t, name in made_by if name != "omp"]


def _require_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise OmpError("The page's pictures need matplotlib; run `pip install 'mergekit-omp[report]'`.")


def _inputs(record: Record) -> list[Record]:
    return [model for model in record["models"] if "input" in model["roles"]]


def _advice(record: Record) -> list[str]:
    return [sentence for model in _inputs(record) for sentence in model["advice"]]


def _subtitle(record: Record) -> str:
    inputs = ", ".join(model["name"] for model in _inputs(record))
    return (
        f"{record['merge_method']}: {inputs} with the tokenizer of {record['tokenizer_source']}, {record['created']}"
    )


def _by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])


def _facts(record: Record) -> str:
    first = _inputs(record)[0]
    approximated = [*record["solves"], *record.get("other_rows", ())]
    targets = max((each["targets"] for each in approximated), default=0)
    residuals = [solve["residuals"]["mean"] for solve in record["solves"] if solve["targets"]]
    facts = [
        (f"{record['tokens']:,}", "tokens in the output"),
        (f"{first['kept']:,}", "keep a row of the model"),
        (f"{targets:,}", "are approximated"),
        (f"{sum(residuals) / len(residuals):.3f}" if residuals else "–", "mean relative residual"),
        (_duration(record["seconds"]), "from start to end"),
    ]
    return (
        "<ul class='facts'>" + "".join(f"<li><b>{fact}</b><span>{text}</span></li>" for fact, text in facts) + "</ul>"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _new_figure(rows: int, height: float) -> tuple["Figure", Sequence["Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height * rows), layout="constrained")
    axes = figure.subplots(rows, squeeze=False)[:, 0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_matches(record: Record) -> "Figure":
    inputs = _inputs(record)
    most = max(len(model["match"]) for model in inputs)
    figure, axes = _new_figure(len(inputs), 0.9 + 0.34 * most)
    for axis, model in zip(axes, inputs, strict=True):
        named = _by_count(model["match"])[::-1]
        colours = [LACKING if reason.startswith("missing") else KEPT for reason, _ in named]
        bars = axis.barh([_LABELS.get(reason, reason) for reason, _ in named], [n for _, n in named], color=colours)
        axis.bar_label(bars, [f"{n:,}" for _, n in named], padding=4, fontsize=9)
        axis.margins(x=0.12)
        axis.xaxis.set_visible(False)
        axis.spines["bottom"].set_visible(False)
        if len(inputs) > 1:
            axis.set_title(model["name"], loc="left", fontsize=10)
    return figure


def _draw_residuals(record: Record) -> "Figure":
    solves = [solve for solve in record["solves"] if solve["targets"]]
    figure, axes = _new_figure(len(solves), 2.6)
    for axis, solve in zip(axes, solves, strict=True):
        residuals = solve["residuals"]
        axis.stairs(residuals["counts"], residuals["edges"], fill=True, color=KEPT)
        axis.axvline(residuals["median"], color=LACKING, linewidth=1.5)
        axis.annotate(
            f"median {residuals['median']:.3f}",
            (residuals["median"], 1),
            xycoords=("data", "axes fraction"),
            xytext=(5, -2),
            textcoords="offset points",
            va="top",
            color=LACKING,
            fontsize=9,
        )
        axis.margins(y=0.2)
        axis.set(xlim=(0, 1), xlabel="relative residual", ylabel="tokens")
        axis.set_title(_sides(record, solve), loc="left", fontsize=10)
    return figure


def _sides(record: Record, solve: Record) -> str:
    """Which tensors of the output a solve served."""
    index = record["solves"].index(solve)
    sides = sorted({tensor["side"] for tensor in record["tensors"] if index in tensor["solves"]})
    return f"{solve['tensor']} of {solve['donor']}, for the {' and the '.join(sides)}"


def _draw_usage(record: Record) -> "Figure":
    solves = [solve for solve in record["solves"] if solve["targets"]]
    figure, axes = _new_figure(len(solves), 2.6)
    for axis, solve in zip(axes, solves, strict=True):
        bins = solve["usage"]["counts"]
        names = ["0", *(str(b["from"]) if b["from"] == b["to"] else f"{b['from']}–{b['to']}" for b in bins)]
        counts = [solve["usage"]["never"], *(b["anchors"] for b in bins)]
        bars = axis.bar(names, counts, color=[GREY] + [KEPT] * len(bins))
        axis.bar_label(bars, [f"{n:,}" for n in counts], padding=2, fontsize=9)
        axis.margins(y=0.15)
        axis.set(xlabel="new tokens that use an anchor", ylabel="anchors")
        axis.tick_params(axis="x", labelsize=8, rotation=30 if len(names) > 9 else 0)
        axis.set_title(_sides(record, solve), loc="left", fontsize=10)
    return figure


def _draw_texts(record: Record) -> "Figure":
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


def _figure(figure: "Figure", caption: str) -> str:
    from matplotlib import rc_context

    image = io.StringIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "mergekit-omp"}):
        figure.savefig(image, format="svg", metadata={"Date": None})
    drawing = image.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    return f"<figure>{drawing}<figcaption>{_escape(caption)}</figcaption></figure>"


def _most_used(record: Record) -> str:
    rows = []
    for solve in record["solves"]:
        if solve["targets"]:
            tokens = " ".join(
                f"{_token(each['token'])}&nbsp;{each['count']:,}" for each in solve["usage"]["most_used"]
            )
            rows.append(f"<p><b>Most used</b> in {_escape(_sides(record, solve))}: {tokens}</p>")
    return "\n".join(rows)


def _samples(samples: Sequence[Record]) -> str:
    rows = [
        "<tr><th>token</th><th class='number'>residual</th><th>made of</th><th>near it in the donor</th>"
        "<th>near it in the output</th></tr>"
    ]
    for sample in samples:
        made_of = " ".join(f"{each['coefficient']:+.2f}&nbsp;{_token(each['token'])}" for each in sample["anchors"])
        rows.append(
            f"<tr><td>{_token(sample['token'])}</td><td class='number'>{sample['residual']:.3f}</td><td>{made_of}</td>"
            f"<td>{_neighbours(sample['donor_neighbours'])}</td><td>{_neighbours(sample['output_neighbours'])}</td></tr>"
        )
    return f"<div class='scroll'><table class='samples'>{''.join(rows)}</table></div>"


def _neighbours(found: Sequence[Record]) -> str:
    return " ".join(f"{_token(each['token'])}&nbsp;{each['cosine']:.2f}" for each in found)


def _details(record: Record) -> str:
    rows = [("merge method", record["merge_method"]), ("tokenizer", record["tokenizer_source"])]
    for model in record["models"]:
        about = f"{model['tokens']:,} tokens; numbers as {model['numerals']}"
        revision = f"; revision {model['revision']}" if model["revision"] else ""
        rows.append((" and ".join(model["roles"]), f"{model['name']} ({about}{revision})"))
    for solve in record["solves"]:
        how = ", ".join(f"{key} = {solve[key]}" for key in ("k", "normalize_atoms") if key in solve)
        rows.append(("solve", f"{solve['tensor']} of {solve['donor']}: {how}; {_duration(solve['seconds'])}"))
    for tensor in record["tensors"]:
        settings = ", ".join(f"{name} = {value}" for name, value in tensor["parameters"].items())
        rows.append((tensor["side"], f"{tensor['name']} of {tensor['model']}: {settings}"))
    if record["peak_memory_bytes"]:
        rows.append(("peak memory", f"{record['peak_memory_bytes'] / 1e9:.1f} GB"))
    rows.append(("machine", ", ".join(f"{key} {value}" for key, value in record["machine"].items())))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())))
    cells = "".join(f"<tr><th>{_escape(name)}</th><td>{_escape(str(value))}</td></tr>" for name, value in rows)
    return f"<div class='scroll'><table>{cells}</table></div>"


def _token(text: str) -> str:
    return f"<code>{_escape(text)}</code>"


def _escape(text: str) -> str:
    return html.escape(text.encode(errors="backslashreplace").decode())
