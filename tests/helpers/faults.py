"""Run commands in forked processes, and disturb them at moments that can be repeated exactly.

A server process imports everything once and forks a child for each run, so that a run takes about a second. The child
counts its operations on the files of a run with an audit hook, and can be disturbed at any one of them.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CalledProcessError
from subprocess import run as run_program
from typing import Any

from mergekit_omp.solver import cache

PRELOADED = [
    "mergekit.scripts.multimerge",
    "mergekit.scripts.run_yaml",
    "mergekit_omp.cli.main",
    "mergekit_omp.healing.heal",
    "mergekit_omp.output.config",
    "mergekit_omp.recipe.resolve",
    "mergekit_omp.report.heal_summary",
    "pytest",
    "transformers.models.auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral",
]
OPERATIONS = {
    "open",
    "os.chmod",
    "os.listdir",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.scandir",
    "os.utime",
    "shutil.copyfile",
    "shutil.rmtree",
    "tempfile.mkstemp",
}
AWAY = ".away"
SECONDS = 300


@dataclass(frozen=True)
class Strike:
    """What happens to a process just before its n-th operation on watched files; the first is number 1.

    Attributes:
        operation: n.
        signal: is sent to the process.
        vanishes: a file or folder that is renamed.
        clock: seconds that ``time.time`` jumps by.
    """

    operation: int
    signal: int | None = None
    vanishes: Path | None = None
    clock: float | None = None

    def happen(self) -> None:
        if self.signal is not None:
            os.kill(os.getpid(), self.signal)
        if self.vanishes is not None:
            self.vanishes.rename(f"{self.vanishes}{AWAY}")
        if self.clock is not None:
            before, jump = time.time, self.clock
            time.time = lambda: before() + jump


@dataclass(frozen=True)
class Call:
    """A command line, and where it runs.

    Attributes:
        program: the name of a console script.
        arguments: of the command.
        log: a file that standard output and standard error are written to.
        watched: folders whose files count.
        cache_folder: the folder of the cache, which keeps every solve.
        strike: what disturbs it.
    """

    program: str
    arguments: tuple[str, ...]
    log: Path
    watched: tuple[Path, ...]
    cache_folder: Path
    strike: Strike | None = None

    @property
    def operations_file(self) -> Path:
        """The file that a child writes its number of operations to when it ends by itself."""
        return self.log.with_suffix(".operations")


@dataclass
class Run:
    """A running command."""

    call: Call
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.process: BaseProcess = context.Process(target=_child, args=(self.call,))
        self.process.start()

    def finish(self) -> int:
        """Wait for its exit status, which is negative where a signal ended it."""
        self.process.join(timeout=SECONDS)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"{self.call} does not end")
        return self.process.exitcode

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.process.is_alive():
            os.kill(self.process.pid, number)


def _child(call: Call) -> None:
    log = os.open(call.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.environ[cache.FOLDER_VARIABLE] = str(call.cache_folder)
    cache.MIN_CACHED_WORK = 0
    [script] = metadata.entry_points(group="console_scripts", name=call.program)
    command: Callable[..., Any] = script.load()
    done = _count_operations(tuple(map(str, call.watched)), call.strike)
    try:
        command(call.arguments)
    finally:
        call.operations_file.write_text(str(done()))


def _count_operations(watched: tuple[str, ...], strike: Strike | None) -> Callable[[], int]:
    """Count operations on files in the folders; have one of them disturbed. Return a function for the number."""
    numbers, last = count(1), [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in OPERATIONS or not str(arguments[0]).startswith(watched):
            return
        last[0] = number = next(numbers)
        if strike is not None and number == strike.operation:
            strike.happen()

    sys.addaudithook(hook)
    return lambda: last[0]


def can_mount(folder: Path) -> bool:
    """Tell whether file systems can be mounted here, which takes root's rights."""
    try:
        with small_disk(folder, 4096):
            return True
    except (OSError, CalledProcessError):
        return False


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """Mount a file system of so many bytes at an existing folder; yield a function that changes its size."""
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    try:
        yield lambda size: _mount("-o", f"remount,size={size}", folder)
    finally:
        run_program(["umount", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder read-only, even for root."""
    _mount("--bind", folder, folder)
    try:
        _mount("-o", "remount,bind,ro", folder)
        yield
    finally:
        run_program(["umount", str(folder)], check=True)


def _mount(*arguments: str | Path) -> None:
    run_program(["mount", *map(str, arguments)], check=True, capture_output=True)
