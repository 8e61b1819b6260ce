"""Run code in an environment with transformers 4.57 and without torch, which is cached in the user's folder."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from filelock import FileLock

REQUIREMENTS = ("transformers==4.57.6", "jinja2==3.1.6")
SCRIPT = Path(__file__).with_name("read_output.py")


def read_with_transformers_4(calls: list[tuple[str, list[Any]]]) -> list[Any]:
    """Call functions of ``read_output``, given by name and arguments, with transformers 4."""
    result = subprocess.run(
        [_python(), str(SCRIPT)],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def _python() -> Path:
    """Return the environment's interpreter; create the environment if it is missing or has other requirements."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mergekit-omp-tests"
    folder = cache / f"transformers-4-python-{sys.version_info[0]}.{sys.version_info[1]}"
    cache.mkdir(parents=True, exist_ok=True)
    python, done = folder / "bin" / "python", folder / "requirements"
    with FileLock(f"{folder}.lock"):
        if not done.exists() or done.read_text() != "\n".join(REQUIREMENTS):
            venv.create(folder, clear=True, with_pip=True)
            subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS], check=True, capture_output=True)
            done.write_text("\n".join(REQUIREMENTS))
    return python
