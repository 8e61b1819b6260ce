"""Test TokAlign: each new token gets the row of a token of the model, by a given or a learnt map."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import ENGLISH, PYTHON, byte_level_tokenizer, sentencepiece_tokenizer
from helpers.new_tokens_for_tests import refusal_by
from test_focus import cosine, pose

from mergekit_omp.errors import OmpError
from mergekit_omp.initializers import tokalign as module
from mergekit_omp.initializers.base import NewTokens
from mergekit_omp.initializers.tokalign import check_tokalign, read_token_map, tokalign, token_map, write_token_map
from mergekit_omp.parameters import OmpParameters

pytest.importorskip("gensim")

D = 7


@pytest.fixture
def new() -> Callable[..., NewTokens]:
    model, output = byte_level_tokenizer(ENGLISH, size=330), byte_level_tokenizer(PYTHON, size=330)
    return lambda **parameters: pose(model, output, parameters)


@pytest.fixture
def matrix(new: Callable[..., NewTokens]) -> torch.Tensor:
    return torch.randn(new().model.size, D, generator=torch.Generator().manual_seed(0))


def test_rows_are_copied_by_a_given_map(new: Callable[..., NewTokens], matrix: torch.Tensor, tmp_path: Path) -> None:
    """Check copied rows bit for bit, the mean of the anchors' rows elsewhere, and entries of shared tokens."""
    posed = new()
    ids = posed.problem.target_ids.tolist()
    row_of = {token.text: id_ for id_, token in posed.model.tokens.items()}
    mapping = {posed.output.tokens[ids[0]].text: "x", posed.output.tokens[ids[2]].text: "Ġthe", "a": "b"}
    write_token_map(tmp_path / "map.json", mapping)
    made = tokalign(new(token_map=tmp_path / "map.json"))(matrix, False)
    assert torch.equal(made[0], matrix[row_of["x"]])
    assert torch.equal(made[2], matrix[row_of["Ġthe"]])
    mean = matrix[posed.anchor_rows].mean(dim=0)
    torch.testing.assert_close(made[1], mean)
    torch.testing.assert_close(made[3:], mean.repeat(len(made) - 3, 1))


def test_a_map_survives_its_file(tmp_path: Path) -> None:
    """Check also strings that are not valid text, which some vocabularies contain."""
    mapping = {"Ġthe": "▁the", "\n\n": "<0x0A>", '"': "\\", "\udcff": "é", "日": "🙂"}
    write_token_map(tmp_path / "map.json", mapping)
    assert read_token_map(tmp_path / "map.json", "parameters.token_map") == mapping


def test_the_map_is_that_of_a_slow_computation(new: Callable[..., NewTokens], monkeypatch: pytest.MonkeyPatch) -> None:
    """Use random vectors with a common direction instead of trained ones; a third of the tokens has none."""
    posed = new(corpus="unused.txt")
    draw = torch.Generator().manual_seed(0)
    drawn = {}
    for vocabulary in (posed.output, posed.model):
        drawn[vocabulary] = torch.randn(vocabulary.size, 4, generator=draw) + 1
        drawn[vocabulary][torch.rand(vocabulary.size, generator=draw) < 1 / 3] = 0
    monkeypatch.setattr(module, "learn_skipgram_vectors", lambda corpus, vocabulary, tokenizer: drawn[vocabulary])
    of_output, of_model = (centred(drawn[vocabulary].double().numpy()) for vocabulary in (posed.output, posed.model))
    anchors = zip(posed.problem.atom_ids.tolist(), posed.anchor_rows.tolist(), strict=True)
    shared = [(id_, row) for id_, row in anchors if of_output[id_].any() and of_model[row].any()]
    assert 3 < len(shared) < module.PIVOTS  # all are pivots

    of_rows = {
        row: np.array([cosine(vector, of_model[pivot]) for _, pivot in shared])
        for row, vector in enumerate(of_model)
        if vector.any()
    }
    expected = {}
    for id_ in posed.problem.target_ids.tolist():
        if of_output[id_].any():
            own = np.array([cosine(of_output[id_], of_output[pivot]) for pivot, _ in shared])
            best = max(of_rows, key=lambda row, own=own: cosine(own, of_rows[row]))
            expected[posed.output.tokens[id_].text] = posed.model.tokens[best].text
    assert 0 < len(expected) < len(posed.problem.target_ids)
    assert len(set(expected.values())) > 3
    assert token_map(posed) == expected


def centred(vectors: np.ndarray) -> np.ndarray:
    """Normalise vectors and subtract the mean of those that are not zero."""
    units = [vector / np.sqrt(vector @ vector) for vector in vectors if vector.any()]
    mean = sum(units) / len(units)
    return np.stack([vector / np.sqrt(vector @ vector) - mean if vector.any() else vector for vector in vectors])


def test_tokens_with_similar_use_are_aligned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Check that shared tokens treated as new are mapped to themselves, for tokenizers with other strings and ids."""
    monkeypatch.setattr("mergekit_omp.initializers.vectors.ENOUGH_TOKENS", 150_000)  # enough for sixty words
    model, output = byte_level_tokenizer(ENGLISH, size=420), sentencepiece_tokenizer(ENGLISH, size=520)
    posed = pose(model, output, {"corpus": tmp_path / "corpus.txt"})
    problem, tokens = posed.problem, posed.output.tokens
    is_word = [re.fullmatch(rb" [a-z]{2,}", tokens[id_].data) is not None for id_ in problem.atom_ids.tolist()]
    words = [tokens[id_].data.decode() for id_ in problem.atom_ids[is_word].tolist()]
    write_walk(tmp_path / "corpus.txt", words)

    held_out = torch.tensor(is_word) & (torch.arange(len(is_word)) % 4 == 0)
    hidden = replace(
        problem,
        target_ids=problem.atom_ids[held_out],
        target_rows=problem.atom_rows[held_out],
        atom_ids=problem.atom_ids[~held_out],
        atom_rows=problem.atom_rows[~held_out],
    )
    found = token_map(replace(posed, problem=hidden))
    own_rows = posed.anchor_rows[held_out].tolist()
    own = {
        tokens[id_].text: posed.model.tokens[row].text
        for id_, row in zip(hidden.target_ids.tolist(), own_rows, strict=True)
    }
    assert len(own) > 8
    assert found.keys() == own.keys()
    assert sum(found[text] == own[text] for text in own) > 0.8 * len(own)


def write_walk(path: Path, words: list[str]) -> None:
    """Write a text in which each word is followed by one of three others."""
    draw = random.Random(0)
    after = {word: draw.sample(words, 3) for word in words}
    walk = [words[0]]
    while len(walk) < 15_000:
        walk.append(draw.choice(after[walk[-1]]) if draw.random() < 0.9 else draw.choice(words))
    path.write_text(
        "\n".join("".join(walk[start : start + 50]) for start in range(0, len(walk), 50)), encoding="utf-8"
    )


refusal = partial(refusal_by, check_tokalign)


def test_one_file_is_needed(tmp_path: Path) -> None:
    assert "needs either corpus: or token_map:, and none is set" in refusal()
    assert "both are set" in refusal(corpus=tmp_path / "a", token_map=tmp_path / "b")


def test_invalid_files(tmp_path: Path) -> None:
    (tmp_path / "prose.json").write_text("This is a text.")
    (tmp_path / "list.json").write_text('["a", "b"]')
    (tmp_path / "ids.json").write_text(json.dumps({"a": 12}))
    missing = tmp_path / "missing"
    assert f"parameters.corpus: {missing} cannot be read (No such file" in refusal(corpus=missing)
    assert f"parameters.token_map: {missing} cannot be read (No such file" in refusal(token_map=missing)
    assert "prose.json is not JSON" in refusal(token_map=tmp_path / "prose.json")
    assert "does not map strings to strings" in refusal(token_map=tmp_path / "list.json")
    assert "does not map strings to strings" in refusal(token_map=tmp_path / "ids.json")


def test_a_map_needs_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mergekit_omp.initializers.vectors.find_spec", lambda name: None)
    write_token_map(tmp_path / "map.json", {"a": "b"})
    check_tokalign(OmpParameters(token_map=str(tmp_path / "map.json")), "parameters")
    assert "needs gensim: pip install 'mergekit-omp[vectors]'" in refusal(corpus=tmp_path)


def test_unknown_tokens_of_a_map_are_named(new: Callable[..., NewTokens], tmp_path: Path) -> None:
    """Check unknown tokens on either side, of which three are named."""
    path = tmp_path / "map.json"
    write_token_map(path, {f"unheard{n}": "a" for n in range(5)})
    with pytest.raises(OmpError, match=r"maps 5 tokens that the output tokenizer does not have .*'unheard2'\);"):
        tokalign(new(token_map=path))
    write_token_map(path, {"a": "unheard", "b": "b"})
    with pytest.raises(OmpError, match=r"maps to 1 tokens that the model does not have \(first: 'unheard'\)"):
        tokalign(new(token_map=path))


def test_a_corpus_without_shared_tokens_is_refused(
    new: Callable[..., NewTokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module, "learn_skipgram_vectors", lambda corpus, vocabulary, _: torch.zeros(vocabulary.size, 4)
    )
    with pytest.raises(
        OmpError, match=r"parameters\.corpus: no token of both vocabularies is frequent enough in other\.txt"
    ):
        token_map(new(corpus="other.txt"))
