"""Cache the sparse codes of large solves on disk, for later runs and for other models with the same vocabulary.

The key of an entry is a hash of the targets, the atoms and the parameters of the solve, so entries never become stale.
Runs that need the same entry at the same time make it once: the others wait for the first, on other machines too where
the file system has locks. Where the cache cannot be read, written or locked, the solve runs without it.

Two environment variables configure it. ``MERGEKIT_OMP_CACHE`` is its folder, or ``off``; the default is the folder
``codes`` in the platform's cache folder of mergekit-omp: under ``XDG_CACHE_HOME``, else ``~/.cache``, on Linux.
``MERGEKIT_OMP_CACHE_SIZE`` is its maximum size, such as ``500M`` or ``4G`` (the default). The least recently used
entries are removed first.
"""

import contextlib
import hashlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import platformdirs
import torch
from pydantic import ByteSize, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_omp.errors import OmpError
from mergekit_omp.solver import SparseCodes, solve_omp

if sys.platform != "win32":
    import fcntl

LOG = logging.getLogger(__name__)

FOLDER_VARIABLE = "MERGEKIT_OMP_CACHE"
SIZE_VARIABLE = "MERGEKIT_OMP_CACHE_SIZE"

MIN_CACHED_WORK = 2**35
"""Number of multiplications above which a solve is cached: about a second on a laptop."""

_FORMAT = 3  # increase whenever the stored format or the solver's selection changes
_OFF = {"", "0", "off", "no", "false", "none"}
_SUFFIX = ".safetensors"
_CHECKSUM = "sha256"
_ENTRY_NAME = re.compile(r"[0-9a-f]{64}\.")  # matches temporary files too


def solve_with_cache(
    targets: Tensor, atoms: Tensor, k: int, *, normalize_atoms: bool = False, **options: Any
) -> SparseCodes:
    """Run :func:`mergekit_omp.solver.solve_omp`, or read its result from the cache.

    Args:
        targets: (B, d) of any floating dtype, as for ``solve_omp``.
        atoms: (N, d) of any floating dtype.
        k: sparsity.
        normalize_atoms: select atoms by the cosine with the residual.
        options: further arguments of ``solve_omp``, which change how it runs but not its result.

    Returns:
        The sparse codes, as ``solve_omp`` returns them.

    Raises:
        OmpError: as ``solve_omp``, or if an environment variable is invalid.
    """
    folder = cache_folder()
    if folder is None or len(targets) * len(atoms) * targets.shape[1] * min(k, len(atoms)) < MIN_CACHED_WORK:
        return solve_omp(targets, atoms, k, normalize_atoms=normalize_atoms, **options)
    limit = cache_limit()
    path = folder / f"{_key(targets, atoms, k, normalize_atoms)}{_SUFFIX}"
    name = options.get("name", "the donor")
    with _locked(path, name):
        codes = _read(path, len(targets), min(k, len(atoms)), len(atoms))
        if codes is not None:
            LOG.info("Read the sparse codes of %s from %s", name, path)
            if "progress" in options:
                options["progress"](len(targets))
            return codes
        codes = solve_omp(targets, atoms, k, normalize_atoms=normalize_atoms, **options)
        _write(path, codes)
        _shrink(folder, limit)
        return codes


def cache_folder() -> Path | None:
    """Return the folder of the cache, or None if it is off."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen is not None:
        return None if chosen.strip().lower() in _OFF else Path(chosen).expanduser()
    return platformdirs.user_cache_path("mergekit-omp", appauthor=False) / "codes"


def cache_limit() -> int:
    """Return the maximum size of the cache in bytes.

    Raises:
        OmpError: if the environment variable is not a size.
    """
    text = os.environ.get(SIZE_VARIABLE, "4G")
    try:
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        raise OmpError(
            f"{SIZE_VARIABLE}: {text!r} is not a size; write a number of bytes such as 500M or 4G."
        ) from None


def cache_size(folder: Path) -> int:
    """Return the size of the cache in bytes."""
    return sum(size for _, size, _ in _entries(folder))


def _key(targets: Tensor, atoms: Tensor, k: int, normalize_atoms: bool) -> str:
    digest = hashlib.sha256(repr((_FORMAT, k, normalize_atoms)).encode())
    for rows in (targets, atoms):
        _add(digest, rows)
    return digest.hexdigest()


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        _add(digest, tensors[name])
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", tensor: Tensor) -> None:
    digest.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode())
    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data.cast("B"))


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Wait until no other run makes a missing entry; do not wait where it cannot be locked.

    The system releases the lock of a run that is killed. A lock file that is left is used and removed by the next run.
    """
    with contextlib.ExitStack() as stack:
        if sys.platform != "win32" and not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(path.with_suffix(".lock").open("a"))
                stack.callback(_remove, lock.name)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    LOG.info("Waiting for the sparse codes of %s, which another run makes (%s)", name, lock.name)
                    fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                LOG.debug("Not waiting for other runs with the same solve: %s", error)
        yield


def _read(path: Path, n_targets: int, k: int, n_atoms: int) -> SparseCodes | None:
    """Read an entry; return None if it is missing or damaged, so that a new solve replaces it."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as entry:
            stored = {name: entry.get_tensor(name) for name in entry.keys()}  # noqa: SIM118, no mapping
            checksum = (entry.metadata() or {}).get(_CHECKSUM)
        os.utime(path)  # marks the entry as recently used
    except (OSError, SafetensorError) as error:
        LOG.warning("Ignored the cache entry %s: %s", path, error)
        return None
    if checksum != _checksum(stored):
        LOG.warning("Ignored the cache entry %s: it has changed since it was written", path)
        return None
    codes = SparseCodes(stored["indices"].long(), stored["coefficients"], stored["relative_residuals"])
    indices = codes.indices
    fits = indices.shape == codes.coefficients.shape == (n_targets, k) and codes.relative_residuals.shape == (
        n_targets,
    )
    if not fits or bool((indices < -1).any()) or bool((indices >= n_atoms).any()):
        LOG.warning("Ignored the cache entry %s: it does not fit the problem", path)
        return None
    return codes


def _write(path: Path, codes: SparseCodes) -> None:
    """Write an entry atomically: another process may write the same one."""
    tensors = {
        "indices": codes.indices.int().contiguous(),
        "coefficients": codes.coefficients.contiguous(),
        "relative_residuals": codes.relative_residuals.contiguous(),
    }
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.")
        os.close(handle)
        save_file(tensors, temporary, {_CHECKSUM: _checksum(tensors)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        LOG.warning("Cannot cache sparse codes in %s: %s", path.parent, error)
        if temporary:
            _remove(temporary)


def _remove(path: str | Path) -> None:
    with contextlib.suppress(OSError):  # another process may have removed it
        os.unlink(path)


def _shrink(folder: Path, limit: int) -> None:
    """Remove least recently used entries, and temporary files of killed runs, until the size is within the limit."""
    entries = sorted(_entries(folder))
    excess = sum(size for _, size, _ in entries) - limit
    for _, size, path in entries:
        if excess <= 0:
            return
        _remove(path)
        excess -= size


def _entries(folder: Path) -> list[tuple[float, int, Path]]:
    """List the time of last use, size and path of every entry and temporary file, and of no other file."""
    entries = []
    for path in folder.glob("*"):
        if not _ENTRY_NAME.match(path.name):
            continue
        with contextlib.suppress(OSError):
            status = path.stat()
            entries.append((status.st_mtime, status.st_size, path))
    return entries
