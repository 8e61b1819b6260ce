"""What several commands share: options, recipes and texts from files, JSON, a sign of life, the check of a device."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration

DEVICE = click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1, …")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
TEXTS = click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="A text file; may be repeated.  [default: the built-in texts]",
)
TRUST_REMOTE_CODE = click.option("--trust-remote-code", is_flag=True, help="Let models run code of their own.")


def load_recipe(path: str) -> MergeConfiguration:
    """Read a recipe with a merge method of this package.

    Raises:
        OmpError: the file is not such a recipe.
    """
    from mergekit.config import MergeConfiguration

    from mergekit_omp import register
    from mergekit_omp.errors import OmpError
    from mergekit_omp.parameters import is_ours

    register()
    recipe = read_recipe(path)
    method = recipe.get("merge_method") if isinstance(recipe, dict) else None
    if not is_ours(method):
        raise OmpError(f"{path}: merge_method is {method!r}; name a recipe with merge_method: omp or omp_<method>.")
    return MergeConfiguration.model_validate(recipe)


def read_recipe(path: str) -> Any:
    """Read the YAML of a recipe.

    Raises:
        OmpError: the file cannot be read, or is not YAML.
    """
    import yaml

    from mergekit_omp.errors import OmpError

    text = read_text_file(path)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: dates and numbers that do not exist
        raise OmpError(f"{path}: invalid YAML: {' '.join(str(error).split())}.") from error


def read_text_file(path: str) -> str:
    """Read a text file.

    Raises:
        OmpError: the file cannot be read, or is not UTF-8.
    """
    from mergekit_omp.errors import OmpError

    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise OmpError(f"{path} cannot be read ({reason}); name a text file.") from error


def read_texts(paths: tuple[str, ...], suite: str = "held_out") -> dict[str, str]:
    """Read texts by name: the given files, named by their stems where these differ, else the built-in ones.

    Raises:
        OmpError: a file cannot be read.
    """
    from mergekit_omp.evaluation.bits_per_byte import builtin_texts

    if not paths:
        return builtin_texts(suite)
    stems = [Path(path).stem for path in paths]
    names = stems if len(set(stems)) == len(set(paths)) else paths
    return {name: read_text_file(path) for name, path in zip(names, paths, strict=True)}


def check_device(device: str) -> None:
    """Raise an OmpError unless torch can compute on a device."""
    import torch

    from mergekit_omp.errors import OmpError

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OmpError(f"--device: {device} cannot be used here ({reason}); try cpu.") from error


@contextmanager
def working(step: str) -> Iterator[None]:
    """Show a spinner while a step runs that cannot say how far it is.

    It is on the error stream, and only where that is a terminal. Nothing else may draw a progress bar meanwhile.

    Args:
        step: what is done, such as ``Reading tokenizers``.
    """
    from rich.console import Console

    with Console(stderr=True).status(f"{step} …"):
        yield


def silence_transformers() -> None:
    """Import transformers, and keep its warnings and progress bars out of a command's output."""
    with working("Starting"):
        import transformers

    # peft still calls what transformers 5.23 has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
