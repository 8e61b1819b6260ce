"""``mergekit-omp heal`` on small models: what is written is better, whole, and an ordinary model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from helpers.checkpoints import (
    ENGLISH,
    PYTHON,
    byte_level_tokenizer,
    make_model,
    save,
    sentencepiece_tokenizer,
    tensors_of,
)
from helpers.commands import merge_here, recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_omp.cli.main import main
from mergekit_omp.healing import training
from mergekit_omp.report.scores import evaluate

TEXT = "\n".join([*ENGLISH, *PYTHON]) + "\n"


def call(*arguments: str | Path | float) -> Result:
    return CliRunner().invoke(main, ["heal", *(str(argument) for argument in arguments)])


def refusal(*arguments: str | Path | float) -> str:
    result = call(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    return " ".join(result.stderr.split("Error: ", 1)[1].split())


def trained(model: torch.nn.Module, tokenizer: object) -> torch.nn.Module:
    """Have a small model learn TEXT, so that there is something to lose."""
    ids = torch.tensor([tokenizer(TEXT).input_ids])  # type: ignore[operator]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(120):
        start = (step * 37) % max(1, ids.shape[1] - 128)
        part = ids[:, start : start + 128]
        optimizer.zero_grad()
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained base, a transplanted copy of it, and texts to heal it with."""
    folder = tmp_path_factory.mktemp("heal")
    tokenizer, donor_tokenizer = byte_level_tokenizer(ENGLISH, 420), sentencepiece_tokenizer(PYTHON, 420)
    base = trained(make_model(tokenizer, tied=request.param, seed=1), tokenizer)
    save(folder / "base", base, tokenizer)
    save(folder / "donor", make_model(donor_tokenizer, hidden=24, tied=request.param), donor_tokenizer)
    result = merge_here(recipe(folder / "base", folder / "donor"), folder / "transplanted", "--quiet")
    assert result.exit_code == 0, result.output
    (folder / "text.txt").write_text(TEXT * 8)
    return {name: folder / name for name in ("base", "donor", "transplanted", "text.txt")}


def heal(models: dict[str, Path], out: Path, *options: str | Path | float) -> dict:
    result = call(models["transplanted"], out, "--dtype", "float32", "--lr", 3e-3, "--json", *options)
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


@pytest.mark.parametrize("options", [(), ("--objective", "next-token"), ("--train", "full"), ("--train", "rows")])
def test_a_healed_model_reads_better(models: dict[str, Path], tmp_path: Path, options: tuple[str, ...]) -> None:
    told = heal(models, tmp_path / "out", "--text", models["text.txt"], "--tokens", 12_000, *options)
    texts = {"text": TEXT}
    before, after = evaluate([models["transplanted"], tmp_path / "out"], texts, base=models["base"], progress=False)
    assert after.overall.bits_per_byte < before.overall.bits_per_byte - 0.02
    assert told["tokens"] >= 12_000
    assert told["written"]["bits_per_byte"] == min(check["bits_per_byte"] for check in told["checks"])


def test_what_is_written_is_an_ordinary_model(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = heal(models, out, "--text", models["text.txt"], "--tokens", 5000)
    before, after = tensors_of(models["transplanted"]), tensors_of(out)
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {
        name: (t.shape, t.dtype) for name, t in before.items()
    }
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (models["transplanted"] / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = AutoTokenizer.from_pretrained(out)("The river", return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()

    record = json.loads((out / "omp_record.json").read_text())
    assert record["heal"] == told
    assert record["models"] == json.loads((models["transplanted"] / "omp_record.json").read_text())["models"]
    assert told["base"] == str(models["base"])
    [source] = told["texts"]
    assert source["name"] == str(models["text.txt"])
    assert len(source["sha256"]) == 64
    for kind in ("equal", "first piece", "later pieces", "crossing"):
        assert told["before"][kind]["tokens"] == told["after"][kind]["tokens"]
    card = (out / "README.md").read_text()
    assert "### Healing" in card
    assert "### Tokenizer transplantation" in card
    assert not out.with_name("out.unfinished").exists()
    verified = CliRunner().invoke(main, ["audit", str(out), "--verify"])
    assert verified.exit_code == 0, verified.output


def test_only_what_is_asked_for_is_trained(models: dict[str, Path], tmp_path: Path) -> None:
    before = tensors_of(models["transplanted"])
    vocabulary = {name for name in before if "embed_tokens" in name or "lm_head" in name}
    for train, changed in (("rows", vocabulary), ("lora", set(before) - vocabulary)):
        heal(models, tmp_path / train, "--text", models["text.txt"], "--tokens", 3000, "--train", train)
        after = tensors_of(tmp_path / train)
        differing = {name for name in before if not torch.equal(before[name], after[name])}
        assert differing <= changed
        assert differing


def test_the_same_seed_gives_the_same_model(models: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        heal(models, tmp_path / name, "--text", models["text.txt"], "--tokens", 2500, "--seed", 5)
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_without_texts_the_base_writes_them(models: dict[str, Path], tmp_path: Path) -> None:
    told = heal(models, tmp_path / "out", "--tokens", 9000)
    assert told["texts_from"] == "written by the base"
    assert told["texts"][0]["bytes"] > 0
    first, *_, last = told["checks"]
    assert last["bits_per_byte"] < first["bits_per_byte"]


def test_minutes_bound_a_run(models: dict[str, Path], tmp_path: Path) -> None:
    told = heal(models, tmp_path / "out", "--text", models["text.txt"], "--minutes", 0.05)
    assert told["seconds"] >= 3
    assert told["steps"] > 0  # also where the first check takes all the time


def test_a_moment_is_one_step(models: dict[str, Path], tmp_path: Path) -> None:
    told = heal(models, tmp_path / "out", "--text", models["text.txt"], "--minutes", 1e-6)
    assert told["steps"] == 1


def test_a_file_holds_the_same_options(models: dict[str, Path], tmp_path: Path) -> None:
    keys = {"model": str(models["transplanted"]), "out": str(tmp_path / "out"), "text": str(models["text.txt"])}
    (tmp_path / "heal.yml").write_text(yaml.safe_dump(keys | {"tokens": 2000, "dtype": "float32", "seed": 3}))
    result = call(tmp_path / "heal.yml", "--tokens", 2500)
    assert result.exit_code == 0, (result.output, result.exception)
    record = json.loads((tmp_path / "out" / "omp_record.json").read_text())
    assert (record["heal"]["options"]["tokens"], record["heal"]["options"]["seed"]) == (2500, 3)
    assert "gap closed" in result.stdout
    assert "later pieces" in result.stdout
    assert "mergekit-omp eval" in result.stdout


def test_mistakes_are_told_before_anything_is_written(models: dict[str, Path], tmp_path: Path) -> None:
    out, transplanted, text = tmp_path / "out", models["transplanted"], models["text.txt"]
    (tmp_path / "unknown.yml").write_text("model: a\nout: b\nminuts: 3\n")
    (tmp_path / "list.yml").write_text("- model\n")
    other = byte_level_tokenizer(ENGLISH, 420)
    save(tmp_path / "wide", make_model(other, intermediate=96), other)
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5", "architectures": ["T5Model"]}')
    cases = [
        ((transplanted,), "OUT is missing"),
        ((tmp_path / "unknown.yml",), "minuts: no such key (did you mean minutes?)"),
        ((tmp_path / "list.yml",), "no keys in it"),
        ((transplanted, out, "--text", tmp_path / "none.txt"), "none.txt cannot be read (No such file or directory)"),
        ((transplanted, out, "--text", text, "--base", tmp_path / "wide"), "has the shape 96×32 in it, and 64×32"),
        ((transplanted, out, "--text", text, "--base", tmp_path / "none"), "none"),
        (("./typo", out, "--text", text), "model: ./typo is neither a folder nor a model that the hub gives"),
        (
            (tmp_path / "t5", out, "--text", text, "--base", models["base"]),
            f"model: {tmp_path / 't5'} cannot be loaded as a causal language model: Unrecognized configuration class",
        ),
        ((models["base"], out, "--text", text), "has no omp_record.json that tells its base; name it with --base"),
        ((models["base"], out, "--text", text, "--base", models["base"]), "has the tokenizer of"),
        ((transplanted, out, "--text", text, "--generate"), "text and generate: true exclude each other"),
        ((transplanted, out, "--device", "cuda:99"), "--device: cuda:99 cannot be used here"),
        ((transplanted, models["base"], "--text", text), "is not empty"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for arguments, sentence in cases:
        assert sentence in refusal(*arguments), arguments
    assert sorted(tmp_path.rglob("*")) == before


def test_a_merge_of_several_inputs_names_no_base(models: dict[str, Path], tmp_path: Path) -> None:
    inputs = [{"model": str(models[name])} for name in ("base", "transplanted")]
    merged = recipe(models["base"], models["donor"], merge_method="omp_linear", models=inputs)
    merged["parameters"] = {"weight": 0.5, "k": 5}
    result = merge_here(merged, tmp_path / "merged", "--quiet")
    assert result.exit_code == 0, result.output
    sentence = refusal(tmp_path / "merged", tmp_path / "out", "--text", models["text.txt"])
    assert "was merged from 2 inputs" in sentence


def test_a_model_without_a_record(models: dict[str, Path], tmp_path: Path) -> None:
    """Its new record describes the healing alone: enough to audit it and to heal it again."""
    bare, healed, text = tmp_path / "bare", tmp_path / "healed", models["text.txt"]
    shutil.copytree(models["transplanted"], bare, ignore=shutil.ignore_patterns("omp_record.json"))
    result = call(bare, healed, "--base", models["base"], "--text", text, "--tokens", 600)
    assert result.exit_code == 0, (result.output, result.exception)
    assert call(healed, tmp_path / "again", "--text", text, "--tokens", 600).exit_code == 0
    run = CliRunner().invoke
    audit = json.loads(run(main, ["audit", str(healed), "--json"]).stdout)
    assert audit["base"] == str(models["base"])
    for command in (["report", str(healed)], ["audit", str(healed), "--verify"]):
        result = run(main, command)
        assert result.exit_code == 1
        assert "describes a healing and no merge, since the healed model had no record" in " ".join(
            result.stderr.split()
        )


@pytest.mark.parametrize(("number", "save_it"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_interrupted(models: dict[str, Path], tmp_path: Path, number: int, save_it: bool) -> None:
    """A signal in the middle of training leaves nothing, or the best state on request."""
    out = tmp_path / "out"
    options = ["--text", models["text.txt"], "--tokens", "100000000", *(["--save-on-interrupt"] if save_it else [])]
    command = [Path(sys.executable).with_name("mergekit-omp"), "heal", models["transplanted"], out, *options]
    process = subprocess.Popen(
        [str(part) for part in command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ}
    )
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    written, deadline = b"", time.monotonic() + 120
    while b"bits per byte" not in written and time.monotonic() < deadline:
        written += process.stderr.read() or b""
        time.sleep(0.2)
    time.sleep(2)
    process.send_signal(number)
    _, rest = process.communicate(timeout=120)
    if save_it:
        assert process.returncode == 0, written + rest
        record = json.loads((out / "omp_record.json").read_text())
        assert record["heal"]["interrupted"] is True
        AutoModelForCausalLM.from_pretrained(out)
    else:
        assert process.returncode == 1
        assert b"nothing was written" in rest
        assert not out.exists()
    assert not out.with_name("out.unfinished").exists()


def test_less_memory_is_asked_for_before_giving_up(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a pass does not fit, smaller ones are made, then activations are computed twice, then it is told."""
    failures = iter([True, True, False])
    checkpointed = []
    real, enable = training.Trainer._logits, training.Student.enable_checkpointing

    def logits(self: training.Trainer, windows: list) -> torch.Tensor:
        if next(failures, False):
            raise torch.OutOfMemoryError("not enough")
        return real(self, windows)

    monkeypatch.setattr(training.Trainer, "_logits", logits)
    monkeypatch.setattr(training, "_WINDOWS_AT_ONCE", {"cpu": 2})
    monkeypatch.setattr(
        training.Student, "enable_checkpointing", lambda self: (checkpointed.append(True), enable(self))
    )
    told = heal(models, tmp_path / "out", "--text", models["text.txt"], "--tokens", 2000)
    assert told["steps"] > 0
    assert checkpointed == [True]

    failures = iter([True] * 100)
    sentence = refusal(models["transplanted"], tmp_path / "none", "--text", models["text.txt"], "--tokens", 2000)
    assert "The memory is used up" in sentence
    assert not (tmp_path / "none").exists()
