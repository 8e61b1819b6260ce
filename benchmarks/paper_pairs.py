"""Transplant the paper's two pairs at their real shapes, and compare each whole run with a plain copy of its base.

``python -m benchmarks.paper_pairs`` gives Mistral NeMo 12B the tokenizer of Llama 3, and Llama-3.2-1B that of Qwen
2.5. It runs ``mergekit-yaml`` twice for each pair, with ``merge_method: passthrough`` and with ``omp``, and prints
the seconds of each stage, the peak memory, and the bytes that were read and written. It needs the ``test`` extra, 24
GiB of memory, 30 GB of disk and an hour; ``--scale 0.05`` tries the script in two minutes.

Tokenizers and shapes are real. Vocabulary matrices are synthetic: a power-law spectrum, a common direction, and hidden
numbers of each token that base and donor share. All other tensors are zeros that take no disk: the shards are files
with holes. Reading them takes page cache but no disk, for the copy as for the transplant; both write all bytes. The
cache of sparse codes is disabled.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.solver import in_a_process

sys.path.append(str(Path(__file__).parents[1] / "tests"))

SHARD = 5 * 10**9
"""Bytes of a shard: mergekit's default, and that of most checkpoints."""

HIDDEN, SHARED = 512, 0.7
"""Hidden numbers of each token, and the share of the variance of a row that they explain."""

LENGTH = 0.02
"""Standard deviation of the largest coordinate of synthetic rows."""

TIMES = 1.2
"""How many times the copy a transplant may take outside the solve."""


@dataclass(frozen=True)
class Shape:
    """A model: its architecture and its tokenizer, by their names in tests/helpers, and its sizes."""

    name: str
    architecture: str
    tokenizer: str
    rows: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head: int
    tied: bool


NEMO = Shape("Mistral NeMo 12B", "mistral", "tekken", 131_072, 5120, 14_336, 40, 32, 8, 128, False)
LLAMA_8B = Shape("Llama 3 8B", "llama", "llama3", 128_256, 4096, 14_336, 32, 32, 8, 128, False)
LLAMA_1B = Shape("Llama-3.2-1B", "llama", "llama3", 128_256, 2048, 8192, 16, 32, 8, 64, True)
QWEN = Shape("Qwen2.5-0.5B", "qwen2", "qwen", 151_936, 896, 4864, 24, 14, 2, 64, True)

PAIRS = {"1b": (LLAMA_1B, QWEN), "12b": (NEMO, LLAMA_8B)}


def main() -> None:
    """Build the models of each pair, run both commands, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("-k", "--k", type=int, default=64)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the tokens and columns that are kept")
    parser.add_argument("--memory-budget", default="16GB", help="of the solver, as in a recipe")
    parser.add_argument("--out", type=Path, default=Path("paper-pairs"), help="folder of the models, kept")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    measure(["mergekit-yaml", "--help"], options.out / "start.log")  # so that the code is in the page cache
    for name in options.pairs:
        folders = [options.out / f"{name}-{side}-{options.scale:g}" for side in ("base", "donor")]
        in_a_process(build_pair, PAIRS[name], folders, options.scale)  # gives its memory back
        print("\n".join(compare(name, folders, options)), "\n", flush=True)


def compare(name: str, folders: Sequence[Path], options: argparse.Namespace) -> list[str]:
    """Run the copy and the transplant of one pair, and describe both in Markdown."""
    base, donor = map(str, (folder.resolve() for folder in folders))
    copy = {"merge_method": "passthrough", "models": [{"model": base}], "dtype": "bfloat16"}
    transplant = copy | {
        "merge_method": "omp",
        "tokenizer": {"source": donor},
        "parameters": {"k": options.k, "memory_budget": options.memory_budget},
    }
    out = options.out / "out"
    runs, size, record = {}, 0, {}
    for command, recipe in (("passthrough", copy), ("omp", transplant)):
        path = options.out / f"{name}-{command}.yml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        shutil.rmtree(out, ignore_errors=True)
        os.sync()  # so that no run waits for what was written before
        runs[command] = measure(["mergekit-yaml", str(path), str(out)], path.with_suffix(".log"))
        size = max(path.stat().st_size for path in out.glob("*.safetensors"))
        if command == "omp":
            record = json.loads((out / "omp_record.json").read_text())
        shutil.rmtree(out)
    return report(name, runs["passthrough"], runs["omp"], record, size, options)


def report(
    name: str,
    copy: "Run",
    omp: "Run",
    record: Mapping[str, Any],
    shard: int,
    options: argparse.Namespace,
) -> list[str]:
    """Describe both runs of a pair in Markdown."""
    from pydantic import ByteSize, TypeAdapter

    solve = sum(one["seconds"] for one in record["solves"])
    making = omp.last("rows from") - omp.first("OMP of")
    nothing = Time(0, 0)
    stages = {
        "start, recipe and tokenizers": (omp.first("with the tokenizer of"), copy.first("Warmup loader cache")),
        "estimate of time and memory": (omp.first("peak memory about") - omp.first("with the tokenizer of"), nothing),
        "plan, and loading of matrices": (omp.first("OMP of") - omp.first("peak memory about"), nothing),
        "**new rows**: OMP, regression and checks": (making, nothing),
        "other tensors: reading and writing": (
            omp.last("Executing graph: 100%") - omp.last("rows from"),
            copy.last("Executing graph: 100%") - copy.first("Warmup loader cache"),
        ),
        "configuration, tokenizer, record and exit": tuple(
            run.all - run.last("Executing graph: 100%") for run in (omp, copy)
        ),
        "all": (omp.all, copy.all),
    }
    base, donor = (scaled(shape, options.scale) for shape in PAIRS[name])
    problems = ", ".join(f"{one['targets']:,} targets over {one['atoms']:,} atoms" for one in record["solves"])
    lines = [f"## {base.name} with the tokenizer of {donor.name}, k = {options.k}", ""]
    lines += [f"{base.rows:,} × {base.hidden:,} ← {donor.rows:,} × {donor.hidden:,}; solves: {problems}.", ""]
    lines += [f"OMP takes {solve:.1f} s of the new rows.", ""]
    lines += ["| stage | `omp`, s | `passthrough`, s | `omp`, CPU s | `passthrough`, CPU s |", "|---|" + 4 * "---:|"]
    lines += [
        f"| {stage} | {ours.wall:.1f} | {theirs.wall:.1f} | {ours.cpu:.1f} | {theirs.cpu:.1f} |"
        for stage, (ours, theirs) in stages.items()
    ]
    lines += ["", "| | `omp` | `passthrough` |", "|---|---:|---:|"]
    for what, attribute in MEASURES.items():
        ours, theirs = (getattr(run, attribute) / 2**20 for run in (omp, copy))
        lines.append(f"| {what}, MiB | {ours:,.0f} | {theirs:,.0f} |")
    largest = 4 * max(base.rows, donor.rows) * max(base.hidden, donor.hidden)
    budget = TypeAdapter(ByteSize).validate_python(options.memory_budget)
    bound = 4 * largest + shard + budget
    return [
        *lines,
        "",
        _verdict("outside OMP", omp.all.wall - solve, TIMES * copy.all.wall, "s"),
        _verdict("outside the new rows", omp.all.wall - making.wall, TIMES * copy.all.wall, "s"),
        _verdict("peak memory", omp.peak / 2**20, bound / 2**20, "MiB"),
    ]


def _verdict(what: str, value: float, bound: float, unit: str) -> str:
    return (
        f"- {what}: {value:,.1f} {unit}, bound {bound:,.1f} {unit}: {'holds' if value <= bound else 'DOES NOT HOLD'}"
    )


MEASURES = {
    "peak resident memory": "peak",
    "peak of anonymous memory": "anonymous",
    "peak of mapped files": "mapped",
    "read from disk": "read",
    "written to disk": "written",
}
"""Attributes of :class:`Run`, in bytes."""


class Time(NamedTuple):
    """Seconds since a process began, and the seconds of processors that it has used."""

    wall: float
    cpu: float

    def __sub__(self, other: "Time") -> "Time":  # type: ignore[override]
        return Time(self.wall - other.wall, self.cpu - other.cpu)


@dataclass
class Run:
    """One process: its time, its memory and traffic in bytes, and the lines of its log with their times.

    The peak of resident memory is exact; those of its parts are the highest of ten samples a second.
    """

    all: Time = field(default_factory=lambda: Time(0, 0))
    peak: int = 0
    anonymous: int = 0
    mapped: int = 0
    read: int = 0
    written: int = 0
    lines: list[tuple[Time, str]] = field(default_factory=list)

    def first(self, text: str) -> Time:
        """Return the time of the first line with a text."""
        return next(at for at, line in self.lines if text in line)

    def last(self, text: str) -> Time:
        """Return the time of the last line with a text."""
        return next(at for at, line in reversed(self.lines) if text in line)

    def sample(self, process: int) -> None:
        """Read what Linux counts of a process."""
        try:
            status = Path(f"/proc/{process}/status").read_text()
            traffic = Path(f"/proc/{process}/io").read_text()
        except OSError:  # it has just ended
            return
        counts = dict(re.findall(r"^(\w+):\s+(\d+)", status + traffic, re.MULTILINE))
        for attribute, key, unit in (
            ("peak", "VmHWM", 1024),
            ("anonymous", "RssAnon", 1024),
            ("mapped", "RssFile", 1024),
            ("read", "read_bytes", 1),
            ("written", "write_bytes", 1),
        ):
            setattr(self, attribute, max(getattr(self, attribute), unit * int(counts.get(key, 0))))


def measure(command: Sequence[str], log: Path) -> Run:
    """Run a command, write what it says to a file, and measure it."""
    program = shutil.which(command[0], path=str(Path(sys.executable).parent)) or command[0]
    environment = {**os.environ, "MERGEKIT_OMP_CACHE": "off"}
    run, started = Run(), time.perf_counter()
    with subprocess.Popen(
        [program, *command[1:]], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    ) as child:
        reader = threading.Thread(target=_read_lines, args=(child, run.lines, started))
        reader.start()
        # An ended process is kept until it is waited for, with its traffic.
        while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            run.sample(child.pid)
            time.sleep(0.1)
        run.all = _time(child.pid, started)
        run.sample(child.pid)
        reader.join()
    log.write_text("".join(f"{at.wall:9.2f} {at.cpu:9.2f} {line}\n" for at, line in run.lines))
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} exited with status {child.returncode}: see {log}")
    return run


def _time(process: int, started: float) -> Time:
    """Return the time of a process that has not been waited for."""
    counts = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return Time(time.perf_counter() - started, sum(map(int, counts[11:13])) / os.sysconf("SC_CLK_TCK"))


def _read_lines(child: subprocess.Popen[bytes], lines: list[tuple[Time, str]], started: float) -> None:
    """Read lines, and states of progress bars, as they come."""
    assert child.stderr is not None
    rest = ""
    while chunk := os.read(child.stderr.fileno(), 2**16):
        at = _time(child.pid, started)
        *complete, rest = re.split(r"[\r\n]+", rest + chunk.decode(errors="replace"))
        # A bar ends its state only when it writes the next one.
        lines += [(at, line) for line in (*complete, rest) if line]


def build_pair(pair: tuple[Shape, Shape], folders: Sequence[Path], scale: float) -> None:
    """Write the checkpoints of base and donor, unless they are there."""
    import torch
    from helpers import tokenizers_for_tests

    from mergekit_omp import read_vocabulary

    if all((folder / "config.json").exists() for folder in folders):
        return
    shapes = [scaled(shape, scale) for shape in pair]
    tokenizers = [smaller(getattr(tokenizers_for_tests, shape.tokenizer)(), scale) for shape in pair]
    texts = [{id_: token.data for id_, token in read_vocabulary(one).tokens.items()} for one in tokenizers]
    place = {text: index for index, text in enumerate(sorted({text for one in texts for text in one.values()}))}
    hidden = torch.randn(len(place) + 1, HIDDEN, generator=torch.Generator().manual_seed(0))
    hidden[-1] = 0  # of rows without a token
    for seed, (shape, tokenizer, names, folder) in enumerate(zip(shapes, tokenizers, texts, folders, strict=True)):
        shutil.rmtree(folder, ignore_errors=True)
        tokenizer.save_pretrained(folder)
        places = torch.tensor([place.get(names.get(id_), -1) for id_ in range(shape.rows)])
        write_model(folder, shape, tokenizer, hidden, places, seed)


def scaled(shape: Shape, scale: float) -> Shape:
    """Reduce the tokens and the columns of a model."""
    if scale == 1:
        return shape
    sizes = {name: max(64, round(getattr(shape, name) * scale / 16) * 16) for name in ("hidden", "intermediate")}
    return replace(shape, rows=round(shape.rows * scale) + 2048, **sizes)  # and all special tokens


def smaller(tokenizer: Any, scale: float) -> Any:
    """Return a tokenizer with the first tokens of a byte-level BPE, and all of its special ones."""
    if scale == 1:
        return tokenizer
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = described["model"], described["added_tokens"]
    special = {token["content"] for token in added}
    ordinary = sorted((id_, token) for token, id_ in model["vocab"].items() if token not in special)
    kept = {token for _, token in ordinary[: 256 + round(len(ordinary) * scale)]}
    old = {token: id_ for token, id_ in model["vocab"].items() if token in kept} | {
        token["content"]: token["id"] for token in added
    }
    new = {token: id_ for id_, token in enumerate(sorted(old, key=old.__getitem__))}
    model["vocab"] = {token: new[token] for token in model["vocab"] if token in new}
    model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= kept]
    for token in added:
        token["id"] = new[token["content"]]
    roles = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name.endswith("_token")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)), **roles)


def write_model(folder: Path, shape: Shape, tokenizer: Any, hidden: Any, places: Any, seed: int) -> None:
    """Write the shards of a model, whose rows have the ``hidden`` numbers (U, H) at ``places`` (R,)."""
    import torch
    from helpers.checkpoints import ARCHITECTURES

    config_class, model_class = ARCHITECTURES[shape.architecture]
    config = config_class(
        vocab_size=shape.rows,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head,
        tie_word_embeddings=shape.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=[model_class.__name__],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in model_class(config).state_dict().items()}
    if shape.tied:
        del shapes["lm_head.weight"]
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, dims in shapes.items():
        if shards[-1] and sum(map(_size, shards[-1].values())) + _size(dims) > SHARD:
            shards.append({})
        shards[-1][name] = dims
    index = {}
    for number, shard in enumerate(shards, start=1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        starts = write_with_holes(path, shard)
        index |= dict.fromkeys(shard, path.name)
        with path.open("r+b") as file:
            for name in starts.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
                file.seek(starts[name])
                side = 2 * seed + (name == "lm_head.weight")
                for rows in synthetic_rows(hidden, places, shape.hidden, side):
                    file.write(rows.view(torch.uint8).numpy().data)
    content = {"metadata": {"total_size": sum(map(_size, shapes.values()))}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    config.save_pretrained(folder)


def _size(dims: Sequence[int]) -> int:
    """Return the bytes of a bfloat16 tensor."""
    return 2 * math.prod(dims)


def write_with_holes(path: Path, tensors: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Write a .safetensors file of zeros in bfloat16 that take no disk; return where each tensor starts."""
    header, end = {}, 0
    for name, dims in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [end, end := end + _size(dims)]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in header.items()}


def synthetic_rows(hidden: Any, places: Any, width: int, seed: int) -> Any:
    """Yield rows bfloat16 (r, width), in order, of R tokens with hidden numbers (U, H) at ``places`` (R,)."""
    import torch

    draw = torch.Generator().manual_seed(1 + seed)
    spectrum = LENGTH * torch.arange(1, width + 1).rsqrt()  # as in benchmarks/solver.py
    common = torch.randn(width, generator=draw)
    mixing = torch.randn(hidden.shape[1], width, generator=draw) * (SHARED / hidden.shape[1]) ** 0.5
    for part in places.split(2**13):
        rows = torch.randn(len(part), width, generator=draw).mul_((1 - SHARED) ** 0.5)
        yield rows.addmm_(hidden[part], mixing).add_(common).mul_(spectrum).bfloat16()


if __name__ == "__main__":
    main()
