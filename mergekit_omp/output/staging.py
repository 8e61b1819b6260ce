"""Stage an output folder: publish it under its name only when it is complete."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mergekit_omp.checkpoints.files import has_complete_weights
from mergekit_omp.errors import UNFINISHED, OmpError, explanation, first_line

LOG = logging.getLogger(__name__)


@contextmanager
def staged(out_path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a folder for a model, which becomes ``out_path`` when the block ends without an exception.

    Until then all files are in ``<out_path>.unfinished``. A failed run removes that folder unless its weights are
    complete, and the next run replaces it.

    Raises:
        WeightsAreKeptError: if the block fails after the weights were written.
        OmpError: if ``out_path`` is not empty, cannot be written, or is being written by another run.
    """
    final = Path(os.path.realpath(out_path))
    _check_free(final)
    with _locked(final.with_name(final.name + UNFINISHED), final) as staging:
        folder = staging / final.name  # the folder's name is the title of the model card
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with _keeping_weights(folder, final):
            yield folder
            _check_free(final)
            if final.exists():
                final.rmdir()
            os.rename(folder, final)


class WeightsAreKeptError(OmpError):
    """Raised if a run fails after its weights were written; the message names their folder."""


@contextmanager
def _keeping_weights(folder: Path, final: Path) -> Iterator[None]:
    """Keep complete weights, which may have taken hours, if the block fails."""
    try:
        yield
    except Exception as error:
        if not has_complete_weights(folder):
            raise
        reason = explanation(error, final)
        if reason is None:
            LOG.error("The run failed after its weights were written", exc_info=error)
            reason = f"The run failed after its weights were written ({type(error).__name__}: {first_line(error)})."
        raise WeightsAreKeptError(
            f"{reason} The weights are complete and kept in {folder}; other files may be missing there. "
            "The next run with the same output folder replaces them."
        ) from error


@contextmanager
def _locked(staging: Path, final: Path) -> Iterator[Path]:
    """Lock the staging folder for one run, and remove it afterwards unless it contains complete weights."""
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = FileLock(staging / "lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OmpError(f"{final} is being written by another run; wait for it or name another folder.") from error
    except OSError as error:
        raise OmpError(
            f"{final}: the output folder cannot be created ({error.strerror}); name another one."
        ) from error
    try:
        if not os.path.exists(lock.lock_file):  # another run has just finished and removed it
            raise OmpError(f"{final} was being written by another run until now; check it or name another folder.")
        yield staging
    except WeightsAreKeptError:
        os.unlink(lock.lock_file)
        raise
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)  # under the lock, so that no other run uses the folder
        raise
    else:
        shutil.rmtree(staging, ignore_errors=True)
    finally:
        lock.release()


def _check_free(final: Path) -> None:
    if not final.exists():
        return
    if not final.is_dir():
        raise OmpError(f"{final} is a file; name a folder that is new or empty.")
    if os.path.ismount(final):
        raise OmpError(f"{final} is a mount point, which a folder cannot replace; name a folder in it.")
    present = sorted(path.name for path in final.iterdir())
    if present:
        raise OmpError(
            f"{final} is not empty (it contains {', '.join(present[:3])}{', …' if len(present) > 3 else ''}), "
            "and existing files are never replaced; name a new folder or empty this one."
        )
