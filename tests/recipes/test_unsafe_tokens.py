"""``unsafe_tokens``: rows that a donor plants are found while a recipe runs, and made again without the donor."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers.checkpoints import byte_level_tokenizer, run, save, tensors_of
from helpers.commands import merge_here, recipe, refusal
from helpers.planted import PARAMETERS, write_planted
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from mergekit_omp.audit import head
from mergekit_omp.audit.pieces import PieceCheck
from mergekit_omp.cli.main import main
from mergekit_omp.report import summary
from mergekit_omp.report.record import read_record
from mergekit_omp.vocabulary.matching import match_vocabularies
from mergekit_omp.vocabulary.segmentation import pieces
from mergekit_omp.vocabulary.tokens import read_vocabulary

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Planted = tuple[Path, Path, Path, list[int]]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Base, honest donor, donor that plants rows, and the ids of these."""
    return write_planted(tmp_path_factory.mktemp("planted"))


def transplanted(base: Path, donor: Path, out: Path, **more: str) -> dict[str, torch.Tensor]:
    return run(recipe(base, donor, parameters=PARAMETERS | more), out)


def audited_rows(out: Path) -> dict:
    [rows] = json.loads((out / "omp_record.json").read_text())["audit"]["rows"]
    return rows


def expected_rows(base: Path, donor: Path, matrix: torch.Tensor, ids: list[int], how: str) -> torch.Tensor:
    """The mean row, or the mean of the rows of a token's pieces in the base's tokenizer."""
    output, own = (read_vocabulary(AutoTokenizer.from_pretrained(folder)) for folder in (donor, base))
    if how == "mean":
        match = match_vocabularies(output, own)
        return matrix[match.rows[match.atoms()]].mean(dim=0).expand(len(ids), -1)
    split = pieces(output, AutoTokenizer.from_pretrained(base), ids, own)
    assert all(len(rows) > 1 for rows in split)
    return torch.stack([matrix[rows].mean(dim=0) for rows in split])


@pytest.mark.parametrize("how", ["mean", "pieces"])
def test_planted_rows_are_replaced_and_no_others(planted: Planted, how: str, tmp_path: Path) -> None:
    base, _, evil, new = planted
    kept = transplanted(base, evil, tmp_path / "kept")
    made = transplanted(base, evil, tmp_path / how, unsafe_tokens=how)
    before = tensors_of(base)
    for name in (EMBED, HEAD):
        differs = (made[name] != kept[name]).any(dim=1).nonzero().flatten().tolist()
        assert set(differs) == set(new)
        torch.testing.assert_close(made[name][new], expected_rows(base, evil, before[name], new, how))
    found = audited_rows(tmp_path / how)
    assert (found["flagged"], found["unsafe_tokens"]) == (len(new), how)
    assert {row["id"] for row in found["worst"]} == set(new)

    audit = json.loads(CliRunner().invoke(main, ["audit", str(tmp_path / how), "--json"]).stdout)
    assert not set(new) & {row["id"] for row in audit["flagged"]}


def test_rows_that_are_planted_in_the_input_embedding_are_replaced(tmp_path: Path) -> None:
    """In both matrices, although the head's rows are honest."""
    base, _, evil, new = write_planted(tmp_path, in_head=False)
    kept = transplanted(base, evil, tmp_path / "kept")
    made = transplanted(base, evil, tmp_path / "made", unsafe_tokens="pieces")
    before = tensors_of(base)
    for name in (EMBED, HEAD):
        assert set((made[name] != kept[name]).any(dim=1).nonzero().flatten().tolist()) == set(new)
        torch.testing.assert_close(made[name][new], expected_rows(base, evil, before[name], new, "pieces"))


def test_an_honest_donor_loses_nothing(planted: Planted, tmp_path: Path) -> None:
    base, honest, _, new = planted
    kept = transplanted(base, honest, tmp_path / "kept")
    made = transplanted(base, honest, tmp_path / "made", unsafe_tokens="pieces")
    assert all(torch.equal(kept[name], made[name]) for name in kept)
    found = audited_rows(tmp_path / "made")
    assert found["flagged"] == 0
    assert found["checked"] > 5 * len(new)
    assert audited_rows(tmp_path / "kept")["flagged"] == 0


def test_a_tied_head_is_checked_by_the_rows_that_it_gets(tmp_path: Path) -> None:
    base, _, evil, new = write_planted(tmp_path, tied=True)
    made = transplanted(base, evil, tmp_path / "out", unsafe_tokens="pieces")
    assert HEAD not in made
    matrix = tensors_of(base)[EMBED]
    assert audited_rows(tmp_path / "out")["flagged"] == len(new)
    torch.testing.assert_close(made[EMBED][new], expected_rows(base, evil, matrix, new, "pieces"))


def test_what_the_log_and_the_report_say(planted: Planted, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, _, evil, new = planted
    with caplog.at_level(logging.WARNING):
        result = merge_here(
            recipe(base, evil, parameters=PARAMETERS | {"unsafe_tokens": "mean"}),
            tmp_path / "out",
            "--write-model-card",
        )
    assert result.exit_code == 0, result.output
    sentence = "approximated rows are suspicious and were replaced by the mean row, the worst first: "
    assert f"{len(new)} of " in caplog.text
    assert sentence in caplog.text
    assert sentence in (tmp_path / "out" / "README.md").read_text()
    shown = CliRunner().invoke(main, ["report", str(tmp_path / "out"), "--html", str(tmp_path / "page.html")]).stdout
    assert sentence in " ".join(shown.split())
    assert "0 tokens are made of no text" in shown
    assert "23 of 23 scripts are given back" in shown
    assert "<h2>Audit</h2>" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("tied", [False, True])
def test_keep_warns_by_the_rows_alone(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record has what the written rows show; the head of a vocabulary as small is checked in this test alone."""
    monkeypatch.setattr(head, "FEWEST", 10)
    base, _, evil, planted = write_planted(tmp_path, tied=tied)
    written = transplanted(base, evil, tmp_path / "out")
    output, own = (read_vocabulary(AutoTokenizer.from_pretrained(folder)) for folder in (evil, base))
    match = match_vocabularies(output, own)
    new = match.is_new().nonzero().flatten()
    likely = head.likely_everywhere(written[EMBED if tied else HEAD], match.atoms(), new)
    assert likely is not None
    assert len(likely), "some planted row is high on any state"
    found = audited_rows(tmp_path / "out")
    expected = set(planted) | set(likely.tolist())
    assert (found["checked"], found["flagged"], found["unsafe_tokens"]) == (len(new), len(expected), "keep")
    far = f"{'input' if tied else 'head'} row far from its pieces"
    reasons = {row["id"]: row["reasons"] for row in found["worst"]}
    for id_, why in reasons.items():
        assert why == ["likely everywhere"] * (id_ in likely.tolist()) + [far] * (id_ in planted)
    [advice] = [line for line in summary.advice(read_record(tmp_path / "out")) if "the rows alone" in line]
    assert f"{len(expected)} of {len(new)} approximated rows are suspicious" in advice
    shown = CliRunner().invoke(main, ["report", str(tmp_path / "out"), "--html", str(tmp_path / "page.html")]).stdout
    assert " ".join(shown.split()).count("approximated rows are suspicious") == 1


def test_keep_warns_of_the_input_embedding(tmp_path: Path) -> None:
    base, _, evil, planted = write_planted(tmp_path, in_head=False)
    transplanted(base, evil, tmp_path / "out")
    reasons = {row["id"]: row["reasons"] for row in audited_rows(tmp_path / "out")["worst"]}
    assert reasons == {id_: ["input row far from its pieces"] for id_ in planted}


@pytest.mark.parametrize("how", ["keep", "pieces"])
def test_tokens_are_segmented_once(
    planted: Planted, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For both matrices of an untied model."""
    built, build = [], PieceCheck.__init__

    def count(check: PieceCheck, *given: Any) -> None:
        built.append(check)
        build(check, *given)

    monkeypatch.setattr(PieceCheck, "__init__", count)
    base, _, evil, new = planted
    written = transplanted(base, evil, tmp_path / "out", unsafe_tokens=how)
    assert HEAD in written
    assert len(built) == 1
    assert audited_rows(tmp_path / "out")["flagged"] == len(new)


def test_a_model_that_writes_no_text_is_refused(planted: Planted, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    base = save(tmp_path / "t5", T5ForConditionalGeneration(config), tokenizer)
    sentence = refusal(recipe(base, planted[1], parameters={"unsafe_tokens": "mean"}), tmp_path / "out")
    assert sentence.startswith("unsafe_tokens: mean runs the model on a text")
    assert sentence.endswith("remove unsafe_tokens.")
