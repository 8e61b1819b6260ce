"""Compare approximations on one recipe: bits per byte, seconds and memory."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.text import Text
from tqdm import tqdm

from mergekit_omp.errors import OmpError
from mergekit_omp.evaluation.bits_per_byte import ModelScore
from mergekit_omp.parameters import Approximation
from mergekit_omp.recipe.keys import did_you_mean
from mergekit_omp.report.record import read_record
from mergekit_omp.report.scores import evaluate
from mergekit_omp.report.tables import Part, new_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ORIGINAL = "original"
_MAX_BAR = 3  # times the original's bits per byte


@dataclass(frozen=True)
class Row:
    """The result of one approximation.

    Attributes:
        approximation: its name, or ``original`` for the model before the transplant with its own tokenizer.
        score: bits and tokens per byte, by text; None if the run failed.
        seconds: duration of the complete merge.
        peak_memory_bytes: peak memory of the merge process; None if the system does not report it.
        problem: error message of a failed run.
    """

    approximation: str
    score: ModelScore | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    problem: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the row as ``--json`` prints it."""
        return asdict(self) | {"score": self.score.as_dict() if self.score else None}


def parse_approximations(names: str) -> list[Approximation]:
    """Read a list of approximations, separated by commas.

    Raises:
        OmpError: if the list is empty, or has an unknown name.
    """
    known = [approximation.value for approximation in Approximation]
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in known:
            raise OmpError(
                f"--approximations: unknown approximation {name!r}{did_you_mean(name, known)}; choose from "
                f"{', '.join(known)}."
            )
    if not chosen:
        raise OmpError(f"--approximations: no name in {names!r}; choose from {', '.join(known)}.")
    return [Approximation(name) for name in dict.fromkeys(chosen)]


def compare_approximations(
    recipe: Mapping[str, Any],
    original: str,
    approximations: Sequence[Approximation],
    texts: Mapping[str, str],
    *,
    options: Sequence[str] = (),
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> list[Row]:
    """Run a recipe once per approximation, each in its own process, and score the outputs on texts.

    The cache of sparse codes is disabled, so seconds are those of a first run. Models are written to a temporary
    folder, one at a time.

    Args:
        recipe: the parsed YAML; every ``approximation:`` in it is replaced.
        original: the model before the transplant, scored with its own tokenizer.
        approximations: the approximations to compare.
        texts: texts by name.
        options: options of ``mergekit-yaml``.
        device: device for scoring.
        trust_remote_code: whether to run code that comes with a model.

    Returns:
        The row of the original, then one row per approximation, in the given order.

    Raises:
        OmpError: if the original cannot be scored. A failed run is a row with its ``problem``.
    """

    def score(model: str | Path) -> ModelScore:
        return evaluate(
            [model],
            texts,
            device=device,
            progress=False,
            trust_remote_code=trust_remote_code,
        )[0]

    def run(approximation: Approximation) -> Row:
        with tempfile.TemporaryDirectory(prefix="mergekit-omp-") as folder:
            out = Path(folder) / approximation.value
            problem = _merge(with_approximation(recipe, approximation), out, options)
            if problem:
                return Row(approximation.value, problem=problem)
            record = read_record(out)
            return Row(approximation.value, score(out), record["seconds"], record["peak_memory_bytes"])

    with tqdm(total=1 + len(approximations), unit="model", leave=False, disable=None) as bar:
        bar.set_description(ORIGINAL)
        rows = [Row(ORIGINAL, score(original))]
        for approximation in approximations:
            bar.update()
            bar.set_description(approximation.value)
            rows.append(run(approximation))
    return rows


def with_approximation(recipe: Mapping[str, Any], approximation: Approximation) -> dict[str, Any]:
    """Return the recipe with one approximation for all its models."""
    stripped = _without_key(recipe, "approximation")
    stripped["parameters"] = {**(stripped.get("parameters") or {}), "approximation": approximation.value}
    return stripped


def _without_key(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_key(inner, key) for name, inner in value.items() if name != key}
    return [_without_key(inner, key) for inner in value] if isinstance(value, list) else value


def _merge(recipe: Mapping[str, Any], out: Path, options: Sequence[str]) -> str | None:
    """Run ``mergekit-yaml``; return the error message if it fails."""
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
    message = run.stderr.strip().split("Error: ")[-1]
    return " ".join(message.split()) or f"mergekit-yaml exited with status {run.returncode}"


def describe_comparison(rows: Sequence[Row]) -> Iterator[Part]:
    """Yield the Markdown table of bits per byte by text and overall, and a line for each failed run."""
    original = rows[0].score
    assert original is not None, "only runs of mergekit can fail"
    names = [score.text for score in original.texts]
    table = new_table("approximation", *names, "overall", "tokens/byte", "seconds", "peak MiB", markdown=True)
    best = min((row.score.overall.bits_per_byte for row in rows[1:] if row.score), default=None)
    for row in rows:
        if row.score is None:
            table.add_row(row.approximation, Text("failed", style="red"))
        else:
            is_best = row is not rows[0] and row.score.overall.bits_per_byte == best
            table.add_row(row.approximation, *_cells(row, row.score), style="green" if is_best else None)
    yield table
    failed = [row for row in rows if row.problem]
    if failed:
        yield ""
    yield from (f"{row.approximation} failed: {row.problem}" for row in failed)


def _cells(row: Row, score: ModelScore) -> list[str]:
    bits = [f"{text.bits_per_byte:.3f}" for text in (*score.texts, score.overall)]
    seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
    memory = "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**20:,.0f}"
    return [*bits, f"{score.overall.tokens_per_byte:.3f}", seconds, memory]


def require_plot(path: Path) -> None:
    """Raise an OmpError if matplotlib is not installed or the file cannot be written."""
    if find_spec("matplotlib") is None:
        raise OmpError("--plot: drawing needs matplotlib; run `pip install 'mergekit-omp[report]'`.")
    if path.suffix not in (".png", ".svg", ".pdf") or not path.absolute().parent.is_dir():
        raise OmpError(f"--plot: {path} cannot be written; name a .png, .svg or .pdf file in an existing folder.")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw bars of overall bits per byte and seconds per approximation, best first, and the original as a line.

    Bars of bits per byte are clipped at three times the original's value, so that a very bad result does not hide the
    others.

    Raises:
        OmpError: as :func:`require_plot`.
    """
    require_plot(path)
    from matplotlib.figure import Figure

    scored = {row.approximation: row.score.overall.bits_per_byte for row in rows if row.score}
    original = scored.pop(ORIGINAL)
    names = sorted(scored, key=scored.__getitem__)
    bits = [scored[name] for name in names]
    duration = {row.approximation: row.seconds for row in rows}
    seconds = [duration[name] or 0.0 for name in names]
    limit = _MAX_BAR * original
    figure = Figure(figsize=(9, 1.2 + 0.36 * len(names)), layout="constrained")
    quality, cost = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    labels = [f"{value:.3f}" + (" (clipped)" if value > limit else "") for value in bits]
    _bars(quality, names, [min(value, limit) for value in bits], labels)
    _bars(cost, names, seconds, [f"{value:.1f}" for value in seconds])
    quality.axvline(original, color="#c8553d", linewidth=1.5)
    quality.set_title(f"bits per byte (line: original, {original:.3f})", loc="left", fontsize=10)
    cost.set_title("seconds, complete merge", loc="left", fontsize=10)
    quality.invert_yaxis()
    figure.savefig(path, dpi=150)


def _bars(axis: "Axes", names: Sequence[str], values: Sequence[float], labels: Sequence[str]) -> None:
    axis.bar_label(axis.barh(names, values, color="#2f6f9f"), labels=labels, padding=3, fontsize=8)
    axis.margins(x=0.3)
    axis.spines[["top", "right"]].set_visible(False)
