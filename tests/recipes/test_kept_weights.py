"""Test that failures after the tensors are written keep them, and that folders are not looked up on the hub."""

import errno
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import mergekit.merge
import pytest
import torch
import yaml
from helpers.checkpoints import (
    ENGLISH,
    PYTHON,
    byte_level_tokenizer,
    make_model,
    run_recipe,
    save,
    sentencepiece_tokenizer,
    tensors_of,
)
from helpers.commands import merge_here, recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_omp.errors import OmpError
from mergekit_omp.output import config as output


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write a base and a donor to a folder ``models`` of the working directory of the tests."""
    folder = tmp_path_factory.mktemp("work") / "models"
    base_tokenizer, donor_tokenizer = sentencepiece_tokenizer(ENGLISH), byte_level_tokenizer(PYTHON)
    return (
        save(folder / "base", make_model(base_tokenizer), base_tokenizer),
        save(folder / "donor", make_model(donor_tokenizer, architecture="mistral", hidden=24), donor_tokenizer),
    )


def assert_same_weights(folder: Path, expected: Path) -> None:
    found, expected_tensors = tensors_of(folder), tensors_of(expected)
    assert found.keys() == expected_tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected_tensors.items())


@pytest.mark.parametrize(
    "names", [("models/base", "models/donor"), ("base", "donor"), ("./models/base", "models/donor")]
)
def test_short_relative_names_offline(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]
) -> None:
    """Run the installed command without a network on paths that look like hub ids."""
    monkeypatch.chdir(pair[0].parent if "/" not in names[0] else pair[0].parent.parent)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run_recipe(recipe(*map(Path, names)), tmp_path / "out")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "model card" not in result.stderr
    card = (tmp_path / "out/README.md").read_text()
    assert "huggingface.co" not in card
    assert "Models Merged" in card
    assert (tmp_path / "out/mergekit_config.yml").exists()


def test_short_relative_names_with_a_hub_that_fails(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that no request is made: any request to the hub raises an exception."""
    asked: list[Any] = []

    def fail(*arguments: Any, **_: Any) -> None:
        asked.append(arguments)
        raise ConnectionError("the hub was asked")

    for name in ("repo_exists", "model_info", "list_repo_files", "snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, fail)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.chdir(pair[0].parent.parent)
    result = merge_here(recipe(Path("models/base"), Path("models/donor")), tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert asked == []
    assert "huggingface.co" not in (tmp_path / "out/README.md").read_text()


def test_other_recipes_ask_the_hub_as_before(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(huggingface_hub, "repo_exists", lambda path, **_: asked.append(path) or False)
    monkeypatch.chdir(pair[0].parent.parent)
    given = {"merge_method": "linear", "models": [{"model": "models/base", "parameters": {"weight": 1.0}}]}
    assert merge_here(given, tmp_path / "out").exit_code == 0
    assert set(asked) == {"models/base"}


def test_a_failing_model_card_is_a_warning(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Check that the model is complete, with the recipe beside it."""
    assert merge_here(recipe(*pair), tmp_path / "expected").exit_code == 0

    def broken(*_: Any) -> None:
        raise RuntimeError("no template")

    monkeypatch.setattr("mergekit.card.method_md", broken)
    given = recipe(*pair)
    result = merge_here(given, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "mergekit cannot create the model card (RuntimeError: no template)" in caplog.text
    assert_same_weights(tmp_path / "out", tmp_path / "expected")
    assert yaml.safe_load((tmp_path / "out/mergekit_config.yml").read_text()) == given
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("# out\n")
    assert "merge_method: omp" in card
    assert "### Tokenizer transplantation" in card
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("out", "expected")]
    assert files[0] == files[1]


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_are_kept_after_a_failure(
    tmp_path: Path,
    pair: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    shards: int,
) -> None:
    """Check the folder that the message names, that nothing looks like a result, and that a new run replaces it."""
    options = ("--quiet", "--out-shard-size", "5B" if shards == 1 else "100K")
    assert merge_here(recipe(*pair), tmp_path / "expected", *options).exit_code == 0
    assert (len(list((tmp_path / "expected").glob("*.safetensors"))) > 1) is (shards > 1)

    def bug(*_: Any, **__: Any) -> None:
        raise TypeError("a bug")

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(mergekit.merge, "_set_chat_template", bug)
        result = merge_here(recipe(*pair), out, *options)
    kept = tmp_path / "out.unfinished" / "out"
    assert result.exit_code == 1
    assert " ".join(result.stderr.split("Error: ", 1)[1].split()) == (
        "The run failed after its weights were written (TypeError: a bug). The weights are complete and kept in "
        f"{kept}; other files may be missing there. The next run with the same output folder replaces them."
    )
    assert "Traceback" in caplog.text, "what a bug's report needs"
    assert not out.exists()
    assert [path.name for path in kept.parent.iterdir()] == ["out"]
    assert_same_weights(kept, tmp_path / "expected")
    AutoTokenizer.from_pretrained(pair[1]).save_pretrained(kept)  # with which they are a model
    AutoModelForCausalLM.from_pretrained(kept)

    (kept / "leavings").write_text("")
    assert merge_here(recipe(*pair), out, *options).exit_code == 0
    assert_same_weights(out, tmp_path / "expected")
    assert not (out / "leavings").exists()
    assert not kept.parent.exists()


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            "{out} cannot be written: the disk is full; free some space or name a folder on another disk. The weights",
        ),
        (OmpError("Something to mend."), "Something to mend. The weights"),
    ],
)
def test_known_failures_are_reported_first(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, raised: Exception, sentence: str
) -> None:
    def fail(*_: Any) -> None:
        raise raised

    monkeypatch.setattr(output, "finish_output", fail)
    result = merge_here(recipe(*pair), tmp_path / "out", "--quiet")
    assert result.exit_code == 1
    error = " ".join(result.stderr.split("Error: ", 1)[1].split())
    assert error.startswith(sentence.format(out=tmp_path / "out"))
    assert "Nothing was left there" not in error
    assert (tmp_path / "out.unfinished/out/model.safetensors").exists()
    assert not (tmp_path / "out").exists()


def test_output_folder_that_was_filled_meanwhile(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that both the files of the other process and the model are kept."""
    out, finish = tmp_path / "out", output.finish_output

    def fill(*arguments: Any) -> None:
        finish(*arguments)
        out.mkdir()
        (out / "theirs").write_text("precious")

    monkeypatch.setattr(output, "finish_output", fill)
    result = merge_here(recipe(*pair), out, "--quiet")
    assert result.exit_code == 1
    assert f"The weights are complete and kept in {out}.unfinished/out" in " ".join(result.stderr.split())
    assert (out / "theirs").read_text() == "precious"
    AutoModelForCausalLM.from_pretrained(tmp_path / "out.unfinished/out")
    shutil.rmtree(out)


def test_ctrl_c_keeps_nothing(tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that an interrupted run keeps no result."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "finish_output", interrupt)
    merge_here(recipe(*pair), tmp_path / "out", "--quiet")
    assert list(tmp_path.iterdir()) == []
