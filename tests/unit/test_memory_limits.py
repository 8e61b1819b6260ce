"""Test that a solve uses no more memory than the container or the job that it runs in has."""

from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch

from mergekit_omp.solver import memory
from mergekit_omp.solver.control_groups import free_in_control_groups

GB = 10**9
STAT = "anon 3000000000\nactive_file 500000000\ninactive_file 1500000000"


def group(folder: Path, limit: object, used: int, stat: str = STAT, *, version: int = 2) -> None:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip((*names, "memory.stat"), (limit, used, stat), strict=True):
        (folder / name).write_text(f"{content}\n")


def free(tmp_path: Path, groups: str) -> list[int]:
    (tmp_path / "cgroup").write_text(groups)
    return list(free_in_control_groups(tmp_path / "cgroup", tmp_path))


def test_a_job_of_slurm(tmp_path: Path) -> None:
    """Read the limit of the job, above that of its step, which has none; files in memory can be dropped."""
    job = tmp_path / "system.slice/slurmstepd.scope/job_7"
    group(job, 24 * GB, 5 * GB)
    group(job / "step_batch/user/task_0", "max", 5 * GB)
    assert free(tmp_path, "0::/system.slice/slurmstepd.scope/job_7/step_batch/user/task_0\n") == [21 * GB]


def test_a_container(tmp_path: Path) -> None:
    """Read the limit where the group is mounted, whatever its name is outside."""
    group(tmp_path, 8 * GB, 5 * GB)
    assert free(tmp_path, "0::/\n") == [5 * GB]
    assert free(tmp_path, "0::/docker/0123456789ab\n") == [5 * GB]


def test_version_1(tmp_path: Path) -> None:
    stat = "inactive_file 7\ntotal_active_file 500000000\ntotal_inactive_file 1500000000"
    group(tmp_path / "memory/slurm/job_7", 24 * GB, 5 * GB, stat, version=1)
    group(tmp_path / "memory", 2**63 - 4096, 90 * GB, stat, version=1)
    lines = "11:cpuset:/\n4:memory:/slurm/job_7\n3:cpu,cpuacct:/slurm/job_7\n0::/\n"
    assert min(free(tmp_path, lines)) == 21 * GB


def test_no_control_groups(tmp_path: Path) -> None:
    assert free(tmp_path, "0::/\n") == []
    assert list(free_in_control_groups(tmp_path / "missing", tmp_path)) == []


@pytest.mark.parametrize(("of_groups", "expected"), [([], 50), ([80, 70], 50), ([80, 20], 20)])
def test_the_least_counts(monkeypatch: pytest.MonkeyPatch, of_groups: list[int], expected: int) -> None:
    machine = namedtuple("svmem", "available")(50)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(memory, "free_in_control_groups", lambda: of_groups)
    assert memory.budget_on(torch.device("cpu"), None) == int(expected * memory.SHARE_OF_FREE)
