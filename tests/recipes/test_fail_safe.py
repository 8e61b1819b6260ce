"""Test that output is complete or absent whatever happens, and that no code runs without permission."""

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import (
    ENGLISH,
    PYTHON,
    add_code,
    byte_level_tokenizer,
    make_model,
    save,
    sentencepiece_tokenizer,
)
from helpers.commands import merge_here, recipe, refusal
from mergekit.io.tensor_writer import TensorWriter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_omp.output.staging import staged
from mergekit_omp.solver import cache

KILLS = 20


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write a base whose shards take a moment to write, and a donor."""
    folder = tmp_path_factory.mktemp("pair")
    base_tokenizer, donor_tokenizer = sentencepiece_tokenizer(ENGLISH), byte_level_tokenizer(PYTHON)
    return (
        save(folder / "base", make_model(base_tokenizer, hidden=256, layers=4), base_tokenizer),
        save(folder / "donor", make_model(donor_tokenizer, architecture="mistral", hidden=64), donor_tokenizer),
    )


STDERR = "stderr."
PRELOADED = [
    "mergekit.scripts.run_yaml",
    "mergekit_omp.recipe.resolve",
    "mergekit_omp.output.config",
    "transformers.models.auto",
]
OPTIONS = ("--quiet", "--out-shard-size", "200K")


def contents(folder: Path) -> dict[str, str]:
    """Return the digest of every file in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def model_files(folder: Path) -> dict[str, str]:
    """Return the digests of a model's files, without the record, which contains times."""
    return {name: digest for name, digest in contents(folder).items() if name.split(".")[0] not in VARYING}


VARYING = {"README", "omp_record"}


@pytest.fixture(scope="module")
def expected(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the files of an undisturbed run."""
    out = tmp_path_factory.mktemp("expected") / "out"
    result = merge_here(recipe(*pair), out, *OPTIONS)
    assert result.exit_code == 0, result.output
    assert len(list(out.glob("*.safetensors"))) > 3
    return model_files(out)


def child(given: dict[str, Any], out: Path, cache_folder: Path, largest_file: int | None) -> None:
    """Run one recipe in a child process, with a cache that keeps every solve."""
    os.environ[cache.FOLDER_VARIABLE] = str(cache_folder)
    cache.MIN_CACHED_WORK = 0
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    result = merge_here(given, out, *OPTIONS)
    (out.parent / f"{STDERR}{os.getpid()}").write_text(result.stderr)
    sys.exit(result.exit_code)


def start(given: dict[str, Any], out: Path, largest_file: int | None = None) -> BaseProcess:
    """Start a run in a process forked from one that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=child, args=(given, out, out.parent / "codes", largest_file))
    process.start()
    return process


def finish(process: BaseProcess) -> int:
    process.join(timeout=120)
    assert process.exitcode is not None
    return process.exitcode


def assert_complete_or_marked(out: Path, expected: dict[str, str]) -> None:
    """Check that the output is absent or complete, and that unfinished files are marked and not loadable."""
    if out.exists():
        assert model_files(out) == expected
    unfinished = out.with_name("out.unfinished")
    others = {path.name for path in out.parent.iterdir()} - {"out", "out.unfinished", "codes"}
    assert all(name.startswith(STDERR) for name in others)
    if unfinished.exists():
        assert {path.name for path in unfinished.iterdir()} <= {"out", "lock"}


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path, pair: tuple[Path, Path], expected: dict[str, str]) -> None:
    """Send SIGKILL: the output is absent, marked or complete, inputs are unchanged, and a new run succeeds."""
    before = [contents(folder) for folder in pair]
    for name in ("first", "second"):  # only the second finds a process to fork from
        begun = time.monotonic()
        (tmp_path / name).mkdir()
        assert finish(start(recipe(*pair), tmp_path / name / "out")) == 0
        duration = time.monotonic() - begun
    moments = random.Random(0)
    states = set()
    for attempt in range(KILLS):
        out = tmp_path / str(attempt) / "out"
        out.parent.mkdir()
        process = start(recipe(*pair), out)
        time.sleep(moments.uniform(0, 1) * duration)
        process.kill()
        finish(process)
        assert_complete_or_marked(out, expected)
        states.add((out.exists(), out.with_name("out.unfinished").exists()))
        if not out.exists():
            assert finish(start(recipe(*pair), out)) == 0
        assert model_files(out) == expected
        assert not out.with_name("out.unfinished").exists()
        assert [contents(folder) for folder in pair] == before
    print(f"states seen (output, unfinished): {sorted(states)}")


def test_interrupted(tmp_path: Path, pair: tuple[Path, Path], expected: dict[str, str]) -> None:
    """Check that Ctrl-C while the output is written leaves no files."""
    out = tmp_path / "out"
    process = start(recipe(*pair), out)
    while process.is_alive() and not (tmp_path / "out.unfinished" / "out").exists():
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGINT)
    finish(process)
    assert not (tmp_path / "out.unfinished").exists()
    assert_complete_or_marked(out, expected)


def test_several_runs_into_one_folder(tmp_path: Path, pair: tuple[Path, Path], expected: dict[str, str]) -> None:
    """Check that one of them writes the output, and that the others are rejected."""
    processes = [start(recipe(*pair), tmp_path / "out") for _ in range(4)]
    codes = [finish(process) for process in processes]
    assert codes.count(0) == 1
    assert set(codes) == {0, 1}
    assert model_files(tmp_path / "out") == expected
    assert not (tmp_path / "out.unfinished").exists()


def test_files_that_may_not_grow(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Check the message when the operating system limits the size of files, and that nothing is left."""
    assert finish(start(recipe(*pair), tmp_path / "out", largest_file=50_000)) == 1
    [stderr] = tmp_path.glob(f"{STDERR}*")
    error = " ".join(stderr.read_text().split())
    assert f"Error: {tmp_path}/out cannot be written: a file would be larger than is allowed" in error
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "the disk is full; free some space or name a folder on another disk. Nothing was left there."),
        (errno.EDQUOT, "the disk quota is used up; free some space or name a folder on another disk. "
         "Nothing was left there."),
        (errno.EROFS, "the file system is read-only; name another folder. Nothing was left there."),
    ],
)  # fmt: skip
def test_disk_full_while_a_shard_is_written(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, number: int, sentence: str
) -> None:
    write, calls = TensorWriter._save_st, []

    def third_fails(self: TensorWriter, *args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(number, os.strerror(number))
        write(self, *args)

    monkeypatch.setattr(TensorWriter, "_save_st", third_fails)
    assert refusal(recipe(*pair), tmp_path / "out", *OPTIONS) == f"{tmp_path}/out cannot be written: {sentence}"
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "the disk is full; free some space or name a folder on another disk."),
        (errno.EROFS, "the file system is read-only; name another folder."),
        (errno.EACCES, "permission is denied; grant it or name another folder."),
    ],
)
def test_another_folder_than_that_of_the_output(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, number: int, sentence: str
) -> None:
    """Check a file of an input or a cache, such as that of --lora-merge-cache, beside the output."""
    file = f"{tmp_path}/out-cache/merged"

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), file)

    monkeypatch.setattr("mergekit.merge._model_out_config", fail)
    assert refusal(recipe(*pair), tmp_path / "out", *OPTIONS) == f"{file} cannot be read or written: {sentence}"


def test_a_named_file_of_the_output(tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: TensorWriter, tensors: Any, path: str, *_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(TensorWriter, "_save_st", fail)
    told = refusal(recipe(*pair), tmp_path / "out", *OPTIONS)
    assert told.startswith(f"{tmp_path}/out cannot be written: the disk is full; ")


def test_disk_full_while_the_tokenizer_is_written(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the form in which the library tokenizers reports it: an Exception with a message."""

    def full(*_: Any) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("mergekit_omp.output.config.finish_tokenizer", lambda *_, **__: full())
    result = merge_here(recipe(*pair), tmp_path / "out", *OPTIONS)
    assert f"Error: {tmp_path}/out cannot be written: the disk is full" in result.stderr


def test_disk_full_while_the_record_is_written(
    tmp_path: Path, pair: tuple[Path, Path], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that a model without its whole record does not appear under its name, and that its weights are kept."""

    def half(path: Path, *_: Any) -> None:
        (path / "omp_record.json").write_text('{"format": 1, ')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mergekit_omp.report.record.write_record", half)
    result = merge_here(recipe(*pair), tmp_path / "out", *OPTIONS)
    assert result.exit_code == 1
    told = " ".join(result.stderr.split("Error: ", 1)[1].split())
    kept = tmp_path / "out.unfinished" / "out"
    assert told.startswith(f"{tmp_path}/out cannot be written: the disk is full; ")
    assert f"The weights are complete and kept in {kept}" in told
    assert not (tmp_path / "out").exists()
    assert model_files(kept) == expected


@pytest.mark.parametrize("index", ["", '{"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}'])
def test_weights_that_are_not_complete_are_not_kept(tmp_path: Path, index: str) -> None:
    """Check a disk that is full while the index, or a shard that it names, is written."""

    def write() -> None:
        with staged(tmp_path / "out") as folder:
            (folder / "model-00001-of-00001.safetensors").write_bytes(bytes(100))
            (folder / "model.safetensors.index.json").write_text(index)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["disappears", "changes"])
def test_input_file_that_changes_during_the_run(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Check an optional file that is read after the merge, and would be taken for absent or read in another state."""
    base = tmp_path / "base"
    shutil.copytree(pair[0], base)
    changing = base / "generation_config.json"
    write = TensorWriter._save_st

    def and_change(self: TensorWriter, *args: Any) -> None:
        write(self, *args)
        if change == "disappears":
            changing.unlink(missing_ok=True)
        else:
            changing.write_text("{}")

    monkeypatch.setattr(TensorWriter, "_save_st", and_change)
    result = merge_here(recipe(base, pair[1]), tmp_path / "out", *OPTIONS)
    assert result.exit_code == 1
    told = " ".join(result.stderr.split("Error: ", 1)[1].split())
    happened = "has disappeared" if change == "disappears" else "was changed"
    assert told.startswith(f"{changing} {happened} while it was needed; run again")
    assert not (tmp_path / "out").exists()


def test_out_of_memory(tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("mergekit_omp.tasks.tasks.realign", no_memory)
    assert refusal(recipe(*pair), tmp_path / "out", *OPTIONS) == (
        "Out of memory; use a machine with more, or see `mergekit-omp inspect` for what a recipe needs."
    )


def test_a_bug_keeps_its_traceback(tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that only known failures become messages; the output is removed in any case."""

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("index out of range")

    monkeypatch.setattr("mergekit_omp.tasks.tasks.realign", broken)
    result = merge_here(recipe(*pair), tmp_path / "out", *OPTIONS)
    assert isinstance(result.exception, RuntimeError)
    assert list(tmp_path.iterdir()) == []


def test_folder_with_something_in_it(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    out = tmp_path / "out"
    for present in ("model.safetensors", ".git"):
        out.mkdir()
        (out / present).write_text("precious")
        assert refusal(recipe(*pair), out, *OPTIONS) == (
            f"{out} is not empty (it contains {present}), and existing files are never replaced; name a new folder "
            "or empty this one."
        )
        assert contents(out) == {present: hashlib.sha256(b"precious").hexdigest()}
        shutil.rmtree(out)


def test_output_that_cannot_be_created(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    (tmp_path / "file").write_text("")
    assert (
        refusal(recipe(*pair), tmp_path / "file") == f"{tmp_path}/file is a file; name a folder that is new or empty."
    )
    assert refusal(recipe(*pair), tmp_path / "file" / "out") == (
        f"{tmp_path}/file/out: the output folder cannot be created (Not a directory); name another one."
    )


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that even root can't write to")
def test_read_only_parent(pair: tuple[Path, Path]) -> None:
    result = merge_here(recipe(*pair), Path("/proc/out"), "--quiet")
    assert result.exit_code == 1
    assert "Error: /proc/out: the output folder cannot be created" in result.stderr


def test_mount_point(pair: tuple[Path, Path]) -> None:
    assert "Error: / is a mount point" in merge_here(recipe(*pair), Path("/"), "--quiet").stderr


@pytest.mark.parametrize("kind", ["empty folder", "link to an empty folder", "new folder in a new folder"])
def test_allowed_output_folders(tmp_path: Path, pair: tuple[Path, Path], expected: dict[str, str], kind: str) -> None:
    out = tmp_path / "out"
    if kind == "empty folder":
        out.mkdir()
    elif kind == "link to an empty folder":
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to(tmp_path / "elsewhere")
    else:
        out = tmp_path / "new" / "out"
    assert merge_here(recipe(*pair), out, *OPTIONS).exit_code == 0
    assert model_files(out) == expected


def test_files_of_a_killed_run_are_replaced(tmp_path: Path, pair: tuple[Path, Path], expected: dict[str, str]) -> None:
    leavings = tmp_path / "out.unfinished" / "out"
    leavings.mkdir(parents=True)
    (leavings / "model-9.safetensors").write_text("half a shard")
    assert merge_here(recipe(*pair), tmp_path / "out", *OPTIONS).exit_code == 0
    assert model_files(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_network_where_files_are_local(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    result = merge_here(recipe(*pair), tmp_path / "out", *OPTIONS)
    assert result.exit_code == 0, result.exception


class Exploit:
    """A pickle that runs code if it is loaded without restrictions."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("which", ["base", "donor"])
@pytest.mark.parametrize("sharded", [True, False])
def test_pickle_with_code_in_it(tmp_path: Path, pair: tuple[Path, Path], which: str, sharded: bool) -> None:
    """Check that only torch's restricted loader reads pickled weights."""
    models = dict(zip(("base", "donor"), pair, strict=True))
    bad = tmp_path / "bad"
    shutil.copytree(models[which], bad)
    names = list(load_file(bad / "model.safetensors"))
    (bad / "model.safetensors").unlink()
    path = bad / ("pytorch_model-00001-of-00001.bin" if sharded else "pytorch_model.bin")
    path.write_bytes(pickle.dumps({"model.embed_tokens.weight": Exploit(tmp_path / "owned")}))
    if sharded:
        (bad / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, path.name)}))
    key = "models[0].model" if which == "base" else "tokenizer.source"
    sentence = refusal(recipe(**models | {which: bad}), tmp_path / "out", *OPTIONS)
    assert sentence == f"{key}: {path} cannot be read (it contains more than tensors); download the model again."
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("trusted", [True, False])
def test_code_that_comes_with_a_base(tmp_path: Path, pair: tuple[Path, Path], trusted: bool) -> None:
    """Check that an output needs nothing of its base: it has the code, or transformers' class for the model type."""
    base, donor = tmp_path / "base", pair[1]
    shutil.copytree(pair[0], base)
    add_code(base)
    out = tmp_path / "out"
    result = merge_here(recipe(base, donor), out, *OPTIONS, *(["--trust-remote-code"] if trusted else []))
    assert result.exit_code == 0, result.output
    shutil.rmtree(base)
    assert len(list(out.glob("*_own.py"))) == (2 if trusted else 0)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert getattr(model, "own_name", None) == ("own" if trusted else None)


def test_code_that_comes_with_a_donor_is_not_run_nor_copied(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Check that without ``trust_remote_code`` a repository's code is data, like its chat template."""
    base, donor = pair
    bad = tmp_path / "bad"
    shutil.copytree(donor, bad)
    code = f"import os\nos.mkdir({str(tmp_path / 'owned')!r})\n"
    for module in ("tokenization_evil", "configuration_evil", "modeling_evil"):
        (bad / f"{module}.py").write_text(code)
    settings = json.loads((bad / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    (bad / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((bad / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    (bad / "config.json").write_text(json.dumps(config))
    template = "{% for m in messages %}{{ ''.__class__.__mro__ }}{{ m.content }}{% endfor %}{{ '../../etc' }}"
    (bad / "chat_template.jinja").write_text(template)
    out = tmp_path / "out"
    result = merge_here(recipe(base, bad), out, *OPTIONS)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "owned").exists()
    assert not list(out.glob("*evil*"))
    assert "evil" not in (out / "config.json").read_text() + (out / "tokenizer_config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert tokenizer.chat_template == template
    assert not (tmp_path / "owned").exists()
