"""``mergekit-omp audit`` on a model whose donor was made to plant rows."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from helpers.checkpoints import ENGLISH, byte_level_tokenizer, make_model, save
from helpers.commands import merge_here, recipe
from helpers.planted import PARAMETERS, write_planted
from safetensors.torch import load_file, save_file

from mergekit_omp.cli.main import main


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, list[int]]:
    """Base, honest output, output with planted rows, and the ids of these."""
    folder = tmp_path_factory.mktemp("planted")
    base, honest, evil, new = write_planted(folder)
    for name, source in (("good", honest), ("bad", evil)):
        result = merge_here(recipe(base, source, parameters=PARAMETERS), folder / name, "--quiet")
        assert result.exit_code == 0, result.output
    return base, folder / "good", folder / "bad", new


def test_all_planted_rows_are_found(planted: tuple[Path, Path, Path, list[int]]) -> None:
    _, good, bad, new = planted
    found = json.loads(call("audit", bad, "--json").stdout)
    assert {row["id"] for row in found["flagged"]} >= set(new)
    assert all("likelier than its bytes allow" in row["reasons"] for row in found["flagged"] if row["id"] in new)
    honest = json.loads(call("audit", good, "--json").stdout)
    assert not honest["flagged"]
    assert found["rows"]["checked"] == honest["rows"]["checked"] >= len(new)
    assert found["rows"]["changed"] == 0


def test_rows_that_are_planted_in_the_input_embedding_alone(tmp_path: Path) -> None:
    """The head is honest, so that no token is likelier than its bytes allow."""
    base, _, evil, new = write_planted(tmp_path, in_head=False)
    assert merge_here(recipe(base, evil, parameters=PARAMETERS), tmp_path / "out", "--quiet").exit_code == 0
    found = json.loads(call("audit", tmp_path / "out", "--json").stdout)
    reasons = {row["id"]: row["reasons"] for row in found["flagged"]}
    assert set(reasons) == set(new)
    assert all(why == ["input row far from its pieces"] for why in reasons.values())
    assert all(row["distances"]["input row"] > 1 > row["distances"]["head row"] for row in found["flagged"])
    assert "input row far from its pieces" in call("audit", tmp_path / "out").stdout


def test_audit_as_text(planted: tuple[Path, Path, Path, list[int]], tmp_path: Path) -> None:
    base, _, bad, new = planted
    (tmp_path / "text.txt").write_text(ENGLISH[0])
    text = call("audit", bad, "--base", base, "--text", tmp_path / "text.txt").stdout
    assert f"beside {base}" in text
    assert "rows are suspicious, the worst first" in text
    assert all(f" {id_} " in text for id_ in new)
    assert "scripts are given back" in text


def test_audit_needs_a_base(planted: tuple[Path, Path, Path, list[int]], tmp_path: Path) -> None:
    base, good, _, _ = planted
    result = call("audit", base)
    assert result.exit_code == 1
    assert "has no omp_record.json" in result.stderr
    assert "name the base" not in result.stderr
    result = call("audit", good, "--base", tmp_path / "none")
    assert "--base: cannot read a tokenizer from" in " ".join(result.stderr.split())
    wider = byte_level_tokenizer(ENGLISH)
    save(tmp_path / "wider", make_model(wider, hidden=64), wider)
    result = call("audit", good, "--base", tmp_path / "wider")
    assert "--base: it is 64 wide, and the model 32" in " ".join(result.stderr.split())


def test_verify(planted: tuple[Path, Path, Path, list[int]], tmp_path: Path) -> None:
    _, good, _, _ = planted
    copy = shutil.copytree(good, tmp_path / "copy")
    assert call("audit", copy, "--verify").stdout.endswith("2 vocabulary matrices are as they were written.\n")
    (copy / "README.md").write_text("a card of one's own")
    (copy / "omp_report.html").write_text("a page")
    assert call("audit", copy, "--verify").exit_code == 0

    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"][7, 3] += 1e-3
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    (copy / "tokenizer_config.json").unlink()
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + "\n")
    result = call("audit", copy, "--verify", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {
        "is_unchanged": False,
        "changes": {
            "tokenizer.json": "changed",
            "tokenizer_config.json": "missing",
            "lm_head.weight": "changed",
        },
    }
    assert "lm_head.weight: changed\n" in call("audit", copy, "--verify").stdout


def test_the_record_names_the_donors_tokenizer(planted: tuple[Path, Path, Path, list[int]]) -> None:
    _, good, bad, _ = planted
    sums = []
    for out in (good, bad):
        record = json.loads((out / "omp_record.json").read_text())
        [donor] = [model for model in record["models"] if "donor" in model["roles"]]
        sums.append((donor["tokenizer_sha256"], record["sha256"]["tensors"]))
    assert sums[0][0] == sums[1][0], "both donors have one tokenizer"
    assert sums[0][1]["model.embed_tokens.weight"] == sums[1][1]["model.embed_tokens.weight"]
    assert sums[0][1]["lm_head.weight"] != sums[1][1]["lm_head.weight"]


def test_verify_without_sums(planted: tuple[Path, Path, Path, list[int]], tmp_path: Path) -> None:
    record = json.loads((planted[1] / "omp_record.json").read_text())
    del record["sha256"]
    (tmp_path / "omp_record.json").write_text(json.dumps(record))
    result = call("audit", tmp_path, "--verify")
    assert "has no SHA-256 sums; make the model again" in " ".join(result.stderr.split())
