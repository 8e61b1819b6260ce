"""Run code in an environment with transformers 4.57 and without torch."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from helpers.environments import python_with

REQUIREMENTS = ("transformers==4.57.6", "jinja2==3.1.6")
SCRIPT = Path(__file__).with_name("read_output.py")


def read_with_transformers_4(calls: list[tuple[str, list[Any]]]) -> list[Any]:
    """Call functions of ``read_output``, given by name and arguments, with transformers 4."""
    result = subprocess.run(
        [python_with("transformers-4", *REQUIREMENTS), str(SCRIPT)],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])
