"""Cache the sparse codes of large solves on disk, so that a second run or a second model needs no second solve.

The key of an entry is a hash of the targets, the atoms and the parameters of the solve, so that entries never become
wrong. Where the cache cannot be read or written, the solve runs without it.

Two environment variables configure it. ``MERGEKIT_OMP_CACHE`` is its folder, or ``off``; the default is the folder
``codes`` in the platform's cache folder of mergekit-omp: under ``XDG_CACHE_HOME``, else ``~/.cache``, on Linux.
``MERGEKIT_OMP_CACHE_SIZE`` is its maximum size, such as ``500M`` or ``4G`` (the default); the least recently used
entries are removed first.
"""

import contextlib
import hashlib
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import platformdirs
import torch
from pydantic import ByteSize, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_omp.errors import OmpError
from mergekit_omp.solver import SparseCodes, solve_omp

LOG = logging.getLogger(__name__)

FOLDER_VARIABLE = "MERGEKIT_OMP_CACHE"
SIZE_VARIABLE = "MERGEKIT_OMP_CACHE_SIZE"

WORTH_KEEPING = 2**35
"""Multiplications from which on a solve is cached: about a second on a laptop."""

_FORMAT = 2  # counts changes of what is stored, and of what the solver selects
_OFF = {"", "0", "off", "no", "false", "none"}
_SUFFIX = ".safetensors"
_ENTRY_NAME = re.compile(r"[0-9a-f]{64}\.")  # of drafts too


def solve_with_cache(
    targets: Tensor, atoms: Tensor, k: int, *, normalize_atoms: bool = False, **how: Any
) -> SparseCodes:
    """Return what :func:`mergekit_omp.solver.solve_omp` returns, from the cache where it is there.

    Args:
        targets: float [B, d], as for ``solve_omp``.
        atoms: float [N, d].
        k: sparsity.
        normalize_atoms: select atoms by the cosine with the residual.
        how: arguments of ``solve_omp`` that change how it runs and not what it returns.

    Raises:
        OmpError: as ``solve_omp`` does, and for an invalid environment variable.
    """
    folder = cache_folder()
    if folder is None or len(targets) * len(atoms) * targets.shape[1] * min(k, len(atoms)) < WORTH_KEEPING:
        return solve_omp(targets, atoms, k, normalize_atoms=normalize_atoms, **how)
    limit = cache_limit()
    path = folder / f"{_key(targets, atoms, k, normalize_atoms)}{_SUFFIX}"
    codes = _read(path, len(targets), min(k, len(atoms)), len(atoms))
    if codes is not None:
        LOG.info("Sparse codes of %s are read from %s", how.get("name", "the donor"), path)
        if "progress" in how:
            how["progress"](len(targets))
        return codes
    codes = solve_omp(targets, atoms, k, normalize_atoms=normalize_atoms, **how)
    _write(path, codes)
    _shrink(folder, limit)
    return codes


def cache_folder() -> Path | None:
    """Return the folder of the cache; None where it is off."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen is not None:
        return None if chosen.strip().lower() in _OFF else Path(chosen).expanduser()
    return platformdirs.user_cache_path("mergekit-omp", appauthor=False) / "codes"


def cache_limit() -> int:
    """Return the maximum size of the cache in bytes.

    Raises:
        OmpError: the environment variable is not a size.
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
        digest.update(repr((str(rows.dtype), tuple(rows.shape))).encode())
        digest.update(rows.detach().cpu().contiguous().view(torch.uint8).numpy().data.cast("B"))
    return digest.hexdigest()


def _read(path: Path, n_targets: int, k: int, n_atoms: int) -> SparseCodes | None:
    """Read an entry; None where there is none, or it is damaged, so that a new solve replaces it."""
    if not path.exists():
        return None
    try:
        stored = load_file(path)
        codes = SparseCodes(stored["indices"].long(), stored["coefficients"], stored["relative_residuals"])
        os.utime(path)  # for _shrink
    except (OSError, SafetensorError, KeyError) as error:
        LOG.warning("%s is not used: %s", path, error)
        return None
    indices = codes.indices
    fits = indices.shape == codes.coefficients.shape == (n_targets, k) and codes.relative_residuals.shape == (
        n_targets,
    )
    if not fits or bool((indices < -1).any()) or bool((indices >= n_atoms).any()):
        LOG.warning("%s is not used: it does not fit the problem", path)
        return None
    return codes


def _write(path: Path, codes: SparseCodes) -> None:
    """Write an entry atomically: other processes may be writing the same one."""
    tensors = {
        "indices": codes.indices.int().contiguous(),
        "coefficients": codes.coefficients.contiguous(),
        "relative_residuals": codes.relative_residuals.contiguous(),
    }
    draft = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.")
        os.close(handle)
        save_file(tensors, draft)
        os.replace(draft, path)
    except (OSError, SafetensorError) as error:
        LOG.warning("Sparse codes cannot be cached in %s: %s", path.parent, error)
        if draft:
            with contextlib.suppress(OSError):
                os.unlink(draft)


def _shrink(folder: Path, limit: int) -> None:
    """Remove least recently used entries, and drafts of killed runs, until the size is within the limit."""
    entries = sorted(_entries(folder))
    excess = sum(size for _, size, _ in entries) - limit
    for _, size, path in entries:
        if excess <= 0:
            return
        with contextlib.suppress(OSError):  # another process may have removed it
            path.unlink()
        excess -= size


def _entries(folder: Path) -> list[tuple[float, int, Path]]:
    """List time of last use, size and path of every entry and draft; other files in the folder are left alone."""
    entries = []
    for path in folder.glob("*"):
        if not _ENTRY_NAME.match(path.name):
            continue
        with contextlib.suppress(OSError):
            status = path.stat()
            entries.append((status.st_mtime, status.st_size, path))
    return entries
