"""Run mergekit's and this package's commands in the test process, which is faster than a new one."""

import tempfile
from pathlib import Path
from typing import Any

import mergekit.scripts.run_yaml
import yaml
from click.testing import CliRunner, Result

import mergekit_omp

mergekit_omp.register()


def recipe(base: Path, donor: Path | str, **more: Any) -> dict[str, Any]:
    """Return a recipe that transplants one model, for tests of other properties."""
    return {
        "merge_method": "omp",
        "models": [{"model": str(base)}],
        "tokenizer": {"source": str(donor)},
        "parameters": {"k": 5},
        "dtype": "float32",
        **more,
    }


def merge_here(recipe: dict[str, Any] | str | bytes, out: Path, *options: str) -> Result:
    """Run ``mergekit-yaml`` on a recipe, given as a mapping or as text; exceptions become results."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yml"
        path.write_bytes(as_yaml(recipe))
        return CliRunner().invoke(mergekit.scripts.run_yaml.main, [str(path), str(out), *options])


def must_merge(recipe: dict[str, Any] | str | bytes, out: Path, *options: str) -> None:
    """Run a recipe that must succeed; what the run logs is in the ``caplog`` of pytest."""
    result = merge_here(recipe, out, *options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output[-4000:]


def as_yaml(recipe: dict[str, Any] | str | bytes) -> bytes:
    """Return the content of a recipe's file."""
    if isinstance(recipe, bytes):
        return recipe
    return (recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False)).encode()


def refusal(recipe: dict[str, Any] | str | bytes, out: Path, *options: str) -> str:
    """Run a recipe that must fail, and return the error message on one line.

    Fails if an exception got through (a user would see a traceback), the exit status is zero, or a file is left.
    """
    before = sorted(out.parent.rglob("*"))
    result = merge_here(recipe, out, *options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"a traceback reaches the user: {result.exception!r}") from result.exception
    assert result.exit_code == 1, (result.exit_code, result.output)
    assert sorted(out.parent.rglob("*")) == before, "something was written"
    return " ".join(result.stderr.split("Error: ", 1)[1].split())
