"""Stage an output folder: it appears under its name when it is whole, and never before."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mergekit_omp.errors import OmpError

UNFINISHED = ".unfinished"


@contextmanager
def staged(out_path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write a model to, which becomes ``out_path`` when the block ends without an exception.

    Until then everything is under ``<out_path>.unfinished``, which a failed run removes and the next run after a
    killed one replaces.

    Raises:
        OmpError: where ``out_path`` holds something already, cannot be written, or is being written by another run.
    """
    final = Path(os.path.realpath(out_path))
    _check_free(final)
    with _locked(final.with_name(final.name + UNFINISHED), final) as staging:
        folder = staging / final.name  # mergekit takes the model card's title from the folder's name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
        _check_free(final)
        if final.exists():
            final.rmdir()
        os.rename(folder, final)


@contextmanager
def _locked(staging: Path, final: Path) -> Iterator[Path]:
    """The staging folder, for one run at a time, and gone afterwards."""
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = FileLock(staging / "lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OmpError(f"{final} is being written by another run; wait for it or name another folder.") from error
    except OSError as error:
        raise OmpError(f"{final}: the output folder cannot be made ({error.strerror}); name another one.") from error
    try:
        if not os.path.exists(lock.lock_file):  # the run that held it has just ended, and has removed it
            raise OmpError(f"{final} was being written by another run until now; look at it or name another folder.")
        yield staging
    finally:
        # While the lock is held, so that no other run is in there.
        shutil.rmtree(staging, ignore_errors=True)
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
            f"{final} is not empty (it has {', '.join(present[:3])}{', …' if len(present) > 3 else ''}), "
            "and nothing is replaced unasked; name a new folder or empty that one."
        )
