"""Make virtual environments with a few packages from the package index, cached in the user's folder."""

import os
import subprocess
import sys
import venv
from pathlib import Path

from filelock import FileLock


def python_with(name: str, *requirements: str) -> Path:
    """Return an environment's interpreter; create the environment if it is missing or has other requirements.

    Raises:
        subprocess.CalledProcessError: pip cannot install them; ``stderr`` has the reason.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mergekit-omp-tests"
    folder = cache / f"{name}-python-{sys.version_info[0]}.{sys.version_info[1]}"
    cache.mkdir(parents=True, exist_ok=True)
    python, done = folder / "bin" / "python", folder / "requirements"
    with FileLock(f"{folder}.lock"):
        if not done.exists() or done.read_text() != "\n".join(requirements):
            venv.create(folder, clear=True, with_pip=True)
            install = [python, "-m", "pip", "install", "-q", *requirements]
            subprocess.run(install, check=True, capture_output=True, text=True)
            done.write_text("\n".join(requirements))
    return python
