"""Test that for any tokenizer files and recipes the result is an output or an OmpError."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from helpers.checkpoints import ENGLISH, PYTHON, byte_level_tokenizer, make_model, save, sentencepiece_tokenizer
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

import mergekit_omp
from mergekit_omp.checkpoints.tokenizers import load_tokenizer
from mergekit_omp.errors import OmpError
from mergekit_omp.recipe.resolve import resolve
from mergekit_omp.vocabulary.matching import match_vocabularies
from mergekit_omp.vocabulary.numerals import numeral_scheme
from mergekit_omp.vocabulary.tokens import read_vocabulary

mergekit_omp.register()

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 2**40)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["omp", "omp_linear", "union", "base", "", "▁", "ByteLevel", "<0x0A>", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base_tokenizer, donor_tokenizer = sentencepiece_tokenizer(ENGLISH, 340), byte_level_tokenizer(PYTHON, 300)
    return (
        save(folder / "base", make_model(base_tokenizer, layers=1), base_tokenizer),
        save(folder / "donor", make_model(donor_tokenizer, layers=1, hidden=24), donor_tokenizer),
    )


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Return every path into a JSON value; of long lists and mappings only the first few members."""
    yield path
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in list(members)[:12]:
        yield from places(member, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any, *, drop: bool) -> Any:
    """Copy a JSON value with one member replaced or missing."""
    if not path:
        return new
    value = copy.deepcopy(value)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    if drop:
        del holder[path[-1]]
    else:
        holder[path[-1]] = new
    return value


@st.composite
def mutations(draw: st.DrawFn, original: Any) -> Any:
    """Generate a JSON value with one or two members missing, or replaced by any value or by another member."""
    value = original
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(list(places(value))))
        drop = draw(st.sampled_from([True, False, False]))
        other = st.sampled_from(list(places(original))).map(lambda path: member(original, path))
        value = changed(value, path, draw(JSON | other), drop=drop)
    return value


def member(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def aborts(value: Any) -> bool:
    """Tell whether tokenizers aborts the process: it panics within a panic if merges lack the prefix."""
    model = value.get("model") if isinstance(value, dict) else None
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    return isinstance(prefix, str) and prefix != ""


@pytest.mark.parametrize("which", ["base", "donor"])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_arbitrary_tokenizer_files(pair: tuple[Path, Path], tmp_path: Path, which: str, file: str) -> None:
    original, other = pair if which == "base" else pair[::-1]
    target = tmp_path / "mutated"
    shutil.copytree(original, target)
    written = json.loads((original / file).read_text())
    vocabulary = read_vocabulary(load_tokenizer(reference(other), False, "models"))
    read = 0

    @FUZZ
    @given(mutations(written))
    def mutate(value: Any) -> None:
        nonlocal read
        assume(not aborts(value))
        (target / file).write_text(json.dumps(value))
        try:
            tokenizer = load_tokenizer(reference(target), False, "tokenizer.source")
            mutated = read_vocabulary(tokenizer)
            match = match_vocabularies(mutated, vocabulary)
            match_vocabularies(vocabulary, mutated)
            numeral_scheme(tokenizer, mutated)
        except OmpError:
            return
        read += 1
        assert len(match.rows) == mutated.size
        assert max(match.rows.tolist()) < vocabulary.size

    mutate()
    assert read > 10, "some mutations are harmless, so that the rest of the code is reached"


def reference(folder: Path) -> ModelReference:
    return ModelReference.model_validate(str(folder))


def test_arbitrary_recipes(pair: tuple[Path, Path]) -> None:
    base, donor = map(str, pair)
    recipe = {
        "merge_method": "omp",
        "models": [{"model": base, "parameters": {"k": 3}}],
        "tokenizer": {
            "source": donor,
            "tokens": {"<x>": {"source": {"kind": "model_token", "model": base, "token": "a"}, "force": True}},
            "pad_to_multiple_of": 8,
        },
        "parameters": {"k": [{"filter": "lm_head", "value": 2}, {"value": 5}], "new_vocab_scale": 0.9},
        "dtype": "float32",
        "chat_template": "auto",
    }
    sliced = recipe | {"models": None, "slices": [{"sources": [{"model": base, "layer_range": [0, 1]}]}]}
    outcomes = {"accepted": 0, "refused": 0}

    @FUZZ
    @given(mutations(recipe) | mutations(sliced))
    def mutate(value: Any) -> None:
        if not isinstance(value, dict) or not str(value.get("merge_method")).startswith("omp"):
            return  # not ours: mergekit's own exceptions
        try:
            resolve(MergeConfiguration.model_validate(value), MergeOptions())
            outcomes["accepted"] += 1
        except OmpError:
            outcomes["refused"] += 1

    mutate()
    assert min(outcomes.values()) > 5, outcomes
