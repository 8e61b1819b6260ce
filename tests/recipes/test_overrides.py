"""Test ``tokenizer.tokens``, reserved and under-trained tokens: rows that are neither kept nor approximated."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import ENGLISH, PYTHON, byte_level_tokenizer, make_model, run, save, tensors_of
from transformers import AutoTokenizer, PreTrainedTokenizerFast

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def saved(folder: Path, tokenizer: PreTrainedTokenizerFast, **more: Any) -> Path:
    return save(folder, make_model(tokenizer, **more), tokenizer)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write a base with ChatML's tokens, and a donor with those of Llama 2 and reserved ones."""
    folder = tmp_path_factory.mktemp("pair")
    base = byte_level_tokenizer(ENGLISH, size=360, special=("<|im_start|>", "<|im_end|>"))
    donor = byte_level_tokenizer(PYTHON, size=330, eos="</s>", special=("<|mine|>", "<unused0>", "<unused1>"))
    donor_model = {"architecture": "mistral", "hidden": 24, "seed": 3}
    return saved(folder / "base", base, seed=1), saved(folder / "donor", donor, **donor_model)


def transplant(
    pair: tuple[Path, Path], out: Path, tokens: dict | None = None, **parameters: Any
) -> dict[str, torch.Tensor]:
    tokenizer = {"source": str(pair[1]), "tokens": tokens}
    recipe = {"merge_method": "omp", "models": [{"model": str(pair[0])}], "tokenizer": tokenizer, "dtype": "float32"}
    return run({**recipe, "parameters": {"k": 5, "reconstruction": "combination", **parameters}}, out)


def from_text(model: Path, text: str) -> dict:
    return {"source": {"kind": "model_token", "model": str(model), "token": text}}


@pytest.mark.parametrize("tied", [False, True])
def test_a_text_of_several_tokens(pair: tuple[Path, Path], tmp_path: Path, tied: bool) -> None:
    """Check a text with special tokens: the embedding gets the mean of its rows, the head the first."""
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    base = saved(tmp_path / "base", tokenizer, tied=tied, seed=1)
    after = transplant((base, pair[1]), tmp_path / "out", {"<|mine|>": from_text(base, "<|im_start|>user\n")})
    ids = tokenizer.encode("<|im_start|>user\n", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids[0]) == "<|im_start|>"
    assert len(ids) > 2
    row = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()["<|mine|>"]
    before = tensors_of(base)
    torch.testing.assert_close(after[EMBED][row], before[EMBED][ids].mean(dim=0))
    assert (HEAD in after) is not tied
    if not tied:
        assert torch.equal(after[HEAD][row], before[HEAD][ids[0]])


def test_force_without_a_source_approximates_tokens_of_the_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    kept = transplant(pair, tmp_path / "kept")
    forced = transplant(pair, tmp_path / "forced", {"e": {"force": True}})
    lacking = transplant(pair, tmp_path / "lacking", {"e": {}})
    output, own = (AutoTokenizer.from_pretrained(path).get_vocab() for path in (tmp_path / "kept", pair[0]))
    for name in (EMBED, HEAD):
        before = tensors_of(pair[0])[name][own["e"]]
        assert torch.equal(kept[name][output["e"]], before)
        assert torch.equal(lacking[name][output["e"]], before), "nothing is said about it"
        row = forced[name][output["e"]]
        assert not torch.allclose(row, before)
        assert row.norm() > 0
        assert not torch.allclose(row, forced[name][output["<unused0>"]])


@pytest.mark.parametrize("has_free_rows", [True, False])
def test_reserved_tokens_get_the_mean_of_free_rows(
    pair: tuple[Path, Path], tmp_path: Path, has_free_rows: bool
) -> None:
    """Check rows of reserved tokens with another name, and rows beyond the model's vocabulary."""
    special = ("<|reserved_special_token_0|>",) if has_free_rows else ()
    tokenizer = byte_level_tokenizer(ENGLISH, size=360, special=special)
    size = len(tokenizer.get_vocab())
    base = saved(tmp_path / "base", tokenizer, rows=size + (3 if has_free_rows else 0), seed=1)
    after = transplant((base, pair[1]), tmp_path / "out")
    output = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    before, own = tensors_of(base), tokenizer.get_vocab()
    kept = [own[token] for token in output if token in own] + [tokenizer.eos_token_id]
    free = [own[special[0]], size, size + 1, size + 2] if has_free_rows else kept
    for name in (EMBED, HEAD):
        expected = before[name][free].mean(dim=0)
        torch.testing.assert_close(after[name][output["<unused0>"]], expected)
        torch.testing.assert_close(after[name][output["<unused1>"]], expected)


def test_magikarp(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Check tokens that are under-trained in the donor, in the model, or in both.

    A token that is under-trained in the donor is not an atom, and gets the mean of free rows if it is new. Text that
    is under-trained in the model only is a target. Other tokens keep the model's row.
    """
    base_tokenizer, donor_tokenizer = (AutoTokenizer.from_pretrained(path) for path in pair)
    own, new = base_tokenizer.get_vocab(), donor_tokenizer.get_vocab()
    shared = sorted(token for token in new if token in own and token.isalpha() and len(token) == 1)
    lacking = sorted(token for token in new if token not in own and token.isalpha())
    dead_in_base, dead_in_donor = shared[0], shared[1]
    models = {
        "base": make_model(base_tokenizer, rows=len(own) + 2, seed=1),
        "donor": make_model(donor_tokenizer, architecture="mistral", hidden=24, seed=3),
    }
    with torch.no_grad():
        models["base"].get_input_embeddings().weight[own[dead_in_base]] *= 1e-3
        models["donor"].get_input_embeddings().weight[[new[dead_in_donor], new[lacking[0]]]] *= 1e-3
    tokenizers = {"base": base_tokenizer, "donor": donor_tokenizer}
    base, donor = (save(tmp_path / name, model, tokenizers[name]) for name, model in models.items())

    plain = transplant((base, donor), tmp_path / "plain")
    after = transplant((base, donor), tmp_path / "magikarp", magikarp=True)
    before = tensors_of(base)
    for name in (EMBED, HEAD):
        assert torch.equal(plain[name][new[dead_in_base]], before[name][own[dead_in_base]])
        assert not torch.equal(after[name][new[dead_in_base]], before[name][own[dead_in_base]]), "solved for"
        assert torch.equal(after[name][new[dead_in_donor]], before[name][own[dead_in_donor]]), "kept"
        torch.testing.assert_close(after[name][new[lacking[0]]], before[name][len(own) :].mean(dim=0))
        assert not torch.equal(plain[name][new[lacking[0]]], after[name][new[lacking[0]]])
    assert after[EMBED][new[dead_in_base]].norm() > 100 * before[EMBED][own[dead_in_base]].norm()


def test_magikarp_is_a_parameter_of_each_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Compare inputs with and without it with separate transplants."""
    again = saved(tmp_path / "again", AutoTokenizer.from_pretrained(pair[0]), seed=2)
    models = [{"model": str(pair[0])}, {"model": str(again), "parameters": {"magikarp": True}}]
    recipe = {"merge_method": "omp_linear", "models": models, "tokenizer": {"source": str(pair[1])}}
    parameters = {"k": 5, "reconstruction": "combination", "weight": 0.5}
    merged = run({**recipe, "parameters": parameters, "dtype": "float32"}, tmp_path / "out")
    one = transplant(pair, tmp_path / "one")
    two = transplant((again, pair[1]), tmp_path / "two", magikarp=True)
    for name in (EMBED, HEAD):
        torch.testing.assert_close(merged[name], (one[name] + two[name]) / 2)
