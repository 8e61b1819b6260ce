"""How much of the gap between a transplanted model and its base a healing closes, in how many minutes.

    python -m benchmarks.heal --minutes 10

gives Gemma-3-270M the tokenizer of SmolLM2-135M and the other way round, heals each in several ways, and prints a
Markdown table: bits per byte of texts that no healing saw, before and after, and the share of the gap that is closed.
``--pairs`` and ``--runs`` choose some of it. The models are kept under ``--out``, and what is there is not made again.

The training texts are Python's standard library (code), seeded sums, Debian's reference in English (prose), and its
installation guide in German and in twenty languages. They come from Debian's archive by ``apt-get download``. The test
texts are the built-in held-out ones, and a part of Debian's reference in German. "Languages" are ten, in eight
scripts; most runs do not train on them, and show with them what happens to other kinds of text.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from mergekit_omp.errors import OmpError
from mergekit_omp.evaluation.bits_per_byte import ModelScore, builtin_texts
from mergekit_omp.evaluation.spans import SpanClass
from mergekit_omp.healing.beginnings import sum_line
from mergekit_omp.report.scores import evaluate

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import one_vocabulary
import real_weights

PAIRS = {"gemma3-smollm2": 64, "smollm2-gemma3": 8}
"""Base and donor, and the k of the transplant: 210,000 new tokens take a quarter of an hour with 64."""

GUIDE, REFERENCE = "installation-guide-amd64", "debian-reference"
DEBIAN = (GUIDE, f"{REFERENCE}-en", f"{REFERENCE}-de")
KINDS = ("code", "sums", "prose", "german")
OTHER_KIND = "languages"
"""The test text whose kind most runs do not train on."""
TRAINING_CHARACTERS = 300_000
TEST_BYTES = 3000


@dataclass(frozen=True)
class Run:
    """One way to heal: the training texts (none: the base writes them) and options."""

    texts: tuple[str, ...]
    options: tuple[str, ...] = ()


RUNS = {
    "text": Run(KINDS),
    "generate": Run(()),
    "next-token": Run(KINDS, ("--objective=next-token",)),
    "english-and-code": Run(("code", "prose")),
    "many-languages": Run((*KINDS, OTHER_KIND)),
    "rows": Run(KINDS, ("--train=rows",)),
    "lora": Run(KINDS, ("--train=lora",)),
    "full": Run(KINDS, ("--train=full",)),
}


def main() -> None:
    """Heal in every way that was asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of training: %(default)s")
    parser.add_argument("--tokens", type=int, help="train on so many tokens instead, whatever the time")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), help="base and donor (default: all)")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="ways to heal (default: all)")
    parser.add_argument("--out", type=Path, default=Path("out/heal"), help="where models go: %(default)s")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and make nothing")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    training, test = make_texts(arguments.out / "texts")
    for pair in arguments.pairs:
        base, donor = (real_weights.checkpoint(name) for name in pair.split("-"))
        folder = arguments.out / pair
        transplanted = folder / "transplanted"
        if not transplanted.exists():
            one_vocabulary.transplant(str(base), donor, transplanted, {"k": PAIRS[pair]})
        for name in [] if arguments.table else arguments.runs:
            out = folder / name
            if not out.exists():
                texts = one_vocabulary.text_options([training[text] for text in RUNS[name].texts])
                bound = f"--tokens={arguments.tokens}" if arguments.tokens else f"--minutes={arguments.minutes}"
                one_vocabulary.heal(transplanted, out, bound, *texts, *RUNS[name].options)
        print("\n".join(table(pair, base, transplanted, [folder / name for name in arguments.runs], test)), flush=True)


def make_texts(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Write the training texts by name; returns their files, and the test texts."""
    folder.mkdir(parents=True, exist_ok=True)
    documents, numbers = debian_documents(folder), random.Random(5)
    texts = {
        "code": "".join(shuffled_library()),
        "sums": "".join(sum_line(numbers) for _ in range(20_000)),
        "prose": documents["reference.en"][30_000:],
        "german": documents["guide.de"][20_000:],
        "languages": "".join(documents[name][20_000:35_000] for name in documents if name.startswith("guide.")),
    }
    files = {name: folder / f"{name}.txt" for name in texts}
    for name, text in texts.items():
        files[name].write_text(text[:TRAINING_CHARACTERS], encoding="utf-8")
    test = builtin_texts("held_out") | {"german": documents["reference.de"][100_000 : 100_000 + TEST_BYTES]}
    return files, test


def debian_documents(folder: Path) -> dict[str, str]:
    """Fetch Debian's guide in every language ("guide.de", …), and its reference ("reference.en", "reference.de").

    Raises:
        OmpError: Debian's tools or its archive are not at hand.
    """
    unpacked = folder / "debian"
    try:
        if not unpacked.exists():
            subprocess.run(["apt-get", "download", *DEBIAN], cwd=folder, check=True, capture_output=True)
            for package in sorted(folder.glob("*.deb")):
                subprocess.run(["dpkg", "-x", str(package), str(unpacked)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise OmpError(
            f"Debian's packages {', '.join(DEBIAN)} cannot be downloaded ({error}); this needs apt."
        ) from error
    share = unpacked / "usr" / "share"
    guides = sorted((share / "doc" / GUIDE).glob("*/install.*.txt.gz"))
    references = [share / REFERENCE / f"{REFERENCE}.{language}.txt.gz" for language in ("en", "de")]
    named = [(f"guide.{path.name.split('.')[1]}", path) for path in guides]
    named += [(f"reference.{path.name.split('.')[1]}", path) for path in references]
    return {name: gzip.decompress(path.read_bytes()).decode(errors="ignore") for name, path in named}


def shuffled_library() -> Iterator[str]:
    """Yield Python's standard library, module by module."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(0).shuffle(modules)
    for path in modules[:60]:
        yield path.read_text(encoding="utf-8", errors="ignore")


def table(
    pair: str, base: Path, transplanted: Path, healed: Sequence[Path], texts: Mapping[str, str]
) -> Iterator[str]:
    """Yield the lines of a Markdown table, and of one by span class."""
    healed = [out for out in healed if out.exists()]
    scores = evaluate([base, transplanted, *healed], texts, base=base, dtype=torch.bfloat16, progress=False)
    original, before, *after = scores
    yield f"\n**{pair.replace('-', ' with the tokenizer of ')}**\n"
    kinds = [name for name in texts if name != OTHER_KIND]
    yield f"| | tokens | seconds | {' | '.join(kinds)} | mean | gap closed | {OTHER_KIND} | gap closed of all |"
    yield "|---|" + "---:|" * (len(texts) + 5)
    for name, score in (("original", original), ("transplanted", before)):
        cells = f"{numbers(score, kinds)} | {mean(score, kinds):.3f} | | {numbers(score, [OTHER_KIND])}"
        yield f"| {name} | | | {cells} | |"
    for out, score in zip(healed, after, strict=True):
        told = json.loads((out / "omp_record.json").read_text(encoding="utf-8"))["heal"]
        closed, closed_of_all = (
            (mean(before, some) - mean(score, some)) / (mean(before, some) - mean(original, some))
            for some in (kinds, list(texts))
        )
        yield (
            f"| {out.name} | {told['written']['tokens']:,} | {told['seconds']:.0f} | {numbers(score, kinds)} "
            f"| {mean(score, kinds):.3f} | {closed:.0%} | {numbers(score, [OTHER_KIND])} | {closed_of_all:.0%} |"
        )
    yield f"\n| gap in bits per byte, all texts | {' | '.join(kind.value for kind in SpanClass)} |"
    yield "|---|" + "---:|" * len(SpanClass)
    for name, score in zip(["transplanted", *(out.name for out in healed)], [before, *after], strict=True):
        spans, size = score.overall.spans, score.overall.n_bytes
        assert spans is not None
        cells = [f"{(spans[kind].bits - spans[kind].ideal_bits) / size:.3f}" for kind in SpanClass]
        yield f"| {name} | {' | '.join(cells)} |"
    yield "\n| bits per byte of held-out windows, while training | |"
    yield "|---|---|"
    for out in healed:
        told = json.loads((out / "omp_record.json").read_text(encoding="utf-8"))["heal"]
        steps = [f"{c['tokens']:,} tokens, {c['seconds']:.0f} s: {c['bits_per_byte']:.3f}" for c in told["checks"]]
        yield f"| {out.name} (base {told['base_bits_per_byte']:.3f}) | {'; '.join(steps)} |"


def mean(score: ModelScore, names: Sequence[str]) -> float:
    """Return the mean of some texts' bits per byte."""
    chosen = [text.bits_per_byte for text in score.texts if text.text in names]
    return sum(chosen) / len(chosen)


def numbers(score: ModelScore, names: Sequence[str]) -> str:
    """Format some texts' bits per byte, as cells."""
    return " | ".join(f"{text.bits_per_byte:.3f}" for text in score.texts if text.text in names)


if __name__ == "__main__":
    main()
