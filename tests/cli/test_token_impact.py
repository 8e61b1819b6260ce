"""Test ``mergekit-omp tokens``: new tokens ranked by uses times residual."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.checkpoints import ENGLISH, PYTHON, byte_level_tokenizer, make_model, run, save, sentencepiece_tokenizer
from transformers import AutoTokenizer

from mergekit_omp.cli.main import main


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base, donor = sentencepiece_tokenizer(ENGLISH), byte_level_tokenizer(PYTHON)
    paths = [save(folder / n, make_model(t, seed=i), t) for i, (n, t) in enumerate((("base", base), ("donor", donor)))]
    recipe = {
        "merge_method": "omp",
        "models": [{"model": str(paths[0])}],
        "tokenizer": {"source": str(paths[1])},
        "parameters": {"k": 4},
        "dtype": "float32",
    }
    run(recipe, folder / "out")
    return folder / "out"


def test_ranking(out: Path, tmp_path: Path) -> None:
    """Check counts against the text, residuals against the record, and the order against their product."""
    text = tmp_path / "text.txt"
    text.write_text("def realign(vocabulary):\n    return vocabulary\n" * 3 + "class Tokenizer: print(index)\n")
    result = CliRunner().invoke(main, ["tokens", str(out), "--text", str(text), "--json"])
    assert result.exit_code == 0, result.output
    ranked = json.loads(result.output)
    ids = AutoTokenizer.from_pretrained(out)(text.read_text())["input_ids"]
    solves = json.loads((out / "omp_record.json").read_text())["solves"]
    residuals = [dict(map(tuple, solve["tokens"])) for solve in solves]
    assert len(solves) == 2
    assert {token["id"] for token in ranked} == set(ids) & set(residuals[0])
    for token in ranked:
        assert token["uses"] == ids.count(token["id"])
        assert token["relative_residual"] == max(residual_of[token["id"]] for residual_of in residuals)
        assert token["impact"] == pytest.approx(token["uses"] * token["relative_residual"])
    impacts = [token["impact"] for token in ranked]
    assert impacts == sorted(impacts, reverse=True)
    assert len(ranked) > 3

    table = CliRunner().invoke(main, ["tokens", str(out), "--text", str(text), "--most", "1"]).output
    new = sum(token["uses"] for token in ranked)
    assert table.startswith(f"{new} of {len(ids)} tokens in the texts are approximated (")
    assert repr(ranked[0]["text"]) in table


def test_no_text(out: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    result = CliRunner().invoke(main, ["tokens", str(out), "--text", str(tmp_path / "empty.txt")])
    assert result.exit_code == 1
    assert result.output == "Error: --text: the file is empty; name a file with text.\n"
