"""Test `approximation: wechsel`: rows are means of the rows of tokens with similar meaning."""

import logging
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import ENGLISH, byte_level_tokenizer, make_model, run, save, sentencepiece_tokenizer
from helpers.commands import recipe, refusal
from helpers.new_tokens_for_tests import new_tokens
from transformers import PreTrainedTokenizerFast

from mergekit_omp.errors import OmpError
from mergekit_omp.initializers.base import NewTokens
from mergekit_omp.initializers.wechsel import check_wechsel, wechsel
from mergekit_omp.parameters import OmpParameters
from mergekit_omp.vocabulary.tokens import TokenKind

pytest.importorskip("gensim")

GERMAN = [
    "Der schnelle braune Fuchs springt über den faulen Hund, während andere Füchse auf den Fluss schauen.",
    "Jedes Wort hat eine Zeile in der Matrix, und jede Zeile hat ein Wort; die Wörter sind verschieden.",
] * 4
PAIRS = {
    "quick": "schnelle",
    "brown": "braune",
    "fox": "Fuchs",
    "foxes": "Füchse",
    "dog": "Hund",
    "river": "Fluss",
    "other": "andere",
    "row": "Zeile",
    "matrix": "Matrix",
    "every": "jede",
    "words": "Wörter",
    "the": "die",
}
WIDTH, WORD_WIDTH = 6, 4

Vectors = dict[str, np.ndarray]


def written(path: Path, vectors: Vectors) -> str:
    lines = [f"{word} {' '.join(map(repr, map(float, vector)))}" for word, vector in vectors.items()]
    width = len(next(iter(vectors.values())))
    path.write_text("\n".join([f"{len(vectors)} {width}", *lines]) + "\n")
    return str(path)


class Languages:
    """Words of two languages whose vectors are equal up to a rotation and noise, and a dictionary of them."""

    def __init__(self, folder: Path, noise: float = 0.1, turn: int = 1) -> None:
        random = np.random.default_rng(0)
        turned = np.linalg.qr(np.random.default_rng(turn).normal(size=(WORD_WIDTH, WORD_WIDTH)))[0]
        words = dict.fromkeys([*PAIRS, *" ".join(ENGLISH).replace(",", "").split()])
        self.english: Vectors = {word: random.normal(size=WORD_WIDTH) for word in words}
        noisy = {theirs: self.english[ours] + noise * random.normal(size=WORD_WIDTH) for ours, theirs in PAIRS.items()}
        noisy |= {word: random.normal(size=WORD_WIDTH) for word in ("Wort", "springt", "schauen", "verschieden")}
        self.german: Vectors = {word: vector @ turned for word, vector in noisy.items()}
        self.parameters = {
            "approximation": "wechsel",
            "source_vectors": written(folder / f"en{turn}.vec", self.english),
            "vectors": written(folder / f"de{turn}.vec", self.german),
            "dictionary": str(folder / "dictionary.txt"),
        }
        Path(self.parameters["dictionary"]).write_text("".join(f"{a}\t{b}\n" for a, b in PAIRS.items()))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer(ENGLISH, size=420)


@pytest.fixture(scope="module")
def weights() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(430, WIDTH, generator=generator).bfloat16() for _ in range(2))


@pytest.fixture(scope="module")
def german_tokens(tokenizer: PreTrainedTokenizerFast) -> partial[NewTokens]:
    return partial(new_tokens, tokenizer, sentencepiece_tokenizer(GERMAN, size=480))


def embeddings_by_words(vectors: Vectors, tokenizer: PreTrainedTokenizerFast) -> dict[int, np.ndarray]:
    """Compute the mean of the words that contain each token; without counts, the last of n words has 1, … n."""
    sums: dict[int, np.ndarray] = {}
    totals: dict[int, float] = {}
    for index, (word, vector) in enumerate(vectors.items()):
        count = len(vectors) - index
        for text in (word, " " + word):
            for id_ in set(tokenizer.encode(text, add_special_tokens=False)):
                sums[id_] = sums.get(id_, 0) + count * vector
                totals[id_] = totals.get(id_, 0) + count
    return {id_: sums[id_] / totals[id_] for id_ in sums}


def rotation(english: Vectors, german: Vectors) -> np.ndarray:
    """Solve orthogonal Procrustes by singular value decomposition, with each pair once per common form."""
    left, right = [], []
    for ours, theirs in PAIRS.items():
        for a in (ours, ours.lower(), ours.title()):
            for b in (theirs, theirs.lower(), theirs.title()):
                if a in english and b in german:
                    left.append(english[a])
                    right.append(german[b])
    u, _, v = np.linalg.svd(np.array(left).T @ np.array(right))
    return u @ v


def expected_row(
    weight: torch.Tensor, target: np.ndarray, sources: dict[int, np.ndarray], turned: np.ndarray
) -> np.ndarray | None:
    """Compute the softmax-weighted mean of the ten nearest tokens' rows; None for a tie between the tenth and next.

    Tokens that only occur in one common word are equally near to everything.
    """

    def cosine(id_: int) -> float:
        source = sources[id_] @ turned
        return float(source @ target / np.linalg.norm(source) / np.linalg.norm(target))

    *nearest, next_one = sorted(sources, key=cosine, reverse=True)[:11]
    if cosine(nearest[-1]) - cosine(next_one) < 1e-5:
        return None
    shares = [math.exp(cosine(id_) / 0.1) for id_ in nearest]
    return sum(share * weight[id_].float().numpy() for share, id_ in zip(shares, nearest, strict=True)) / sum(shares)


def test_rows_are_means_of_the_ten_nearest_tokens(
    tokenizer: PreTrainedTokenizerFast,
    german_tokens: partial[NewTokens],
    weights: tuple[torch.Tensor, torch.Tensor],
    tmp_path: Path,
) -> None:
    languages = Languages(tmp_path)
    new = german_tokens(languages.parameters)
    sources = embeddings_by_words(languages.english, tokenizer)
    targets = embeddings_by_words(languages.german, new.output_tokenizer)
    turned = rotation(languages.english, languages.german)
    make = wechsel(new)
    for weight, is_head in zip(weights, (False, True), strict=True):
        rows, compared = make(weight, is_head), 0
        assert rows.dtype == torch.float32
        for place, id_ in enumerate(new.problem.target_ids.tolist()):
            expected = expected_row(weight, targets[id_], sources, turned) if id_ in targets else None
            if expected is not None:
                np.testing.assert_allclose(rows[place].numpy(), expected, atol=1e-4)
                compared += 1
        assert compared > 20


def test_the_rotation_between_the_languages_does_not_matter(
    german_tokens: partial[NewTokens], weights: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    first, second = (
        wechsel(german_tokens(Languages(tmp_path, turn=turn).parameters))(weights[0], False) for turn in (1, 2)
    )
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_tokens_without_an_embedding_get_samples(
    german_tokens: partial[NewTokens],
    weights: tuple[torch.Tensor, torch.Tensor],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    languages = Languages(tmp_path)
    new = german_tokens(languages.parameters)
    in_words = embeddings_by_words(languages.german, new.output_tokenizer)
    drawn = [place for place, id_ in enumerate(new.problem.target_ids.tolist()) if id_ not in in_words]
    weight = weights[0] * 0.01 + 5
    caplog.set_level(logging.INFO)
    make = wechsel(new)
    rows = make(weight, False)[drawn]
    assert len(drawn) > 20
    assert f"{len(drawn)} have no embedding" in caplog.text
    assert rows.unique(dim=0).shape == rows.shape
    assert rows.mean().item() == pytest.approx(5, abs=0.02)
    assert rows.std().item() == pytest.approx(weight.float().std().item(), rel=0.5)
    torch.manual_seed(1)
    torch.testing.assert_close(wechsel(new)(weight, False)[drawn], rows, atol=0, rtol=0)


def test_ngrams_of_fasttext_make_embeddings_for_any_text(
    tokenizer: PreTrainedTokenizerFast,
    german_tokens: partial[NewTokens],
    weights: tuple[torch.Tensor, torch.Tensor],
    tmp_path: Path,
) -> None:
    from gensim.models import FastText
    from gensim.models.fasttext import save_facebook_model

    models = {}
    for name, texts in (("source_vectors", ENGLISH), ("vectors", GERMAN)):
        models[name] = FastText(
            [text.replace(",", "").split() for text in texts],
            vector_size=WORD_WIDTH,
            min_count=1,
            min_n=2,
            max_n=4,
            bucket=500,
            epochs=1,
            seed=1,
            workers=1,
        )
        save_facebook_model(models[name], str(tmp_path / f"{name}.bin"))
    english, german = (models[name].wv for name in ("source_vectors", "vectors"))
    dictionary = tmp_path / "dictionary.txt"
    dictionary.write_text("".join(f"{a} {b}\n" for a, b in PAIRS.items()))
    files = {name: str(tmp_path / f"{name}.bin") for name in models}
    new = german_tokens({"approximation": "wechsel", "dictionary": str(dictionary), **files})
    sources = {
        id_: english[token.data.decode().strip()]
        for id_, token in new.model.tokens.items()
        if token.kind is TokenKind.ORDINARY and token.data.isascii() and token.data.decode().strip()
    }
    turned = rotation(
        {word: english[word] for word in english.key_to_index}, {word: german[word] for word in german.key_to_index}
    )
    rows = wechsel(new)(weights[0], False)
    compared = 0
    for place, id_ in enumerate(new.problem.target_ids.tolist()):
        token = new.output.tokens[id_]
        if token.kind is TokenKind.ORDINARY and token.data.strip():
            expected = expected_row(weights[0], german[token.data.decode().strip()], sources, turned)
            if expected is not None:
                np.testing.assert_allclose(rows[place].numpy(), expected, atol=1e-3)
                compared += 1
    assert compared > 20


def test_words_of_the_dictionary_are_looked_up_in_other_cases(
    german_tokens: partial[NewTokens],
    weights: tuple[torch.Tensor, torch.Tensor],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Check `fuchs` for `Fuchs`, a byte order mark, empty lines and words of several parts."""
    languages = Languages(tmp_path)
    dictionary = Path(languages.parameters["dictionary"])
    caplog.set_level(logging.INFO)
    dictionary.write_text("\ufeffdog\thund\n\nfox\tfuchs\nno such words\tgibt es nicht\n")
    wechsel(german_tokens(languages.parameters))
    # the lower case of `dog` is `dog` itself, so that it counts twice
    assert "aligned with 4 pairs" in caplog.text


@pytest.mark.parametrize("missing", ["source_vectors", "vectors", "dictionary"])
def test_all_three_files_are_needed(tmp_path: Path, missing: str) -> None:
    given = {**Languages(tmp_path).parameters, missing: None}
    with pytest.raises(OmpError, match=f"^parameters: approximation: wechsel needs {missing}; add"):
        check_wechsel(OmpParameters(**given), "parameters")


@pytest.mark.parametrize("missing", ["source_vectors", "vectors", "dictionary"])
def test_a_missing_file_is_refused_early(tmp_path: Path, missing: str) -> None:
    given = {**Languages(tmp_path).parameters, missing: str(tmp_path / "nowhere")}
    with pytest.raises(OmpError, match=f"^parameters.{missing}: .*nowhere cannot be read"):
        check_wechsel(OmpParameters(**given), "parameters")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"dog\tHund\nfox\tder\tFuchs\n", "line 2 of .* has 3 columns; write a word, a tab and its translation"),
        (b"dog\tHund\n\nfox\n", "line 3 of .* has 1 columns"),
        (b"\n", "is empty; name a file with a word and its translation on each line"),
        (b"f\xfcchse foxes\n", "is not in UTF-8"),
    ],
)
def test_an_invalid_dictionary_is_refused_early(tmp_path: Path, content: bytes, expected: str) -> None:
    languages = Languages(tmp_path)
    Path(languages.parameters["dictionary"]).write_bytes(content)
    with pytest.raises(OmpError, match=f"^parameters.dictionary: .*{expected}"):
        check_wechsel(OmpParameters(**languages.parameters), "parameters")


def test_valid_files_pass(tmp_path: Path) -> None:
    check_wechsel(OmpParameters(**Languages(tmp_path).parameters), "parameters")


def test_a_dictionary_of_other_languages_is_refused(german_tokens: partial[NewTokens], tmp_path: Path) -> None:
    languages = Languages(tmp_path)
    Path(languages.parameters["dictionary"]).write_text("Hund\tdog\nFuchs\tfox\n")
    with pytest.raises(OmpError, match=r"^parameters.dictionary: no line of .* has its first word in source_vectors:"):
        wechsel(german_tokens(languages.parameters))


def test_vectors_of_two_widths_are_refused(german_tokens: partial[NewTokens], tmp_path: Path) -> None:
    languages = Languages(tmp_path)
    written(Path(languages.parameters["vectors"]), {word: np.ones(7) for word in languages.german})
    with pytest.raises(
        OmpError, match=r"has vectors of width 4, but vectors: .* of width 7; name vectors of one width"
    ):
        wechsel(german_tokens(languages.parameters))


def test_a_recipe_makes_the_rows_of_both_matrices(
    tokenizer: PreTrainedTokenizerFast, german_tokens: partial[NewTokens], tmp_path: Path
) -> None:
    """Check a tokenizer without a model as the source."""
    model = make_model(tokenizer)
    base, german = save(tmp_path / "base", model, tokenizer), tmp_path / "german"
    new = german_tokens(Languages(tmp_path).parameters)
    new.output_tokenizer.save_pretrained(german)
    made = run(recipe(base, german, parameters=Languages(tmp_path).parameters), tmp_path / "out")
    make, ids = wechsel(new), new.problem.target_ids
    for name, weight in (
        ("model.embed_tokens.weight", model.get_input_embeddings().weight),
        ("lm_head.weight", model.get_output_embeddings().weight),
    ):
        torch.testing.assert_close(made[name][ids], make(weight.detach(), False))
    lacking = recipe(base, german, parameters={"approximation": "wechsel"})
    assert "wechsel needs source_vectors and vectors and dictionary; add" in refusal(lacking, tmp_path / "other")
