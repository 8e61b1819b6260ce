"""Heal a transplanted model: check, load, train against the base, write."""

import logging
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mergekit_omp.checkpoints.input_folders import InputFolders
from mergekit_omp.checkpoints.models import load_model
from mergekit_omp.errors import OmpError, explained
from mergekit_omp.evaluation.spans import SpanRuler, spans_as_dict
from mergekit_omp.healing.alignment import AlignedWindow, Reader, align
from mergekit_omp.healing.beginnings import sums
from mergekit_omp.healing.checks import Check, Checker
from mergekit_omp.healing.generation import generate
from mergekit_omp.healing.models import check_bodies, check_rows, load_reader, teacher_of
from mergekit_omp.healing.options import HealOptions
from mergekit_omp.healing.output import folder_of, record_of, write_model
from mergekit_omp.healing.student import Student
from mergekit_omp.healing.teacher import Teacher
from mergekit_omp.healing.texts import Texts, make_texts, read_texts
from mergekit_omp.healing.training import Budget, Progress, Trainer
from mergekit_omp.output.staging import staged
from mergekit_omp.report.record import versions

LOG = logging.getLogger(__name__)

GENERATING_SHARE = 0.15
"""The share of a run's time that the base may write texts in; of its tokens, half."""


def heal(options: HealOptions, *, progress: bool = True) -> dict[str, Any]:
    """Train a transplanted model against its base, and write it.

    Args:
        options: what to heal, and how.
        progress: show a progress bar where the error stream is a terminal, and print each check there.

    Returns:
        What the record of the output has on the healing, under "heal".

    Raises:
        OmpError: texts, a model or a base that do not serve; an output folder that is not free; too little memory; an
            interruption, unless the best state is to be written then.
    """
    texts = read_texts(options.text, options.seed) if options.text else None
    source = folder_of(options.model)
    record = record_of(source)
    base_name = teacher_of(options, record)
    inputs = InputFolders([options.model, base_name])
    with inputs.unchanged():
        check_bodies(options.model, base_name, options.trust_remote_code)
        base_reader = load_reader(base_name, options.trust_remote_code, "base")
        reader = load_reader(options.model, options.trust_remote_code, "model")
    if base_reader.vocabulary == reader.vocabulary:
        raise OmpError(f"base: {base_name} has the tokenizer of {options.model} already, and nothing is to be healed.")
    with explained(options.out), staged(options.out) as folder, inputs.unchanged(), _memory_explained():
        torch.manual_seed(options.seed)
        dtype = getattr(torch, options.dtype)
        base = load_model(base_name, options.device, dtype, options.trust_remote_code, "base")
        model = load_model(options.model, options.device, "auto", options.trust_remote_code, "model")
        check_rows(base_reader, base, base_name, "base")
        check_rows(reader, model, options.model, "model")
        written_dtype, rows = model.dtype, model.get_input_embeddings().get_parameter("weight").shape[0]
        student = Student(model.to(dtype), options)
        budget = Budget(options.seconds, options.tokens)
        with tqdm(total=options.tokens, unit="tok", unit_scale=True, disable=None if progress else True) as bar:
            if texts is None:
                texts = _written_by(base, base_reader, options, bar)
                bar.reset(options.tokens)
            supply = _Supply(texts.training, base_reader, reader, options.seed)
            held_out = [window for text in texts.held_out if (window := align(text, base_reader, reader)) is not None]
            if not held_out:
                raise _changed_texts()
            bar.set_description("Training")
            ruler = SpanRuler(base_reader.vocabulary, reader.tokenizer, reader.vocabulary)
            checker = Checker(held_out, base, base_reader, reader, ruler)
            trainer = Trainer(student, Teacher(base, ruler, base_reader, reader, rows), reader, options)

            def check(tokens: int) -> Check:
                found = checker.check(student.logits, tokens, budget.started)
                if progress:
                    _print_check(found, checker)
                return found

            with _interruption() as interrupted:
                done = trainer.run(iter(supply), budget, check, interrupted, bar)
        if done.interrupted and not options.save_on_interrupt:
            raise OmpError(
                f"Interrupted after {budget.used:,} tokens; nothing was written. With --save-on-interrupt the best "
                "state so far is."
            )
        healed = student.finished(done.best_state, written_dtype)
        summary = _describe(options, base_name, texts, done, checker, supply.skipped)
        write_model(folder, healed, source, record, summary)
    return summary


def _written_by(base: Any, reader: Reader, options: HealOptions, bar: tqdm) -> Texts:
    bar.set_description("Writing texts")
    seconds = None if options.seconds is None else options.seconds * GENERATING_SHARE
    tokens = 2**62 if options.tokens is None else max(1, options.tokens // 2)
    texts = [*generate(base, reader, seconds=seconds, tokens=tokens, progress=bar.update), *sums(options.seed)]
    sources = [{"name": "generated", "bytes": sum(len(text.encode()) for text in texts), "seed": options.seed}]
    return make_texts(texts, sources, options.seed)


class _Supply:
    """Training windows, again and again, in another order each time.

    Attributes:
        skipped: the windows that a tokenizer does not spell byte for byte.
    """

    def __init__(self, windows: Sequence[str], base: Reader, output: Reader, seed: int) -> None:
        self._windows, self._base, self._output = windows, base, output
        self._random = random.Random(seed)
        self.skipped: set[str] = set()

    def __iter__(self) -> Iterator[AlignedWindow]:
        while len(self.skipped) < len(set(self._windows)):
            for text in self._random.sample(self._windows, len(self._windows)):
                window = align(text, self._base, self._output)
                if window is None:
                    self.skipped.add(text)
                else:
                    yield window
        raise _changed_texts()


def _changed_texts() -> OmpError:
    return OmpError(
        "text: the tokenizers do not spell these texts byte for byte; name other texts, or a model whose tokenizer "
        "does not change texts."
    )


def _print_check(check: Check, checker: Checker) -> None:
    """Print a check above the progress bar."""
    tqdm.write(
        f"{check.tokens:>9,} tokens, {check.seconds:4.0f} s: {check.bits_per_byte:.3f} bits per byte of held-out text "
        f"(base with its own tokenizer: {checker.base_bits_per_byte:.3f})",
        file=sys.stderr,
    )


def _describe(
    options: HealOptions, base: str, texts: Texts, done: Progress, checker: Checker, skipped: Sized
) -> dict[str, Any]:
    checks = [
        {"tokens": check.tokens, "seconds": round(check.seconds, 1), "bits_per_byte": check.bits_per_byte}
        for check in done.checks
    ]
    return {
        "base": base,
        "texts_from": "written by the base" if not options.text else ", ".join(Path(p).name for p in options.text),
        "texts": list(texts.sources),
        "windows": {"training": len(texts.training), "held_out": len(texts.held_out), "skipped": len(skipped)},
        "tokens": done.checks[-1].tokens,
        "seconds": round(done.checks[-1].seconds, 1),
        "steps": done.steps,
        "loss": done.loss,
        "interrupted": done.interrupted,
        "base_bits_per_byte": checker.base_bits_per_byte,
        "checks": checks,
        "written": checks[done.checks.index(done.best)],
        "before": spans_as_dict(done.checks[0].spans, checker.n_bytes),
        "after": spans_as_dict(done.best.spans, checker.n_bytes),
        "objective": options.objective.value,
        "train": options.train.value,
        "options": options.model_dump(mode="json"),
        "versions": versions(),
    }


@contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """Have the first Ctrl-C or SIGTERM only be noted; a second one acts as usual."""
    received = []
    before: dict[int, Any] = {}

    def note(number: int, _frame: Any) -> None:
        received.append(number)
        signal.signal(number, before[number])

    for signal_number in (signal.SIGINT, signal.SIGTERM):
        before[signal_number] = signal.signal(signal_number, note)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _memory_explained() -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OmpError(
            "The memory is used up, with one window at a time and without kept activations; write train: rows, or "
            "run on a machine with more."
        ) from error
