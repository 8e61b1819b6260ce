"""Test `mergekit-omp compare`, which runs several approximations, and `align`, which writes TokAlign's map."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from helpers.checkpoints import ENGLISH, PYTHON, byte_level_tokenizer, make_model, run, save, tensors_of
from helpers.commands import recipe
from transformers import AutoTokenizer

from mergekit_omp.cli.main import main
from mergekit_omp.parameters import Approximation
from mergekit_omp.report.comparison import with_approximation
from mergekit_omp.report.scores import evaluate


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a recipe with two models and a text."""
    folder = tmp_path_factory.mktemp("compare")
    ours, other = byte_level_tokenizer(ENGLISH, size=400), byte_level_tokenizer(PYTHON, size=360)
    base = save(folder / "base", make_model(ours, seed=1), ours)
    donor = save(folder / "donor", make_model(other, hidden=24, seed=2), other)
    (folder / "prose.txt").write_text("The river and the model, and every other token of the vocabulary.")
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe(base, donor)))
    return folder / "recipe.yml"


def compare(path: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["compare", str(path), "--text", str(path.parent / "prose.txt"), *options])


def test_the_table_agrees_with_eval(written: Path, tmp_path: Path) -> None:
    result = compare(written, "--approximations", "omp,subword,zero", "--json")
    assert result.exit_code == 0, result.output
    rows = {row["approximation"]: row for row in json.loads(result.stdout)}
    assert list(rows) == ["original", "omp", "subword", "zero"]
    text = {"prose": (written.parent / "prose.txt").read_text()}
    asked = yaml.safe_load(written.read_text())
    for name in ("omp", "zero"):
        run(with_approximation(asked, Approximation(name)), tmp_path / name)
        score = evaluate([tmp_path / name], text, progress=False)[0]
        assert rows[name]["score"]["overall"]["bits_per_byte"] == pytest.approx(score.overall.bits_per_byte, rel=1e-5)
        assert rows[name]["seconds"] > 0
        assert rows[name]["peak_memory_bytes"] > 0
    bits = [row["score"]["overall"]["bits_per_byte"] for row in rows.values()]
    assert len(set(bits)) == 4


def test_a_failing_method_is_a_row_and_the_plot_has_the_others(written: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    result = compare(written, "--approximations", "focus,mean", "--plot", str(plot))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("| approximation |  prose | overall | tokens/byte | seconds | peak MiB |")
    assert lines[1].strip("|-") == ""
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == ["focus", "failed", "", "", "", ""]
    assert lines[4].startswith("| mean ")
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[5] == ""
    assert lines[6].startswith("focus failed: parameters: approximation: focus needs either corpus: or vectors:")
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--approximations", "omp,subwrod"], "unknown approximation 'subwrod' (did you mean subword?)"),
        (["--approximations", ","], "no name in ','"),
        (["--plot", "/nowhere/plot.png"], "--plot: /nowhere/plot.png cannot be written"),
        (["--plot", "plot.txt"], "name a .png"),
    ],
)
def test_mistakes_are_reported_before_any_run(written: Path, options: list[str], message: str) -> None:
    result = compare(written, *options)
    assert result.exit_code == 1
    assert message in result.output


def test_every_approximation_of_a_recipe_is_replaced() -> None:
    asked = {
        "merge_method": "omp_linear",
        "models": [{"model": "a", "parameters": {"weight": 1, "approximation": "mean"}}, {"model": "b"}],
        "parameters": {"approximation": [{"filter": "lm_head", "value": "zero"}], "k": 3},
    }
    replaced = with_approximation(asked, Approximation.SUBWORD)
    assert replaced["models"] == [{"model": "a", "parameters": {"weight": 1}}, {"model": "b"}]
    assert replaced["parameters"] == {"k": 3, "approximation": "subword"}


def test_align_writes_the_map_that_tokalign_learns(written: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join([*ENGLISH, *PYTHON] * 10))
    asked = yaml.safe_load(written.read_text())
    learning = {**asked, "parameters": {"approximation": "tokalign", "corpus": str(corpus)}}
    (tmp_path / "learning.yml").write_text(yaml.safe_dump(learning))
    map_path = tmp_path / "map.json"
    result = CliRunner().invoke(main, ["align", str(tmp_path / "learning.yml"), str(map_path)])
    assert result.exit_code == 0, result.output
    mapping = json.loads(map_path.read_text())
    assert len(mapping) > 10
    given = {**asked, "parameters": {"approximation": "tokalign", "token_map": str(map_path)}}
    learnt, taken = run(learning, tmp_path / "learnt"), run(given, tmp_path / "taken")
    assert all(torch.equal(learnt[name], taken[name]) for name in learnt)
    new, old = next(iter(mapping.items()))
    base = AutoTokenizer.from_pretrained(asked["models"][0]["model"])
    row = AutoTokenizer.from_pretrained(asked["tokenizer"]["source"]).convert_tokens_to_ids(new)
    embedding = "model.embed_tokens.weight"
    assert torch.equal(
        taken[embedding][row],
        tensors_of(Path(asked["models"][0]["model"]))[embedding][base.convert_tokens_to_ids(old)],
    )


def test_align_needs_a_corpus(written: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["align", str(written), str(tmp_path / "map.json")])
    assert result.exit_code == 1
    assert "corpus" in result.output
    assert not (tmp_path / "map.json").exists()
