"""What commands do with the names of models that records have, and with damaged weights."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.checkpoints import ENGLISH, PYTHON, byte_level_tokenizer, make_model, save, sentencepiece_tokenizer
from helpers.commands import merge_here, recipe

from mergekit_omp.cli.main import main

COMMANDS = [
    ("audit", "OUT"),
    ("report", "OUT", "--evaluate"),
    ("restore", "OUT", "NEW"),
    ("heal", "OUT", "NEW", "--text", "TEXT", "--tokens", "600"),
]
EVAL = ("eval", "OUT", "--base", "some/base@" + "0" * 40)
VERIFY = ("audit", "OUT", "--verify")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, its transplant and a text."""
    folder = tmp_path_factory.mktemp("merged")
    tokenizer, other = sentencepiece_tokenizer(ENGLISH), byte_level_tokenizer(PYTHON)
    base = save(folder / "base", make_model(tokenizer), tokenizer)
    donor = save(folder / "donor", make_model(other, seed=3), other)
    result = merge_here(recipe(base, donor), folder / "out", "--quiet")
    assert result.exit_code == 0, result.output
    (folder / "text.txt").write_text("\n".join([*ENGLISH, *PYTHON] * 4))
    return folder


def name_base(out: Path, name: str) -> None:
    """Have the record of a model name its base otherwise."""
    path = out / "omp_record.json"
    record = json.loads(path.read_text())
    [base] = [model for model in record["models"] if "input" in model["roles"]]
    base["name"] = name
    path.write_text(json.dumps(record))


def arguments_of(command: tuple[str, ...], folder: Path, out: Path) -> list[str]:
    paths = {"OUT": out, "NEW": out.with_name("new"), "TEXT": folder / "text.txt"}
    return [str(paths.get(argument, argument)) for argument in command]


def refusal(*arguments: str) -> str:
    """Run a command that must fail, and return its sentence."""
    result = CliRunner().invoke(main, arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1, result.output
    return " ".join(result.stderr.split("Error: ", 1)[1].split())


@pytest.mark.parametrize("command", [*COMMANDS, EVAL], ids=lambda command: command[0])
def test_a_base_on_the_hub_with_a_revision(
    merged: Path, tmp_path: Path, hub: Callable[[Path, set[str]], str], command: tuple[str, ...]
) -> None:
    out = shutil.copytree(merged / "out", tmp_path / "out")
    name = hub(shutil.copytree(merged / "base", tmp_path / "base"), set())
    (tmp_path / "hub/models--some--base/refs/main").write_text("1" * 40)  # so that only the revision is there
    name_base(out, f"{name}@{'0' * 40}")
    program = Path(sys.executable).with_name("mergekit-omp")
    line = [program, *arguments_of(command, merged, out)]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_base_with_an_adapter(merged: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    out = shutil.copytree(merged / "out", tmp_path / "out")
    name_base(out, "some/base+some/adapter")
    sentence = refusal(*arguments_of(command, merged, out))
    assert "base: some/base+some/adapter is a model with an adapter, which only a merge can read" in sentence


def test_a_folder_whose_name_looks_like_an_adapter(merged: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(merged / "base", tmp_path / "base+adapter@main")
    result = CliRunner().invoke(main, ["eval", str(folder), "--text", str(merged / "text.txt")])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", [*COMMANDS, EVAL[:2], VERIFY], ids=" ".join)
def test_truncated_weights(merged: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    out = shutil.copytree(merged / "out", tmp_path / "out")
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    sentence = refusal(*arguments_of(command, merged, out))
    assert str(out) in sentence
    assert "cannot be " in sentence
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("index", ["{}", "{", '{"weight_map": {"lm_head.weight": "model.safetensors"}}'])
def test_verify_with_a_damaged_index(merged: Path, tmp_path: Path, index: str) -> None:
    """An index that lacks tensors of the record is a change; one that is none cannot be read."""
    out = shutil.copytree(merged / "out", tmp_path / "out")
    (out / "model.safetensors.index.json").write_text(index)
    result = CliRunner().invoke(main, arguments_of(VERIFY, merged, out))
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    expected = "model.embed_tokens.weight: missing" if "lm_head" in index else f"{out}: its weights cannot be read ("
    assert expected in " ".join(result.output.split())
