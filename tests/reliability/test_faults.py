"""Disturb whole runs: what is left is absent, marked unfinished, or whole and right, and a new run succeeds.

Faults are drawn from a seed, so that a number names the same fault everywhere:

    pytest tests/reliability/test_faults.py                            # the first 40
    MERGEKIT_OMP_FAULTS=200 pytest -s tests/reliability/test_faults.py # the table of docs/reliability.md
    MERGEKIT_OMP_FAULTS=200 pytest tests/reliability/test_faults.py -k fault117
"""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from helpers.checkpoints import (
    ENGLISH,
    PYTHON,
    byte_level_tokenizer,
    make_model,
    save,
    sentencepiece_tokenizer,
    tensors_of,
)
from helpers.commands import merge_here, recipe
from helpers.faults import AWAY, Call, Run, Strike, can_mount, read_only, small_disk
from safetensors.torch import save_file

from mergekit_omp.solver import cache

pytestmark = pytest.mark.slow

COUNT = int(os.environ.get("MERGEKIT_OMP_FAULTS", "40"))
COMMANDS = ("transplant", "chained merge", "heal")
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
OF_ANY_COMMAND = ("input vanishes", "input vanishes", "read-only inputs", "two runs, one output", "clock jumps")
OF_THE_CACHE = ("two runs, one cache", "cache entry damaged", "cache entry damaged")
NEEDED = ("config.json", "model.safetensors", "tokenizer.json")  # an absent one stops a run that begins later
DAMAGES = ("cut", "flipped", "of another version")
PAGE = 4096
PLENTY = 2**30
SHARDS = ("--out-shard-size", "200K")
WRITTEN = {"out", "stages", "codes", "out.unfinished"}
YEAR = 365 * 24 * 3600.0


@dataclass(frozen=True)
class Fault:
    """A fault: its kind, the command that it disturbs, and a seed for the moment and all else."""

    number: int
    kind: str
    command: str

    @property
    def seed(self) -> str:
        return f"fault {self.number}"

    def __str__(self) -> str:
        return f"fault{self.number}-{self.kind}-{self.command}".replace(" ", "_").replace(",", "")


def faults() -> Iterator[Fault]:
    """Yield faults without end; every twenty have each signal and a full disk for each command, and all others."""
    choose = random.Random(0)
    number = 0
    while True:
        kinds = [(kind, command) for kind in (*SIGNALS, "disk full") for command in COMMANDS]
        kinds += [(kind, choose.choice(COMMANDS)) for kind in OF_ANY_COMMAND]
        kinds += [(kind, choose.choice(COMMANDS[:2])) for kind in OF_THE_CACHE]
        for kind, command in kinds:
            yield Fault(number, kind, command)
            number += 1


@dataclass(frozen=True)
class Clean:
    """What an undisturbed run of a command does.

    Attributes:
        files: the digest of each file, or "" where it contains times, by folder that is written.
        sizes: bytes on a disk of the files that were written, in order.
        operations: number of operations on watched files.
        seconds: from the start of the process to its end.
        codes: the folder of its cache.
    """

    files: dict[str, dict[str, str]]
    sizes: list[int]
    operations: int
    seconds: float
    codes: Path


def digest(path: Path, folder: Path) -> str:
    """Return the SHA-256 of a file, as it would be in another folder; "" for files that contain times."""
    if path.name in ("README.md", "omp_record.json"):
        return ""
    return hashlib.sha256(path.read_bytes().replace(os.fsencode(folder), b"...")).hexdigest()


def contents(folder: Path, root: Path) -> dict[str, str]:
    """Return the digest of each file in a folder."""
    return {str(path.relative_to(folder)): digest(path, root) for path in sorted(folder.rglob("*")) if path.is_file()}


class Scene:
    """Inputs, and what undisturbed runs make of them."""

    def __init__(self, folder: Path) -> None:
        self.inputs = folder / "inputs"
        self._make_inputs()
        self.before = contents(self.inputs, self.inputs)
        self.mounts = can_mount(self.inputs)
        self.clean = {command: self._run_undisturbed(command, folder) for command in COMMANDS}

    def _make_inputs(self) -> None:
        tokenizers = {
            "base": sentencepiece_tokenizer(ENGLISH),
            "other": sentencepiece_tokenizer(PYTHON, 400),
            "third": byte_level_tokenizer(ENGLISH, 340),
            "donor": byte_level_tokenizer(PYTHON, 420),
        }
        sizes = {"base": (128, 3), "other": (128, 3), "third": (96, 2), "donor": (64, 1)}
        for name, tokenizer in tokenizers.items():
            hidden, layers = sizes[name]
            model = make_model(tokenizer, hidden=hidden, intermediate=2 * hidden, layers=layers)
            save(self.inputs / name, model, tokenizer)
        transplant = recipe(self.inputs / "base", self.inputs / "donor")
        merged = recipe(
            self.inputs / "base",
            self.inputs / "donor",
            name="merged",
            merge_method="omp_linear",
            models=[{"model": str(self.inputs / name)} for name in ("base", "other")],
            parameters={"k": 5, "weight": 0.5},
        )
        last = recipe(self.inputs / "third", "merged")
        (self.inputs / "transplant.yml").write_text(yaml.safe_dump(transplant))
        (self.inputs / "chain.yml").write_text(yaml.safe_dump_all([merged, last]))
        (self.inputs / "text.txt").write_text("\n".join([*ENGLISH, *PYTHON]) * 4)
        result = merge_here(transplant, self.inputs / "transplanted", "--quiet")
        assert result.exit_code == 0, result.output

    def call(self, command: str, folder: Path, log: Path, codes: Path, strike: Strike | None = None) -> Call:
        """Return the call of a command that writes to a folder."""
        out, stages = str(folder / "out"), str(folder / "stages")
        programs = {
            "transplant": ("mergekit-yaml", f"{self.inputs}/transplant.yml", out, *SHARDS),
            "chained merge": (
                "mergekit-multi", f"{self.inputs}/chain.yml", "--intermediate-dir", stages, "--out-path", out, *SHARDS,
            ),
            "heal": (
                "mergekit-omp", "heal", f"{self.inputs}/transplanted", out, "--text", f"{self.inputs}/text.txt",
                "--tokens", "600", "--dtype", "float32",
            ),
        }  # fmt: skip
        program, *arguments = programs[command]
        return Call(program, tuple(arguments), log, (folder, self.inputs, codes), codes, strike)

    def inputs_of(self, command: str) -> list[Path]:
        """Return the folders and files that a command reads."""
        names = {
            "transplant": ("base", "donor"),
            "chained merge": ("base", "other", "third", "donor"),
            "heal": ("transplanted", "base", "text.txt"),
        }
        return [self.inputs / name for name in names[command]]

    def _run_undisturbed(self, command: str, folder: Path) -> Clean:
        for name in ("first", "second"):  # the first starts the server and fills caches of compiled code
            work = folder / "clean" / command.replace(" ", "-") / name  # mergekit-multi stops at a space
            work.mkdir(parents=True)
            call = self.call(command, work, work.with_suffix(".log"), work / "codes")
            run = Run(call)
            assert run.finish() == 0, call.log.read_text()
        files = (path for path in work.rglob("*") if path.is_file())
        written = sorted(files, key=lambda path: path.stat().st_mtime_ns)
        return Clean(
            {str(out.relative_to(work)): contents(out, work) for out in self.outputs(command, work)},
            [-(-path.stat().st_size // PAGE) * PAGE for path in written],
            int(call.operations_file.read_text()),
            time.monotonic() - run.started,
            work / "codes",
        )

    @staticmethod
    def outputs(command: str, folder: Path) -> list[Path]:
        """Return the folders that a command makes in a folder."""
        return [*([folder / "stages" / "merged"] if command == "chained merge" else []), folder / "out"]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def counted() -> Iterator[Counter[tuple[str, str]]]:
    """Yield a counter of kinds of faults and what they left, which is printed at the end."""
    counter: Counter[tuple[str, str]] = Counter()
    yield counter
    kinds, columns = dict.fromkeys(kind for kind, _ in counter), ("absent", "marked", "whole")
    print(f"\n\n| fault | {' | '.join(columns)} | all |\n|---|{'---:|' * (len(columns) + 1)}")
    for kind in kinds:
        numbers = [counter[kind, column] for column in columns]
        print(f"| {kind} | {' | '.join(map(str, numbers))} | {sum(numbers)} |")
    print(f"| all | {' | '.join(str(sum(counter[kind, c] for kind in kinds)) for c in columns)} | {counter.total()} |")


class Case:
    """One fault in a folder of its own."""

    def __init__(self, scene: Scene, fault: Fault, folder: Path, cleanup: ExitStack) -> None:
        self.scene, self.fault, self.command = scene, fault, fault.command
        self.clean = scene.clean[fault.command]
        self.random = random.Random(fault.seed)
        self.work, self.codes, self.log = folder / "work", folder / "work" / "codes", folder / "log"
        self.work.mkdir()
        self.cleanup = cleanup

    def operation(self) -> int:
        """Choose a moment."""
        return self.random.randint(1, self.clean.operations)

    def start(self, strike: Strike | None = None, work: Path | None = None) -> Run:
        """Start the command."""
        return Run(self.scene.call(self.command, work or self.work, self.log, self.codes, strike))

    def check(self, status: int, work: Path | None = None) -> str:
        """Check what a run left, and say in a word what it is."""
        work = work or self.work
        told = " ".join(self.log.read_text().split()) if self.log.exists() else ""
        assert {path.name for path in work.iterdir()} <= WRITTEN
        cached = {path.name for path in self.codes.glob("*")}
        assert all(map(cache._ENTRY_NAME.match, cached)), "a file in the cache that is never removed"
        left = []
        for out in self.scene.outputs(self.command, work):
            unfinished = out.with_name(f"{out.name}.unfinished")
            if out.exists():
                self._check_whole(out, work)
            if unfinished.exists():
                assert {path.name for path in unfinished.iterdir()} <= {out.name, "lock"}
                if f"The weights are complete and kept in {unfinished / out.name}" in told:
                    self._check_weights(unfinished / out.name, out, work)
            left.append("whole" if out.exists() else "marked" if unfinished.exists() else "absent")
        if status == 0:
            assert set(left) == {"whole"}
        assert contents(self.scene.inputs, self.scene.inputs) == self.scene.before
        return left[-1]

    def _check_whole(self, out: Path, work: Path) -> None:
        assert contents(out, work) == self.clean.files[str(out.relative_to(work))]
        record = json.loads((out / "omp_record.json").read_text())
        assert "samples" in record
        heading = "### Healing" if self.command == "heal" else "### Tokenizer transplantation"
        assert heading in (out / "README.md").read_text()

    def _check_weights(self, kept: Path, out: Path, work: Path) -> None:
        expected = tensors_of(self.clean.codes.parent / out.relative_to(work))
        found = tensors_of(kept)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def run_again(self) -> None:
        """Check that the same command succeeds, unless the output is there."""
        if not (self.work / "out").exists():
            self.log.unlink(missing_ok=True)
            assert self.start().finish() == 0, self.log.read_text()[-3000:]
            assert self.check(0) == "whole"
            assert not (self.work / "out.unfinished").exists()

    # One method for each kind of fault; each returns what was left.

    def signal(self) -> str:
        number = SIGNALS[self.fault.kind]
        if self.random.random() < 0.5:
            status = self.start(Strike(self.operation(), signal=number)).finish()
        else:
            run = self.start()
            time.sleep(self.random.uniform(0, self.clean.seconds))
            run.send(number)
            status = run.finish()
        return self.check(status)

    def disk_full(self, number: int | None = None) -> str:
        """Leave too little space for the file that is written as this one, or for any."""
        if not self.scene.mounts:
            pytest.skip("file systems cannot be mounted here")
        number = self.random.randrange(len(self.clean.sizes)) if number is None else number
        free = sum(self.clean.sizes[:number]) + self.random.randrange(0, self.clean.sizes[number], PAGE)
        resize = self.cleanup.enter_context(small_disk(self.work, max(PAGE, free)))
        status = self.start().finish()
        told = self.log.read_text()
        assert "Traceback" not in told, told[-3000:]
        assert status == 0 or "the disk is full" in told, told
        left = self.check(status)
        resize(PLENTY)
        return left

    def input_vanishes(self) -> str:
        path = self.random.choice(self.scene.inputs_of(self.command))
        if path.is_dir() and self.random.random() < 0.5:
            path /= self.random.choice(NEEDED)
        status = self.start(Strike(self.operation(), vanishes=path)).finish()
        away = path.with_name(f"{path.name}{AWAY}")
        if away.exists():
            away.rename(path)
        told = self.log.read_text()
        assert status == 0 or told.splitlines()[-1].startswith("Error: "), told[-3000:]
        return self.check(status)

    def read_only_inputs(self) -> str:
        if not self.scene.mounts:
            pytest.skip("file systems cannot be mounted here")
        with read_only(self.scene.inputs):
            assert self.start().finish() == 0, self.log.read_text()[-3000:]
            return self.check(0)

    def two_runs_one_output(self) -> str:
        first = self.start()
        time.sleep(self.random.uniform(0, self.clean.seconds))
        second = self.start()
        statuses = {first.finish(), second.finish()}
        assert statuses <= {0, 1}
        assert 0 in statuses, self.log.read_text()[-3000:]
        return self.check(0)

    def two_runs_one_cache(self) -> str:
        other = self.work.with_name("other")
        other.mkdir()
        first = self.start()
        time.sleep(self.random.uniform(0, self.clean.seconds))
        second = self.start(work=other)
        assert [first.finish(), second.finish()] == [0, 0], self.log.read_text()[-3000:]
        self.check(0, other)
        return self.check(0)

    def cache_entry_damaged(self) -> str:
        shutil.copytree(self.clean.codes, self.codes)
        entry = self.random.choice(sorted(self.codes.iterdir()))
        damage, data = self.random.choice(DAMAGES), bytearray(entry.read_bytes())
        if damage == "cut":
            entry.write_bytes(data[: self.random.randrange(len(data))])
        elif damage == "flipped":
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
            entry.write_bytes(data)
        else:
            save_file({"support": torch.zeros(3, 2)}, entry)
        assert self.start().finish() == 0, self.log.read_text()[-3000:]
        assert "Ignored the cache entry" in self.log.read_text(), damage
        return self.check(0)

    def clock_jumps(self) -> str:
        jump = self.random.choice([-10 * YEAR, -3600.0, 3600.0, 10 * YEAR])
        assert self.start(Strike(self.operation(), clock=jump)).finish() == 0, self.log.read_text()[-3000:]
        return self.check(0)


@pytest.mark.parametrize("fault", list(islice(faults(), COUNT)), ids=str)
def test_fault(fault: Fault, scene: Scene, counted: Counter[tuple[str, str]], tmp_path: Path) -> None:
    with ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, tmp_path, ignore_errors=True)
        case = Case(scene, fault, tmp_path, cleanup)
        method = "signal" if fault.kind in SIGNALS else re.sub("[ -]", "_", fault.kind.replace(",", ""))
        left = getattr(case, method)()
        case.run_again()
    counted[fault.kind, left] += 1


@pytest.mark.parametrize("command", COMMANDS)
def test_disk_full_at_every_write(
    command: str, scene: Scene, counted: Counter[tuple[str, str]], tmp_path: Path
) -> None:
    """At the writing of every file in turn; of every fifth in a short run."""
    for number in range(0, len(scene.clean[command].sizes), 1 if COUNT >= 200 else 5):
        with ExitStack() as cleanup:
            folder = tmp_path / str(number)
            folder.mkdir()
            cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
            case = Case(scene, Fault(number, "disk full", command), folder, cleanup)
            left = case.disk_full(number)
            case.run_again()
        counted["disk full, each file in turn", left] += 1
