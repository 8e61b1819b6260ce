"""Run commands with a limit of memory, where the kernel ends or refuses what takes more (Linux).

A limit is the beginning of a command line: the command that follows runs under it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path

from mergekit_omp.solver.control_groups import FILES

Limit = Callable[[int], AbstractContextManager[tuple[str, ...]]]
SWAP = {"memory.max": "memory.swap.max", "memory.limit_in_bytes": "memory.memsw.limit_in_bytes"}
"""The file that limits swap, or memory and swap together, by the one that limits memory."""


@contextmanager
def control_group(size: int) -> Iterator[tuple[str, ...]]:
    """Make a control group below that of this process, with so many bytes of memory and no swap.

    It counts what the processes in it have touched, and files that they have read or written, whose memory the kernel
    takes back when it is short. A process that needs more is killed.

    Raises:
        OSError: control groups of this process cannot be made here, which takes root's rights.
    """
    group, limit = _new_group()
    try:
        for file, value in ((limit, size), (SWAP[limit], 0 if limit == "memory.max" else size)):
            if (group / file).exists():  # a kernel may not count swap
                (group / file).write_text(str(value))
        yield "sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group)
    finally:
        group.rmdir()


@contextmanager
def data_limit(size: int) -> Iterator[tuple[str, ...]]:
    """Limit the memory that a process may write to (RLIMIT_DATA), touched or not; more is refused to it."""
    yield "sh", "-c", f'ulimit -d {size // 1024} && exec "$@"', "sh"


@cache
def can_make_groups() -> bool:
    """Tell whether control groups with a limit of memory can be made here."""
    try:
        group, _ = _new_group()
    except OSError:
        return False
    group.rmdir()
    return True


def _new_group(root: Path = Path("/sys/fs/cgroup")) -> tuple[Path, str]:
    """Make a control group without a limit; return its folder, and the name of the file for the limit."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        controllers, path = line.split(":", 2)[1:]
        for controller in set(controllers.split(",")) & FILES.keys():
            group = root / controller / path.lstrip("/") / f"mergekit-omp-{os.getpid()}"
            group.mkdir()
            if (group / FILES[controller].limit).exists():
                return group, FILES[controller].limit
            group.rmdir()
    raise OSError("no controller of memory")
