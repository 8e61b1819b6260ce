"""Damage every file that a run reads: the result is right, or an OmpError with a sentence.

``MERGEKIT_OMP_FUZZ_CASES=20000`` tries that many cases instead of a few, as far as ``MERGEKIT_OMP_FUZZ_SECONDS=900``
go; ``MERGEKIT_OMP_FUZZ_SEED=1`` tries others. ``MERGEKIT_OMP_FUZZ_KEEP=<folder>`` keeps the smallest file of each bug.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub.constants
import pytest
from helpers.fuzz_corpus import write_corpus
from helpers.fuzz_mutations import Damage, damaged_json, damaged_safetensors, damaged_sentencepiece
from helpers.fuzz_sandbox import Case, Outcome, Sandbox, recipe_of
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import mergekit_omp

mergekit_omp.register()

CASES = int(os.environ.get("MERGEKIT_OMP_FUZZ_CASES", "800"))
SEED = int(os.environ.get("MERGEKIT_OMP_FUZZ_SEED", "0"))
TIME_BOX = float(os.environ.get("MERGEKIT_OMP_FUZZ_SECONDS", "900"))


@dataclass(frozen=True)
class Kind:
    """A kind of file: which share of the cases it gets, in which models it is damaged, and how."""

    share: float
    models: tuple[str, ...]
    damage: Damage
    merge_every: int = 8


FAST = ("gemma", "qwen", "unigram", "wordpiece")
KINDS = {
    "tokenizer.json": Kind(0.36, FAST, damaged_json, 12),
    "tokenizer_config.json": Kind(0.08, (*FAST, "mistral"), damaged_json),
    "tokenizer.model": Kind(0.1, ("mistral",), damaged_sentencepiece),
    "tekken.json": Kind(0.05, ("tekken",), damaged_json),
    "config.json": Kind(0.12, ("gemma", "qwen", "wordpiece"), damaged_json, 4),
    "generation_config.json": Kind(0.02, ("gemma", "qwen"), damaged_json, 1),
    "model.safetensors.index.json": Kind(0.08, ("sharded",), damaged_json, 4),
    "model.safetensors": Kind(0.09, ("gemma", "qwen"), damaged_safetensors, 2),
}
RECIPES = 0.1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    sandbox = Sandbox(tmp_path)
    yield sandbox
    sandbox.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_damaged_file(corpus: dict[str, Path], sandbox: Sandbox, name: str) -> None:
    kind = KINDS[name]
    strategies = []
    for model in kind.models:
        origin = corpus[model]
        partner = corpus["qwen" if model == "gemma" else "gemma"]
        damaged = kind.damage((origin / name).read_bytes())
        for recipe in (recipe_of("@", partner), recipe_of(partner, "@")):
            strategies.append(
                st.builds(
                    Case,
                    st.just(recipe),
                    st.just(origin),
                    st.just(name),
                    damaged,
                    st.just(kind.merge_every),
                )
            )
    try_all(sandbox, name, st.one_of(strategies), kind.share)


@pytest.mark.slow
def test_damaged_recipe(corpus: dict[str, Path], sandbox: Sandbox) -> None:
    base, donor, other = (str(corpus[name]) for name in ("gemma", "qwen", "sharded"))
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
    slices = [{"sources": [{"model": base, "layer_range": [0, 1]}]}]
    sliced = {key: value for key, value in recipe.items() if key != "models"} | {"slices": slices}
    merged = {
        "merge_method": "omp_slerp",
        "base_model": donor,
        "models": [{"model": donor}, {"model": other}],
        "tokenizer": {"source": "union"},
        "parameters": {"t": 0.5, "k": 3, "approximation": "subword", "copy_rows": "never"},
        "out_dtype": "bfloat16",
    }
    damaged = [damaged_json(json.dumps(one).encode(), yaml=True) for one in (recipe, sliced, merged)]
    try_all(sandbox, "recipe", st.builds(Case, st.one_of(damaged)), RECIPES)


def try_all(sandbox: Sandbox, name: str, cases: st.SearchStrategy[Case], share: float) -> None:
    """Try the share of all cases, or those for which there is time, and fail for those with a bug."""
    outcomes: Counter[str] = Counter()
    bugs: dict[str, tuple[Case, Outcome]] = {}
    started = time.monotonic()

    @seed(SEED)
    @settings(
        max_examples=max(1, round(CASES * share)),
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def try_case(case: Case) -> None:
        if time.monotonic() - started > TIME_BOX * share:
            return
        outcome = sandbox(case)
        outcomes[outcome.kind] += 1
        if outcome.kind == "bug":
            key = "\n".join(line[:100] for line in outcome.text.splitlines()[-3:])
            if key not in bugs or len(case.data) < len(bugs[key][0].data):
                bugs[key] = case, outcome

    try_case()
    seconds = time.monotonic() - started
    print(f"\n{name}: {dict(sorted(outcomes.items()))} in {seconds:.0f} s")
    keep = os.environ.get("MERGEKIT_OMP_FUZZ_KEEP")
    for number, (case, outcome) in enumerate(bugs.values()):
        if keep:
            folder = Path(keep) / f"{name}-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / (case.name or "recipe.yml")).write_bytes(case.data or case.recipe)
            (folder / "recipe").write_bytes(case.recipe)
            (folder / "bug.txt").write_text(f"{case.origin}\n{outcome.text}")
    assert not bugs, "\n\n".join(f"{case.data[-500:] or case.recipe!r}\n{o.text[-3000:]}" for case, o in bugs.values())
    assert name == "generation_config.json" or outcomes["refused"], f"some damage is noticed: {outcomes}"
    assert outcomes["planned"] or outcomes["merged"], f"some damage is harmless: {outcomes}"
