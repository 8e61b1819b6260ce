"""Compare ``tokenizer.source: union``, built in one call, with mergekit's, which adds one token at a time."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import mergekit.tokenizer.build
import pytest
from helpers.checkpoints import ENGLISH, PYTHON, byte_level_tokenizer, make_model, save, sentencepiece_tokenizer
from helpers.commands import merge_here
from helpers.tokenizers_for_tests import llama3, qwen
from mergekit.common import ModelReference
from mergekit.tokenizer.build import build_union_tokenizer
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from mergekit_omp.recipe import resolve
from mergekit_omp.recipe.output_tokenizer import union_of

TEXTS = [*ENGLISH[:2], PYTHON[0], "a  b<|same|>c <|other|> d\n\n<tool>Größe</tool> 今日は 1234 <|wide|>  x<|plain|>y"]


def with_added(tokenizer: PreTrainedTokenizerFast, *tokens: AddedToken) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def first() -> PreTrainedTokenizerFast:
    return with_added(
        byte_level_tokenizer(ENGLISH, size=330, special=("<|im_start|>",)),
        AddedToken("<|same|>", special=True, normalized=False),
        AddedToken("<tool>", special=False, normalized=False, lstrip=True),
    )


def second() -> PreTrainedTokenizerFast:
    """Build a tokenizer with tokens of the first in other settings, and with tokens of its own."""
    return with_added(
        byte_level_tokenizer(PYTHON, size=350, eos="</s>"),
        AddedToken("<|same|>", special=False, normalized=True, rstrip=True),
        AddedToken("<tool>", special=True, single_word=True),
        AddedToken("<|wide|>", special=True, lstrip=True, rstrip=True),
        AddedToken("<|plain|>", special=False, normalized=True),
        AddedToken("return", special=False, normalized=False),
    )


def third() -> PreTrainedTokenizerFast:
    return with_added(sentencepiece_tokenizer(ENGLISH, size=420), AddedToken("<|other|>", special=True))


def described(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """Return everything that determines a tokenizer: its own file, and the additions of transformers."""
    return {
        "file": json.loads(tokenizer.backend_tokenizer.to_str()),
        "added": {id_: repr(token) for id_, token in tokenizer.added_tokens_decoder.items()},
        "roles": tokenizer.special_tokens_map,
        "ids": [tokenizer(text).input_ids for text in TEXTS],
        "texts": [tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) for text in TEXTS],
    }


@pytest.mark.parametrize(
    "tokenizers",
    [[first(), second()], [second(), first()], [first(), third()], [third(), second()], [first(), second(), third()]],
    ids=["bytes and bytes", "and the other way", "bytes and SentencePiece", "SentencePiece and bytes", "three"],
)
@pytest.mark.parametrize("short", [0, 2])
def test_as_mergekit_builds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizers: Sequence[PreTrainedTokenizerFast], short: int
) -> None:
    """Compare tokens, ids and settings, also after loading; ``short``: the last model has fewer rows than tokens.

    mergekit's ids follow the order in which the vocabulary is listed, which is undefined; here they follow the ids.
    """
    names = [ModelReference.model_validate(f"model{i}") for i in range(len(tokenizers))]
    rows = {name: len(tokenizer) for name, tokenizer in zip(names, tokenizers, strict=True)}
    rows[names[-1]] -= short
    sizes = {name.model: count for name, count in rows.items()}
    monkeypatch.setattr(mergekit.tokenizer.build, "get_vocab_size", lambda model, **_: sizes[model])
    unordered = PreTrainedTokenizerFast.get_vocab
    monkeypatch.setattr(
        PreTrainedTokenizerFast,
        "get_vocab",
        lambda self: dict(sorted(unordered(self).items(), key=lambda item: item[1])),
    )
    models = dict(zip(names, tokenizers, strict=True))
    before = [described(tokenizer) for tokenizer in tokenizers]

    expected, result = build_union_tokenizer(tokenizers[0], models), union_of(models, rows)
    assert [described(tokenizer) for tokenizer in tokenizers] == before, "the inputs stay as they are"
    assert len(result) > max(map(len, tokenizers))
    assert result.get_vocab() == expected.get_vocab()
    assert described(result) == described(expected)

    for name, tokenizer in (("result", result), ("expected", expected)):
        tokenizer.save_pretrained(tmp_path / name)
    read = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("result", "expected")]
    assert described(read[0]) == described(read[1])
    assert read[0].get_vocab() == result.get_vocab()
    files = [(tmp_path / name / "tokenizer.json").read_text() for name in ("result", "expected")]
    assert files[0] == files[1]


def test_two_real_families(capsys: pytest.CaptureFixture[str]) -> None:
    """Build the union of Qwen 2.5 and Llama 3 in one call, instead of adding 45,000 tokens in hours."""
    models = {
        ModelReference.model_validate(name): tokenizer for name, tokenizer in (("qwen", qwen()), ("llama", llama3()))
    }
    started = time.perf_counter()
    union = union_of(models, {name: len(tokenizer) for name, tokenizer in models.items()})
    with capsys.disabled():
        print(f"\nunion of Qwen 2.5 and Llama 3: {len(union):,} tokens, {time.perf_counter() - started:.1f} s")
    vocabulary = union.get_vocab()
    assert vocabulary.keys() == qwen().get_vocab().keys() | llama3().get_vocab().keys()
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert all(vocabulary[token] == id_ for token, id_ in qwen().get_vocab().items())


def test_built_once_per_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr(resolve, "union_of", lambda *given: built.append(given) or union_of(*given))
    for name in ("build_tokenizer", "build_union_tokenizer"):
        monkeypatch.setattr(mergekit.tokenizer.build, name, lambda *_, **__: pytest.fail("mergekit built one too"))
    paths = [
        save(tmp_path / name, make_model(tokenizer, seed=seed), tokenizer)
        for seed, (name, tokenizer) in enumerate({"a": first(), "c": third()}.items())
    ]
    recipe = {
        "merge_method": "omp_linear",
        "models": [{"model": str(path), "parameters": {"weight": 0.5}} for path in paths],
        "tokenizer": {"source": "union"},
        "parameters": {"k": 4},
        "dtype": "float32",
    }
    result = merge_here(recipe, tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    assert len(built) == 1
    union = union_of(*built[0])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == union.get_vocab()
