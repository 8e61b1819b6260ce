"""Read how much memory the control groups of this process leave it: containers and Slurm jobs limit it so (Linux)."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class Files(NamedTuple):
    """Names of the files of a control group, and of the counters of memory that the kernel can take back."""

    limit: str
    used: str
    reclaimable: tuple[str, str]


FILES = {
    "": Files("memory.max", "memory.current", ("active_file", "inactive_file")),
    "memory": Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
}
"""By the controller that ``/proc/self/cgroup`` names, which is also the folder: none in version 2."""


def free_in_control_groups(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Yield the free memory of each control group of this process that limits it, in bytes.

    Args:
        groups: file with the control groups of the process.
        root: folder at which control groups are mounted.
    """
    lines = groups.read_text().splitlines() if groups.exists() else []
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        for controller in set(controllers.split(",")) & FILES.keys():
            top = root / controller
            group = top / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder == top.parent:
                    break
                with suppress(OSError, ValueError):  # "max", or a group that is not mounted in this container
                    yield _free(folder, FILES[controller])


def _free(folder: Path, files: Files) -> int:
    counters = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    reclaimable = sum(int(counters.get(name, 0)) for name in files.reclaimable)
    return int((folder / files.limit).read_text()) - int((folder / files.used).read_text()) + reclaimable
