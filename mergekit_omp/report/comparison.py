"""One recipe with several methods of approximation: bits per byte, seconds and memory, side by side."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from tqdm import tqdm

from mergekit_omp.errors import OmpError
from mergekit_omp.evaluation.bits_per_byte import ModelScore, evaluate
from mergekit_omp.parameters import Approximation
from mergekit_omp.recipe.keys import did_you_mean
from mergekit_omp.report.record import read_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ORIGINAL = "original"
_LONGEST_BAR = 3


@dataclass(frozen=True)
class Row:
    """What one method came to.

    Attributes:
        approximation: its name; ``original`` is the model as it was, with its own tokenizer.
        score: bits and tokens per byte, by text; None where the run failed.
        seconds: from start to end of the whole merge.
        peak_memory_bytes: the most that the merge's process held; None where the system does not tell.
        problem: the sentence that the run failed with.
    """

    approximation: str
    score: ModelScore | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    problem: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return asdict(self) | {"score": self.score.as_dict() if self.score else None}


def parse_approximations(names: str) -> list[Approximation]:
    """The methods in a list with commas.

    Raises:
        OmpError: a name that is none.
    """
    known = [each.value for each in Approximation]
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in known:
            raise OmpError(
                f"--approximations: {name!r} is none{did_you_mean(name, known)}; choose from {', '.join(known)}."
            )
    if not chosen:
        raise OmpError(f"--approximations: there is none in {names!r}; choose from {', '.join(known)}.")
    return [Approximation(name) for name in dict.fromkeys(chosen)]


def compare(
    recipe: Mapping[str, Any],
    original: str,
    approximations: Sequence[Approximation],
    texts: Mapping[str, str],
    *,
    options: Sequence[str] = (),
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> list[Row]:
    """Run a recipe once for each method, in a process of its own, and read the texts with what comes out.

    Solves are not taken from the cache, so that seconds are those of a first run. Models are written to a temporary
    folder, one at a time.

    Args:
        recipe: as in its file; its own ``approximation:`` is replaced, wherever it stands.
        original: the model that the rows are compared with, read with its own tokenizer.
        approximations: the methods.
        texts: name -> text.
        options: of ``mergekit-yaml``.
        device: where the models read.
        trust_remote_code: whether models may run code of their own.
    """
    reading = {"device": device, "trust_remote_code": trust_remote_code}
    rows = [Row(ORIGINAL, evaluate([original], texts, progress=False, **reading)[0])]
    for approximation in tqdm(approximations, desc="Methods", unit="method", leave=False):
        with tempfile.TemporaryDirectory(prefix="mergekit-omp-") as folder:
            out = Path(folder) / approximation.value
            problem = _merge(with_approximation(recipe, approximation), out, options)
            if problem:
                row = Row(approximation.value, problem=problem)
            else:
                record = read_record(out)
                score = evaluate([out], texts, progress=False, **reading)[0]
                row = Row(approximation.value, score, record["seconds"], record["peak_memory_bytes"])
        rows.append(row)
    return rows


def with_approximation(recipe: Mapping[str, Any], approximation: Approximation) -> dict[str, Any]:
    """A recipe with one method for all its models."""
    stripped = _without_key(recipe, "approximation")
    stripped["parameters"] = {**(stripped.get("parameters") or {}), "approximation": approximation.value}
    return stripped


def _without_key(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_key(each, key) for name, each in value.items() if name != key}
    return [_without_key(each, key) for each in value] if isinstance(value, list) else value


def _merge(recipe: Mapping[str, Any], out: Path, options: Sequence[str]) -> str | None:
    """Run ``mergekit-yaml``; returns the sentence that it failed with."""
    path = out.with_suffix(".yml")
    path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "mergekit.scripts.run_yaml", str(path), str(out), "--quiet", *options],
        capture_output=True,
        text=True,
        env={**os.environ, "MERGEKIT_OMP_CACHE": "off"},
        check=False,
    )
    if run.returncode == 0:
        return None
    told = run.stderr.strip().split("Error: ")[-1]
    return " ".join(told.split()) or f"mergekit-yaml stopped with status {run.returncode}"


def markdown(rows: Iterable[Row]) -> str:
    """A table in Markdown, which a terminal shows well too: bits per byte by text and overall, lower is better."""
    rows = list(rows)
    texts = [score.text for score in rows[0].score.texts] if rows and rows[0].score else []
    header = ["approximation", *texts, "overall", "tokens/byte", "seconds", "peak MiB"]
    cells = [header, *([*_cells(row)] if row.score else [row.approximation, f"failed: {row.problem}"] for row in rows)]
    whole = [row for row in cells if len(row) == len(header)]
    widths = [max(len(row[column]) for row in whole) for column in range(len(header))]
    lines = [_line(row, widths) for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _cells(row: Row) -> list[str]:
    bits = [f"{score.bits_per_byte:.3f}" for score in (*row.score.texts, row.score.overall)]
    seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
    memory = "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**20:,.0f}"
    return [row.approximation, *bits, f"{row.score.overall.tokens_per_byte:.3f}", seconds, memory]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    if len(cells) < len(widths):
        return f"| {cells[0]:<{widths[0]}} | {' '.join(cells[1:])} |" + " |" * (len(widths) - 2)
    padded = [cells[0].ljust(widths[0])] + [
        cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)
    ]
    return "| " + " | ".join(padded) + " |"


def require_plot(path: Path) -> None:
    """Raise an OmpError where a plot cannot be drawn, or not to that file."""
    if find_spec("matplotlib") is None:
        raise OmpError("--plot: drawing needs matplotlib; run `pip install 'mergekit-omp[report]'`.")
    if path.suffix not in (".png", ".svg", ".pdf") or not path.absolute().parent.is_dir():
        raise OmpError(f"--plot: {path} cannot be written; name a .png, .svg or .pdf file in a folder that is there.")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw overall bits per byte beside seconds, one bar a method, best first, and the original as a line.

    Bars of bits per byte end at some times the original's, so that a method that fails does not hide the others.

    Raises:
        OmpError: as :func:`require_plot`.
    """
    require_plot(path)
    from matplotlib.figure import Figure

    original = next(row for row in rows if row.approximation == ORIGINAL).score.overall.bits_per_byte
    made = [row for row in rows if row.score and row.approximation != ORIGINAL]
    made.sort(key=lambda row: row.score.overall.bits_per_byte)
    names = [row.approximation for row in made]
    bits = [row.score.overall.bits_per_byte for row in made]
    seconds = [row.seconds for row in made]
    most = _LONGEST_BAR * original
    figure = Figure(figsize=(9, 1.2 + 0.36 * len(made)), layout="constrained")
    quality, cost = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    labels = [f"{each:.3f}" + (" (bar is cut)" if each > most else "") for each in bits]
    _bars(quality, names, [min(each, most) for each in bits], labels)
    _bars(cost, names, seconds, [f"{each:.1f}" for each in seconds])
    quality.axvline(original, color="#c8553d", linewidth=1.5)
    quality.set_title(f"bits per byte (line: original, {original:.3f})", loc="left", fontsize=10)
    cost.set_title("seconds, whole merge", loc="left", fontsize=10)
    quality.invert_yaxis()
    figure.savefig(path, dpi=150)


def _bars(axis: "Axes", names: Sequence[str], values: Sequence[float], labels: Sequence[str]) -> None:
    axis.bar_label(axis.barh(names, values, color="#2f6f9f"), labels=labels, padding=3, fontsize=8)
    axis.margins(x=0.3)
    axis.spines[["top", "right"]].set_visible(False)
