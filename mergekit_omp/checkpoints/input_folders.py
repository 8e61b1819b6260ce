"""Notice files of models that change while a run reads them."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit_omp.errors import OmpError

_SUFFIXES = {".bin", ".jinja", ".json", ".model", ".py", ".safetensors"}


class InputFolders:
    """The files of the folders that a run reads, as they were when it began.

    Many files of a model are optional. One that disappears during the run would be taken for one that never was, and
    the output would lack what it says.

    Args:
        models: folders of models; other names, as of models on the hub, are left out.
    """

    def __init__(self, models: Iterable[str]) -> None:
        folders = [Path(name) for name in dict.fromkeys(models) if os.path.isdir(name)]
        files = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in _SUFFIXES]
        self._files = {path: _state(path) for path in files}

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Raise an OmpError if a file has disappeared or changed by the end of the block, or when the block fails."""
        try:
            yield
        except Exception as error:
            self._check(error)
            raise
        self._check()

    def _check(self, cause: Exception | None = None) -> None:
        for path, before in self._files.items():
            now = _state(path)
            if now != before:
                happened = "has disappeared" if now is None else "was changed"
                raise OmpError(
                    f"{path} {happened} while it was needed; run again, and leave the files of the models alone "
                    "until the run ends."
                ) from cause


def _state(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
