"""Try damaged files in a process of its own, since libraries abort or hang on some of them."""

import multiprocessing
import os
import resource
import shutil
import signal
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import yaml
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors import safe_open
from transformers import AutoTokenizer

from mergekit_omp.cli.options import load_recipe
from mergekit_omp.errors import OmpError
from mergekit_omp.recipe.model_checks import check_checkpoints
from mergekit_omp.recipe.resolve import resolve
from mergekit_omp.recipe.transplant import Transplant
from mergekit_omp.report.forecast import forecast
from mergekit_omp.vocabulary.matching import TEXT_REASONS, MatchReason

SECONDS = 20
"""Seconds of computing after which a case counts as one that never ends; most take less than a tenth of a second."""

PATIENCE = 600
"""Seconds after which a case that does not compute counts as one that never ends."""

CASES_PER_PROCESS = 300
"""A new process after these many, since mergekit and transformers keep what they have read."""

MEMORY = 2 * 2**30
"""Bytes that a case may take beyond those of an idle process."""

LONGEST_SENTENCE = 1500
SAMPLE = "The quick brown fox, 12345 naïve\n\ttabs"


@dataclass(frozen=True)
class Case:
    """A damaged file of a model, or a recipe.

    Attributes:
        recipe: the recipe; ``@`` stands for the folder of the copy with the damaged file.
        origin: folder of which the case makes a copy; None for a damaged recipe.
        name: name of the damaged file.
        data: its content.
        merge_every: of how many accepted cases one is merged, and its output checked.
    """

    recipe: bytes
    origin: Path | None = None
    name: str = ""
    data: bytes = b""
    merge_every: int = 8

    @property
    def is_merged(self) -> bool:
        return zlib.crc32(self.recipe + self.data) % self.merge_every == 0


@dataclass(frozen=True)
class Outcome:
    """What a run makes of a case: "refused" by an OmpError, "planned", "merged", or a "bug" with its description."""

    kind: str
    text: str = ""


class Sandbox:
    """Try one case after the other in a forked process, which is replaced when it dies or hangs."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def __call__(self, case: Case) -> Outcome:
        if self._process is None or self._count % CASES_PER_PROCESS == 0:
            self.close()
            self._start()
        assert self._process
        assert self._pipe
        self._count += 1
        folder = self._folder / str(self._count)
        try:
            self._pipe.send((case, folder))
            if self._pipe.poll(PATIENCE):
                return self._pipe.recv()
            problem = f"has not ended after {PATIENCE} s"
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode or 0
            problem = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.close()
        return Outcome("bug", f"the process {problem}")

    def close(self) -> None:
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None

    def _start(self) -> None:
        fork = multiprocessing.get_context("fork")
        self._pipe, other = fork.Pipe()
        self._process = fork.Process(target=_serve, args=(other, attempt), daemon=True)
        self._process.start()
        other.close()


def _serve(pipe: Connection, attempt: Callable[[Case, Path], Outcome]) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)  # panics of Rust are printed before they become exceptions
    while True:
        try:
            case, folder = pipe.recv()
        except EOFError:
            return
        # The signal, SIGVTALRM, ends the process. The kernel's time does not count: it is long where memory is short.
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        outcome = attempt(case, folder)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        pipe.send(outcome)


def attempt(case: Case, folder: Path) -> Outcome:
    """Do with a case what ``inspect`` and a run do, and check what comes out."""
    folder.mkdir(parents=True)
    recipe = case.recipe
    if case.origin is not None:
        copied = folder / "model"
        shutil.copytree(case.origin, copied, copy_function=os.link)
        (copied / case.name).unlink(missing_ok=True)
        (copied / case.name).write_bytes(case.data)
        recipe = recipe.replace(b"@", str(copied).encode())
    path = folder / "recipe.yml"
    path.write_bytes(recipe)
    try:
        config = load_recipe(str(path))
        options = MergeOptions(quiet=True)
        transplant = resolve(config, options)
        _check_matches(transplant)
        forecast(transplant, measure=False)
        check_checkpoints(transplant)
        if not case.is_merged:
            return Outcome("planned")
        run_merge(config, str(folder / "out"), options)
        if case.origin is not None:
            _check_output(folder / "out", transplant)
        return Outcome("merged")
    except OmpError as error:
        problem = _problem_of_sentence(error.message)
        return Outcome("bug", problem) if problem else Outcome("refused", error.message)
    except BaseException:  # a panic of Rust is not an Exception
        return Outcome("bug", traceback.format_exc())


def _problem_of_sentence(sentence: str) -> str | None:
    try:
        sentence.encode()
    except UnicodeEncodeError:
        return f"the sentence cannot be printed: {sentence!a}"
    if len(sentence) > LONGEST_SENTENCE:
        return f"the sentence has {len(sentence)} characters: {sentence[:300]}"
    if not sentence.rstrip().endswith((".", ")")) or "Traceback" in sentence:
        return f"not a sentence: {sentence[:300]}"
    return None


def _check_matches(transplant: Transplant) -> None:
    """Check that every kept row is one of the model's, and that text keeps only rows of the same bytes."""
    output = transplant.vocabulary
    for model in transplant.inputs:
        rows, reasons = model.match.rows.tolist(), model.match.reasons.tolist()
        assert len(rows) == len(reasons) == output.size <= transplant.rows
        for id_, (row, reason) in enumerate(zip(rows, reasons, strict=True)):
            assert row < (model.rows or 0)
            if MatchReason(reason) in TEXT_REASONS:
                assert output.tokens[id_].data == model.vocabulary.tokens[row].data
            assert (id_ in output.tokens) == (MatchReason(reason) is not MatchReason.NO_TOKEN)


def _check_output(out: Path, transplant: Transplant) -> None:
    """Check the output's tokenizer, and bit for bit the rows that it kept."""
    written = AutoTokenizer.from_pretrained(out)
    expected = transplant.tokenizer
    assert written.get_vocab() == expected.get_vocab()
    assert written.encode(SAMPLE) == expected.encode(SAMPLE)
    base, after = (_embedding(path) for path in (Path(transplant.base.reference.model.path), out))
    assert len(after) == transplant.rows
    assert bool(torch.isfinite(after).all())
    rows = transplant.base.match.rows
    kept = (rows >= 0).nonzero().flatten()
    assert torch.equal(after[kept].view(torch.int32), base[rows[kept]].to(torch.float32).view(torch.int32))


def _embedding(folder: Path) -> torch.Tensor:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            if "model.embed_tokens.weight" in tensors.keys():  # noqa: SIM118, no mapping
                return tensors.get_tensor("model.embed_tokens.weight")
    raise AssertionError(f"{folder} has no embedding")


def recipe_of(base: Path | str, donor: Path | str) -> bytes:
    """Return the recipe of cases with a damaged file; "@" is the damaged model."""
    return yaml.safe_dump(
        {
            "merge_method": "omp",
            "models": [{"model": str(base)}],
            "tokenizer": {"source": str(donor)},
            "parameters": {"k": 3},
            "dtype": "float32",
        }
    ).encode()
