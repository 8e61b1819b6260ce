"""Test the cache of sparse codes: entries are found by content, and do not change results."""

import errno
import fcntl
import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mergekit_omp.errors import OmpError
from mergekit_omp.solver import SparseCodes, cache, solve_omp


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Configure an empty cache that keeps even the smallest solve."""
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "codes"))
    monkeypatch.delenv(cache.SIZE_VARIABLE, raising=False)
    monkeypatch.setattr(cache, "MIN_CACHED_WORK", 0)
    return tmp_path / "codes"


@pytest.fixture
def solves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record k of every solve that is not read from the cache."""
    made: list[int] = []

    def counted(targets: torch.Tensor, atoms: torch.Tensor, k: int, **more: object) -> SparseCodes:
        made.append(k)
        return solve_omp(targets, atoms, k, **more)

    monkeypatch.setattr(cache, "solve_omp", counted)
    return made


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(20, 8, generator=generator), torch.randn(50, 8, generator=generator)


def assert_same(one: SparseCodes, other: SparseCodes) -> None:
    assert one.indices.dtype == other.indices.dtype == torch.int64
    assert torch.equal(one.indices, other.indices)
    assert torch.equal(one.coefficients, other.coefficients)
    assert torch.equal(one.relative_residuals, other.relative_residuals)


def test_second_solve_is_read(solves: list[int]) -> None:
    progress: list[int] = []
    first = cache.solve_with_cache(*problem(), 3)
    second = cache.solve_with_cache(*problem(), 3, progress=progress.append)
    assert solves == [3]
    assert progress == [20], "the bar is filled"
    assert_same(first, second)
    assert_same(first, solve_omp(*problem(), 3))


def test_everything_that_changes_the_codes_is_in_the_key(solves: list[int]) -> None:
    targets, atoms = problem()
    other = targets.clone()
    other[-1, -1] += 1e-3
    cache.solve_with_cache(targets, atoms, 3)
    for variant in (
        lambda: cache.solve_with_cache(targets, atoms, 4),
        lambda: cache.solve_with_cache(targets, atoms, 3, normalize_atoms=True),
        lambda: cache.solve_with_cache(other, atoms, 3),
        lambda: cache.solve_with_cache(targets, atoms.flip(0), 3),
        lambda: cache.solve_with_cache(targets[:-1], atoms, 3),
        lambda: cache.solve_with_cache(targets.double(), atoms.double(), 3),
    ):
        before = len(solves)
        variant()
        variant()
        assert len(solves) == before + 1


@pytest.mark.parametrize("off", ["off", "0", "", "OFF"])
def test_turned_off(monkeypatch: pytest.MonkeyPatch, folder: Path, solves: list[int], off: str) -> None:
    monkeypatch.setenv(cache.FOLDER_VARIABLE, off)
    cache.solve_with_cache(*problem(), 3)
    cache.solve_with_cache(*problem(), 3)
    assert solves == [3, 3]
    assert not folder.exists()


def test_small_solves_are_not_kept(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(folder))
    cache.solve_with_cache(*problem(), 3)
    assert not folder.exists()


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(cache.FOLDER_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "mergekit-omp" / "codes"
    monkeypatch.delenv("XDG_CACHE_HOME")
    if sys.platform == "linux":
        assert cache.cache_folder() == Path.home() / ".cache" / "mergekit-omp" / "codes"


@pytest.mark.parametrize(
    "damage", [b"", b"garbage", "truncate", "flipped bit", "other tensors", "indices out of range"]
)
def test_damaged_entry_is_solved_anew_and_replaced(folder: Path, solves: list[int], damage: bytes | str) -> None:
    first = cache.solve_with_cache(*problem(), 3)
    [entry] = folder.iterdir()
    if isinstance(damage, bytes):
        entry.write_bytes(damage)
    elif damage == "truncate":
        entry.write_bytes(entry.read_bytes()[:-10])
    elif damage == "flipped bit":
        data = bytearray(entry.read_bytes())
        data[-100] ^= 4  # in the coefficients
        entry.write_bytes(data)
    elif damage == "other tensors":
        cache.save_file({"indices": torch.zeros(1)}, entry)
    else:
        cache._write(entry, SparseCodes(first.indices + 50, first.coefficients, first.relative_residuals))
    assert_same(cache.solve_with_cache(*problem(), 3), first)
    assert solves == [3, 3]
    assert_same(cache.solve_with_cache(*problem(), 3), first)
    assert solves == [3, 3], "the damaged entry was replaced"


def test_size_is_bounded_and_the_least_recently_used_goes_first(
    monkeypatch: pytest.MonkeyPatch, folder: Path, solves: list[int]
) -> None:
    for seed in range(3):
        cache.solve_with_cache(*problem(seed), 3)
    size = cache.cache_size(folder) // 3
    for age, entry in enumerate(sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(entry, (1000 + age, 1000 + age))
    cache.solve_with_cache(*problem(0), 3)  # the oldest is used again
    monkeypatch.setenv(cache.SIZE_VARIABLE, str(size * 3 + 10))
    cache.solve_with_cache(*problem(3), 3)
    assert cache.cache_size(folder) <= size * 3 + 10
    before = len(solves)
    cache.solve_with_cache(*problem(0), 3)
    cache.solve_with_cache(*problem(3), 3)
    assert len(solves) == before, "recently used ones are kept"
    cache.solve_with_cache(*problem(1), 3)
    assert len(solves) == before + 1, "the least recently used one went"


def test_other_files_in_the_folder_are_left_alone(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_text("x" * 10_000)
    monkeypatch.setenv(cache.SIZE_VARIABLE, "1")
    cache.solve_with_cache(*problem(), 3)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("100", 100), ("1.5K", 1500), ("500M", 5 * 10**8), ("4G", 4 * 10**9), ("4gb", 4 * 10**9), (" 8 GiB", 2**33)],
)
def test_size_variable(monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    monkeypatch.setenv(cache.SIZE_VARIABLE, text)
    assert cache.cache_limit() == size


def test_invalid_size_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.SIZE_VARIABLE, "plenty")
    with pytest.raises(
        OmpError,
        match=r"^MERGEKIT_OMP_CACHE_SIZE: 'plenty' is not a size; write a number of bytes such as 500M or 4G\.$",
    ):
        cache.solve_with_cache(*problem(), 3)


def test_folder_that_cannot_be_written(folder: Path, caplog: pytest.LogCaptureFixture, solves: list[int]) -> None:
    folder.write_text("a file")
    assert_same(cache.solve_with_cache(*problem(), 3), solve_omp(*problem(), 3))
    assert "Cannot cache sparse codes" in caplog.text


def test_full_disk(monkeypatch: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    assert_same(cache.solve_with_cache(*problem(), 3), solve_omp(*problem(), 3))
    assert "No space left on device" in caplog.text
    assert not list(folder.iterdir()), "no draft is left"


def test_runs_with_the_same_solve_at_once_make_it_once(
    monkeypatch: pytest.MonkeyPatch, folder: Path, solves: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    waiting = threading.Event()
    counted = cache.solve_omp

    def slow(*problem: torch.Tensor, **more: object) -> SparseCodes:
        """Solve when the other run waits for this one."""
        assert waiting.wait(60)
        return counted(*problem, **more)

    flock = fcntl.flock

    def noticed(file: object, operation: int) -> None:
        if operation == fcntl.LOCK_EX:
            waiting.set()
        flock(file, operation)

    monkeypatch.setattr(cache, "solve_omp", slow)
    monkeypatch.setattr(fcntl, "flock", noticed)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: cache.solve_with_cache(*problem(), 3, name="the donor's rows"), range(2))
    assert solves == [3]
    assert_same(one, other)
    assert caplog.text.count("Waiting for the sparse codes of the donor's rows, which another run makes") == 1
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"], "no lock is left"


def test_a_run_that_fails_lets_the_next_one_solve(
    monkeypatch: pytest.MonkeyPatch, folder: Path, solves: list[int]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(cache, "solve_omp", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache.solve_with_cache(*problem(), 3)
    assert not list(folder.iterdir())
    cache.solve_with_cache(*problem(), 3)
    assert solves == [3]


def test_a_lock_file_of_a_killed_run_does_no_harm(folder: Path, solves: list[int]) -> None:
    cache.solve_with_cache(*problem(), 3)
    [entry] = folder.iterdir()
    entry.rename(entry.with_suffix(".lock"))
    cache.solve_with_cache(*problem(), 3)
    assert solves == [3, 3]
    assert list(folder.iterdir()) == [entry]


def test_a_file_system_without_locks(monkeypatch: pytest.MonkeyPatch, folder: Path, solves: list[int]) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without)
    first = cache.solve_with_cache(*problem(), 3)
    assert_same(cache.solve_with_cache(*problem(), 3), first)
    assert solves == [3], "the cache works without them"
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"]


def test_many_runs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check results of concurrent runs that read, write and evict the same entries."""
    expected = [solve_omp(*problem(seed), 3) for seed in range(4)]
    monkeypatch.setenv(cache.SIZE_VARIABLE, "5K")
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: cache.solve_with_cache(*problem(n % 4), 3), range(64)))
    for n, codes in enumerate(results):
        assert_same(codes, expected[n % 4])
