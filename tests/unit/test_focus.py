"""Test FOCUS: rows are sparse means of the anchors with the most similar static vectors."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import ENGLISH, PYTHON, byte_level_tokenizer
from helpers.new_tokens_for_tests import refusal_by
from transformers import PreTrainedTokenizerBase

from mergekit_omp.errors import OmpError
from mergekit_omp.initializers.base import NewTokens
from mergekit_omp.initializers.focus import check_focus, focus
from mergekit_omp.initializers.vectors import check_vectors, read_vectors
from mergekit_omp.parameters import OmpParameters
from mergekit_omp.realign.problem import pose_problem
from mergekit_omp.vocabulary.alignment import Alignment
from mergekit_omp.vocabulary.matching import match_vocabularies
from mergekit_omp.vocabulary.tokens import read_vocabulary

pytest.importorskip("gensim")
pytest.importorskip("entmax")

D = 7


def pose(
    model: PreTrainedTokenizerBase, output: PreTrainedTokenizerBase, parameters: dict[str, str | Path]
) -> NewTokens:
    """Pose the new tokens of a model with another tokenizer."""
    of_model, of_output = read_vocabulary(model), read_vocabulary(output)
    match = match_vocabularies(of_output, of_model)
    problem = pose_problem(match, match_vocabularies(of_output, of_output))
    given = OmpParameters(**{name: str(value) for name, value in parameters.items()})
    return NewTokens(Alignment("model", model, of_model, match, match), problem, of_output, output, given)


@pytest.fixture
def new() -> Callable[..., NewTokens]:
    model, output = byte_level_tokenizer(ENGLISH, size=330), byte_level_tokenizer(PYTHON, size=330)
    return lambda **parameters: pose(model, output, parameters)


@pytest.fixture
def matrix(new: Callable[..., NewTokens]) -> torch.Tensor:
    return torch.randn(new().model.size, D, generator=torch.Generator().manual_seed(0))


def sparsemax(scores: list[float]) -> list[float]:
    """Compute sparsemax by bisection of the threshold above which the excesses sum to 1."""
    low, high = min(scores) - 1, max(scores)
    for _ in range(100):
        middle = (low + high) / 2
        if sum(max(0.0, score - middle) for score in scores) > 1:
            low = middle
        else:
            high = middle
    return [max(0.0, score - low) for score in scores]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def write_vectors(path: Path, vectors: dict[str, np.ndarray], *, header: bool = True) -> Path:
    lines = [f"{word} {' '.join(map(str, vector.tolist()))}" for word, vector in vectors.items()]
    if header:
        lines.insert(0, f"{len(vectors)} {len(next(iter(vectors.values())))}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("header", [True, False])
def test_rows_are_sparsemax_means_of_the_anchors(
    new: Callable[..., NewTokens], matrix: torch.Tensor, tmp_path: Path, header: bool
) -> None:
    """Compare with a slow computation; some tokens have no vector, and the vector of one anchor is zero."""
    problem, tokens = new().problem, new().output.tokens
    draw = np.random.default_rng(0)
    texts = [tokens[id_].text for id_ in [*problem.atom_ids.tolist(), *problem.target_ids.tolist()]]
    vectors = {text: draw.normal(size=5).astype(np.float32) for text in texts if hash_of(text) % 4}
    zero = next(tokens[id_].text for id_ in problem.atom_ids.tolist() if tokens[id_].text in vectors)
    vectors[zero] = np.zeros(5, dtype=np.float32)
    path = write_vectors(tmp_path / "tokens.vec", vectors, header=header)

    made = focus(new(vectors=path))(matrix, False)

    del vectors[zero]
    rows = new().anchor_rows.tolist()
    anchors = [
        (vectors[tokens[id_].text], matrix[row].numpy())
        for id_, row in zip(problem.atom_ids.tolist(), rows, strict=True)
        if tokens[id_].text in vectors
    ]
    assert 0 < len(anchors) < len(rows)
    lacking = 0
    for id_, row in zip(problem.target_ids.tolist(), made, strict=True):
        vector = vectors.get(tokens[id_].text)
        if vector is None:
            lacking += 1
            expected = matrix[rows].numpy().mean(axis=0)
        else:
            weights = sparsemax([cosine(vector, anchor) for anchor, _ in anchors])
            expected = sum(weight * own for weight, (_, own) in zip(weights, anchors, strict=True))
        np.testing.assert_allclose(row.numpy(), expected, atol=1e-4)
    assert 0 < lacking < len(made)


def hash_of(text: str) -> int:
    return sum(text.encode())


def test_word_vectors_are_found_by_text(new: Callable[..., NewTokens], matrix: torch.Tensor, tmp_path: Path) -> None:
    """Check that a token with a leading space has the vector of its word, close to that of one anchor."""
    problem, tokens = new().problem, new().output.tokens
    target = next(i for i, id_ in enumerate(problem.target_ids.tolist()) if tokens[id_].data == b" vocabulary")
    anchor = next(i for i, id_ in enumerate(problem.atom_ids.tolist()) if tokens[id_].data == b"x")
    other = next(i for i, id_ in enumerate(problem.atom_ids.tolist()) if tokens[id_].data == b"y")
    vectors = {"vocabulary": np.array([1.0, 0.0]), "x": np.array([1.0, 0.0]), "y": np.array([-1.0, 0.0])}
    path = write_vectors(tmp_path / "words.vec", vectors)
    made = focus(new(vectors=path))(matrix, False)
    torch.testing.assert_close(made[target], matrix[new().anchor_rows[anchor]])
    assert not torch.allclose(made[target], matrix[new().anchor_rows[other]])


def test_fasttext_files_have_vectors_by_n_grams(
    new: Callable[..., NewTokens], matrix: torch.Tensor, tmp_path: Path
) -> None:
    """Check that a fastText .bin file has a vector for a token that is not one of its words."""
    from gensim.models import FastText
    from gensim.models.fasttext import save_facebook_model

    words = [["vocabular", "river", "x", "model"], ["river", "x", "vocabular", "model"]] * 20
    trained = FastText(words, vector_size=8, min_count=1, bucket=1000, seed=0, workers=1)
    save_facebook_model(trained, str(tmp_path / "words.bin"))
    check_vectors(str(tmp_path / "words.bin"), "parameters.vectors")
    made = focus(new(vectors=tmp_path / "words.bin"))(matrix, False)
    tokens = new().output.tokens
    mean = matrix[new().anchor_rows].mean(dim=0)
    given = {
        tokens[id_].data: not torch.allclose(row, mean)
        for id_, row in zip(new().problem.target_ids.tolist(), made, strict=True)
    }
    assert given[b" vocabulary"]


def corpus(path: Path, lines: int = 400) -> Path:
    """Write lines of words about code, and lines of words about nature."""
    draw = random.Random(0)
    kinds = (
        (("return", "index", "print", "def"), ("range", "class", "self")),
        (("fox", "hills", "dog", "other"), ("river", "watch", "brown")),
    )
    written = []
    for _ in range(lines):
        around, within = draw.choice(kinds)
        written.append(" ".join(draw.choice(around if draw.random() < 0.5 else within) for _ in range(12)))
    path.write_text("\n".join(written), encoding="utf-8")
    return path


def test_vectors_trained_on_a_corpus(new: Callable[..., NewTokens], matrix: torch.Tensor, tmp_path: Path) -> None:
    """Check that rows from a text are reproducible and within the range of the anchors."""
    path = corpus(tmp_path / "corpus.txt")
    check_focus(new(corpus=path).parameters, "parameters")
    once, twice = (focus(new(corpus=path))(matrix, False) for _ in range(2))
    assert torch.equal(once, twice)
    assert once.shape == (len(new().problem.target_ids), D)
    anchors = matrix[new().anchor_rows]
    assert bool(((once <= anchors.amax(dim=0) + 1e-5) & (once >= anchors.amin(dim=0) - 1e-5)).all())
    in_text = (~torch.isclose(once, anchors.mean(dim=0), atol=1e-6).all(dim=1)).sum()
    assert 3 <= in_text < len(once)  # tokens that the text does not have get the mean


def test_the_head_and_half_precision_get_rows_of_their_own(
    new: Callable[..., NewTokens], matrix: torch.Tensor, tmp_path: Path
) -> None:
    make = focus(new(corpus=corpus(tmp_path / "corpus.txt", lines=50)))
    torch.testing.assert_close(make(2 * matrix, True), 2 * make(matrix, False))
    half = make(matrix.bfloat16(), False)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, make(matrix.bfloat16().float(), False))


def test_vectors_of_nothing_shared_are_refused(new: Callable[..., NewTokens], tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "other.vec", {"кот": np.ones(3), "пёс": np.ones(3)})
    with pytest.raises(OmpError, match=r"other\.vec has vectors for none of the tokens"):
        focus(new(vectors=path))


refusal = partial(refusal_by, check_focus)


def test_one_file_is_needed(tmp_path: Path) -> None:
    assert "needs either corpus: or vectors:, and none is set" in refusal()
    assert "both are set" in refusal(corpus=tmp_path / "a", vectors=tmp_path / "b")


def test_invalid_files(tmp_path: Path) -> None:
    """Check the message for a missing file, a folder, an empty file and a file without vectors."""
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "prose.vec").write_text("This is a text\nand no vectors.\n")
    (tmp_path / "short.vec").write_text("2 3\nword 1 2\n")
    missing = tmp_path / "missing"
    assert f"parameters.corpus: {missing} cannot be read (No such file" in refusal(corpus=missing)
    assert "(Is a directory)" in refusal(corpus=tmp_path)
    assert "latin.txt is not in UTF-8" in refusal(corpus=tmp_path / "latin.txt")
    assert "empty.txt does not start with text" in refusal(corpus=tmp_path / "empty.txt")
    assert f"parameters.vectors: {missing} cannot be read" in refusal(vectors=missing)
    for name in ("prose.vec", "short.vec", "empty.txt"):
        assert f"{name} is neither a fastText .bin file nor a text file" in refusal(vectors=tmp_path / name)


def test_a_broken_file_of_vectors_is_reported(tmp_path: Path) -> None:
    """Check an error that only appears when the complete file is read."""
    (tmp_path / "cut.vec").write_text("3 2\nword 1 2\nother 3\n")
    with pytest.raises(OmpError, match=r"parameters\.vectors: .*cut\.vec cannot be read"):
        read_vectors(str(tmp_path / "cut.vec"), "parameters.vectors")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mergekit_omp.initializers.vectors.find_spec", lambda name: None)
    assert "needs gensim and entmax: pip install 'mergekit-omp[vectors]'" in refusal(corpus=tmp_path)
