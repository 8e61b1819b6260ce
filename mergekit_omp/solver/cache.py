"""Codes that took long to find are kept on disk, so that a re-run or a second model costs no second solve.

An entry is found by the content of what was solved: targets, atoms and parameters. So it is right whatever folder the
donor came from, and there is nothing to invalidate. The cache can only save time: where it cannot be read or written,
the solve runs as without it.

Two environment variables set it: ``MERGEKIT_OMP_CACHE`` is its folder, or ``off``; the default is
``mergekit-omp/codes`` under ``XDG_CACHE_HOME``, else under ``~/.cache``. ``MERGEKIT_OMP_CACHE_SIZE`` is the most that
it may hold, such as ``500M`` or ``4G`` (the default); the entries that were not used for longest go first.
"""

import contextlib
import hashlib
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_omp.errors import OmpError
from mergekit_omp.solver import SparseCodes, solve_omp

LOG = logging.getLogger(__name__)

FOLDER_VARIABLE = "MERGEKIT_OMP_CACHE"
SIZE_VARIABLE = "MERGEKIT_OMP_CACHE_SIZE"

WORTH_KEEPING = 2**35
"""Multiplications from which on a solve is looked up and kept: a second or so of a laptop."""

_FORMAT = 1  # counts changes of what is stored, and of the solver's choices
_OFF = {"", "0", "off", "no", "false", "none"}
_SUFFIX = ".safetensors"
_OURS = re.compile(r"[0-9a-f]{64}\.")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def solve_with_cache(
    targets: Tensor, atoms: Tensor, k: int, *, normalize_atoms: bool = False, **how: Any
) -> SparseCodes:
    """:func:`mergekit_omp.solver.solve_omp`, or what it once returned for the same arguments.

    ``how`` is for arguments that change how the solve runs and not what it finds.

    Raises:
        OmpError: as ``solve_omp`` does, and where an environment variable cannot be understood.
    """
    choices = {"normalize_atoms": normalize_atoms}
    folder = cache_folder()
    if folder is None or len(targets) * len(atoms) * targets.shape[1] * min(k, len(atoms)) < WORTH_KEEPING:
        return solve_omp(targets, atoms, k, **choices, **how)
    limit = cache_limit()
    path = folder / f"{_key(targets, atoms, k, choices)}{_SUFFIX}"
    codes = _read(path, len(targets), min(k, len(atoms)), len(atoms))
    if codes is not None:
        LOG.info("The codes of %s were solved before; they come from %s", how.get("name", "the donor"), path)
        if "progress" in how:
            how["progress"](len(targets))
        return codes
    codes = solve_omp(targets, atoms, k, **choices, **how)
    _write(path, codes)
    _shrink(folder, limit)
    return codes


def cache_folder() -> Path | None:
    """Where codes are kept; None where the cache is turned off."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen is not None:
        return None if chosen.strip().lower() in _OFF else Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mergekit-omp" / "codes"


def cache_limit() -> int:
    """The most bytes that the cache may hold."""
    text = os.environ.get(SIZE_VARIABLE, "4G")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if match is None:
        raise OmpError(f"{SIZE_VARIABLE}: {text!r} is no size; write a number of bytes such as 500M or 4G.")
    return int(float(match.group(1)) * _UNITS[match.group(2)])


def cache_size(folder: Path) -> int:
    """The bytes that the cache holds."""
    return sum(size for _, size, _ in _entries(folder))


def _key(targets: Tensor, atoms: Tensor, k: int, choices: dict[str, Any]) -> str:
    digest = hashlib.sha256(repr((_FORMAT, k, choices)).encode())
    for rows in (targets, atoms):
        digest.update(repr((str(rows.dtype), tuple(rows.shape))).encode())
        digest.update(memoryview(rows.detach().cpu().contiguous().view(torch.uint8).numpy()).cast("B"))
    return digest.hexdigest()


def _read(path: Path, n_targets: int, k: int, n_atoms: int) -> SparseCodes | None:
    """A stored result; None where there is none, or one that is damaged, which a new solve then replaces."""
    if not path.exists():
        return None
    try:
        stored = load_file(path)
        codes = SparseCodes(stored["indices"].long(), stored["coefficients"], stored["relative_residuals"])
        os.utime(path)  # used now
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
    """Store a result whole or not at all, whoever else is writing it."""
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
        LOG.warning("The codes could not be kept in %s: %s", path.parent, error)
        if draft:
            with contextlib.suppress(OSError):
                os.unlink(draft)


def _shrink(folder: Path, limit: int) -> None:
    """Remove the entries, and the drafts of killed runs, that were not used for longest until the rest fits."""
    entries = sorted(_entries(folder))
    excess = sum(size for _, size, _ in entries) - limit
    for _, size, path in entries:
        if excess <= 0:
            return
        with contextlib.suppress(OSError):  # another run may have been faster
            path.unlink()
        excess -= size


def _entries(folder: Path) -> list[tuple[float, int, Path]]:
    """Time of last use, size and path of every entry and draft; other files in the folder are none of ours."""
    entries = []
    for path in folder.glob("*"):
        if not _OURS.match(path.name):
            continue
        with contextlib.suppress(OSError):
            state = path.stat()
            entries.append((state.st_mtime, state.st_size, path))
    return entries
