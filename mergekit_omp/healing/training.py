"""The training loop: batches of windows, an objective, checks on held-out text, the best state."""

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from mergekit_omp.healing.alignment import AlignedWindow, Reader
from mergekit_omp.healing.checks import Check
from mergekit_omp.healing.objective import cross_entropy, next_token
from mergekit_omp.healing.options import HealOptions, Objective
from mergekit_omp.healing.student import Student
from mergekit_omp.healing.teacher import Teacher

LOG = logging.getLogger(__name__)

STEP_TOKENS = 512
"""Tokens of a step: small, since a run of minutes has few steps."""
WARM_UP_STEPS = 10
FINAL_RATE = 0.05
"""The last learning rate, as a share of the peak."""
CLIP = 1.0
_WINDOWS_AT_ONCE = {"cpu": 2}  # where more gain nothing; 8 elsewhere

CHECKS = 4
"""Checks after the first, spread evenly; the last is at the end."""


@dataclass
class Budget:
    """How much of a run is left.

    Attributes:
        seconds: how long it may take; None where tokens bound it.
        tokens: how many tokens to train on; None where time bounds it.
        started: when it began, by the monotonic clock.
        used: tokens so far.
    """

    seconds: float | None
    tokens: int | None
    started: float = field(default_factory=time.monotonic)
    used: int = 0

    @property
    def share(self) -> float:
        """The share that is used, in [0, 1]."""
        if self.tokens is not None:
            return min(1.0, self.used / self.tokens)
        assert self.seconds is not None
        return min(1.0, (time.monotonic() - self.started) / self.seconds)


@dataclass
class Progress:
    """What a training has come to.

    Attributes:
        steps: how many steps were made.
        loss: a running mean of the objective, nats a token.
        checks: in order, the first before any step.
        best_state: the trained parameters at the best check.
        interrupted: whether it was stopped from outside.
    """

    steps: int = 0
    loss: float = math.nan
    checks: list[Check] = field(default_factory=list)
    best_state: Mapping[str, Tensor] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def best(self) -> Check:
        """The check with the fewest bits a byte."""
        return min(self.checks, key=lambda check: check.bits_per_byte)


class Trainer:
    """Trains a student on windows."""

    def __init__(self, student: Student, teacher: Teacher, output: Reader, options: HealOptions) -> None:
        self._student, self._teacher, self._output, self._options = student, teacher, output, options
        self._device = torch.device(options.device)
        groups = student.parameter_groups(options.learning_rate)
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self._peaks = [group["lr"] for group in groups]
        self._windows_at_once = _WINDOWS_AT_ONCE.get(self._device.type, 8)
        self._checkpointing = False

    def run(
        self,
        windows: Iterator[AlignedWindow],
        budget: Budget,
        check: Callable[[int], Check],
        stop: Callable[[], bool],
        bar: tqdm,
    ) -> Progress:
        """Train until the budget is used or ``stop`` says so, for one step at least.

        Args:
            windows: an endless supply.
            budget: how long.
            check: measures the student on held-out text, given the number of tokens so far.
            stop: asked after each step.
            bar: counts tokens.

        Raises:
            OmpError: not even one window fits in memory.
        """
        progress = Progress(checks=[check(0)], best_state=self._student.state())
        self._student.train()
        while progress.steps == 0 or budget.share < 1:
            batch = _take(windows, STEP_TOKENS)
            self._set_rate(progress.steps, budget.share)
            loss = self._step(batch)
            count = sum(len(window.output_ids) for window in batch)
            budget.used += count
            progress.steps += 1
            progress.loss = loss if progress.steps == 1 else 0.9 * progress.loss + 0.1 * loss
            bar.update(count)
            bar.set_postfix_str(f"loss {progress.loss:.3f}")
            progress.interrupted = stop()
            if progress.interrupted or budget.share >= len(progress.checks) / CHECKS:
                self._student.train(False)
                progress.checks.append(check(budget.used))
                self._student.train()
                if progress.best is progress.checks[-1]:
                    progress.best_state = self._student.state()
            if progress.interrupted:
                break
        self._student.train(False)
        return progress

    def _step(self, batch: Sequence[AlignedWindow]) -> float:
        """Make one step on a batch, in smaller parts where memory asks for it; returns the loss, nats a token."""
        while True:
            try:
                self._optimizer.zero_grad()
                total = self._accumulate(batch)
                break
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error) or not self._need_less():
                    raise
        torch.nn.utils.clip_grad_norm_(self._student.parameters(), CLIP)
        self._optimizer.step()
        return total

    def _accumulate(self, batch: Sequence[AlignedWindow]) -> float:
        count = sum(len(window.output_ids) for window in batch)
        loss = 0.0
        alike = sorted(batch, key=lambda window: len(window.output_ids))  # so that little is padded
        for start in range(0, len(batch), self._windows_at_once):
            part = alike[start : start + self._windows_at_once]
            logits = self._logits(part)
            gradient = torch.zeros_like(logits)
            for place, window in enumerate(part):
                size = len(window.output_ids)
                nats, its_gradient = self._objective(logits.detach()[place, :size], window)
                gradient[place, :size] = its_gradient.div_(count)
                loss += nats / count
            logits.backward(gradient)
        return loss

    def _logits(self, windows: Sequence[AlignedWindow]) -> Tensor:
        """Return the student's logits (N, T, V) before each of at most T tokens of N windows."""
        longest = max(len(window.output_ids) for window in windows)
        start = self._output.start_id
        ids = [[start, *window.output_ids[:-1]] + [start] * (longest - len(window.output_ids)) for window in windows]
        # No mask: in a causal model what stands behind a token does not change its logits.
        return self._student.logits(torch.tensor(ids, device=self._device))

    def _objective(self, logits: Tensor, window: AlignedWindow) -> tuple[float, Tensor]:
        if self._options.objective is Objective.NEXT_TOKEN:
            return next_token(logits, torch.tensor(window.output_ids, device=self._device))
        return cross_entropy(logits, self._teacher.targets(window))

    def _set_rate(self, step: int, share: float) -> None:
        """Warm up, then fall along half a cosine."""
        cosine = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * share))
        factor = min(1.0, (step + 1) / WARM_UP_STEPS) * cosine
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor

    def _need_less(self) -> bool:
        """Have the next attempt need less memory; False where nothing is left to try."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if self._windows_at_once > 1:
            self._windows_at_once //= 2
            LOG.info("The memory is used up: %d windows at a time from here on", self._windows_at_once)
        elif not self._checkpointing:
            self._checkpointing = True
            self._student.enable_checkpointing()
            LOG.info("The memory is used up: activations are computed twice from here on")
        else:
            return False
        return True


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _take(windows: Iterator[AlignedWindow], tokens: int) -> list[AlignedWindow]:
    """Take windows until they have enough tokens."""
    batch = [next(windows)]
    while sum(len(window.output_ids) for window in batch) < tokens:
        batch.append(next(windows))
    return batch
