"""Test `approximation:` in recipes: mergekit's own methods, and a tokenizer without a model as the source."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mergekit.scripts.tokensurgeon as surgeon
import pytest
import torch
from click.testing import CliRunner
from helpers.checkpoints import (
    ENGLISH,
    PYTHON,
    byte_level_tokenizer,
    make_model,
    run,
    save,
    sentencepiece_tokenizer,
    tensors_of,
    word_files,
)
from helpers.commands import merge_here, recipe, refusal
from helpers.tiny_hypernetwork import save_hypernetwork
from mergekit.tokenizer.normalization import TokenMarker
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_omp.cli.main import main
from mergekit_omp.initializers import tokensurgeon
from mergekit_omp.initializers.registry import INITIALIZERS, without_donor
from mergekit_omp.parameters import Approximation, OmpParameters
from mergekit_omp.realign.rows import NOISE_SEED

SPECIAL = TokenMarker.SPECIAL
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
K = 5
WITHOUT_FILES = [name for name in without_donor() if name in ("mean", "zero", "randn", "john_hewitt", "subword")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    tokenizer = byte_level_tokenizer(ENGLISH, size=400)
    return save(folder / "base", make_model(tokenizer, seed=1), tokenizer)


@pytest.fixture(scope="module")
def donor(folder: Path) -> Path:
    tokenizer = byte_level_tokenizer(PYTHON, size=360)
    return save(folder / "donor", make_model(tokenizer, hidden=24, seed=2), tokenizer)


@pytest.fixture(scope="module")
def tokenizer_alone(folder: Path) -> Path:
    byte_level_tokenizer(PYTHON, size=360).save_pretrained(folder / "alone")
    return folder / "alone"


def transplant(base: Path, donor: Path, out: Path, approximation: str, **parameters: Any) -> dict[str, torch.Tensor]:
    return run(recipe(base, donor, parameters={"approximation": approximation, "k": K, **parameters}), out)


@pytest.fixture
def with_fixes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fix the bugs of mergekit-tokensurgeon that are worked around, and use this package's random numbers."""

    def before_each(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def seeded(*args: Any, **kwargs: Any) -> torch.Tensor:
            torch.manual_seed(NOISE_SEED)
            return make(*args, **kwargs)

        return seeded

    monkeypatch.setattr(surgeon, "compute_new_embeddings", before_each(surgeon.compute_new_embeddings))
    read = surgeon.normalized_vocabulary

    def without_special(tokenizer: Any) -> dict[Any, int]:
        """Exclude special tokens from the anchors, with ascending ids."""
        tokens = sorted(read(tokenizer).items(), key=lambda item: item[1])
        return {token: id_ for token, id_ in tokens if (token[0] if isinstance(token, tuple) else 0) != SPECIAL}

    monkeypatch.setattr(surgeon, "normalized_vocabulary", without_special)
    basis = surgeon.compute_token_basis
    monkeypatch.setattr(surgeon, "compute_token_basis", lambda *args: basis(*args[:-1], args[-1].k))


CASES = [
    ("mean", {}, []),
    ("zero", {}, []),
    ("randn", {}, []),
    ("john_hewitt", {}, []),
    ("landmark_pca", {}, []),
    ("stb", {}, []),
    ("subword", {}, []),
    ("subword", {"subword_method": "sum"}, ["-s", "sum"]),
    ("subword", {"subword_method": "weighted_mean"}, ["-s", "weighted_mean"]),
    ("subword", {"subword_method": "first_last"}, ["-s", "first_last"]),
    ("common_interpolation", {}, []),
    ("common_interpolation", {"cosine_similarity": True}, ["-c"]),
    ("common_interpolation", {"weight_scheme": "barycentric"}, ["-w", "barycentric"]),
    ("common_interpolation", {"weight_scheme": "least_squares"}, ["-w", "least_squares"]),
]


@pytest.mark.usefixtures("with_fixes")
@pytest.mark.parametrize(("approximation", "parameters", "flags"), CASES)
def test_agrees_with_tokensurgeon_on_the_same_match(
    base: Path, donor: Path, tmp_path: Path, approximation: str, parameters: dict[str, Any], flags: list[str]
) -> None:
    arguments = [str(base), str(donor), str(tmp_path / "theirs"), "-a", approximation, "-k", str(K), *flags]
    result = CliRunner().invoke(surgeon.main, [*arguments, "--batch-size", "-1"], catch_exceptions=False)
    assert result.exit_code == 0
    theirs = tensors_of(tmp_path / "theirs")
    ours = transplant(base, donor, tmp_path / "ours", approximation, **parameters)
    texts = AutoTokenizer.from_pretrained(donor).convert_ids_to_tokens(range(360))
    # tokensurgeon splits a line end as the letter Ċ that byte-level vocabularies write for it
    compared = [id_ for id_, text in enumerate(texts) if text.removeprefix("Ġ").isascii() and text[0] != "<"]
    assert len(compared) > 150
    for name in (EMBED, HEAD):
        torch.testing.assert_close(ours[name][compared], theirs[name][compared], rtol=1e-3, atol=1e-4)
    assert not torch.equal(ours[EMBED], ours[HEAD])


def test_mp_rope_is_mergekits_with_the_rotary_bases_of_both(base: Path, donor: Path, tmp_path: Path) -> None:
    ours = transplant(base, donor, tmp_path / "ours", "mp_rope")
    theirs, its = tensors_of(base)[EMBED], tensors_of(donor)[EMBED]
    of_base, of_donor = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (base, donor))
    shared = sorted(of_base.keys() & of_donor.keys(), key=of_donor.get)
    new = sorted(of_donor.keys() - of_base.keys(), key=of_donor.get)
    expected = surgeon.batch_mp_rope(
        its[[of_donor[token] for token in new]],
        its[[of_donor[token] for token in shared]],
        theirs[[of_base[token] for token in shared]],
        k=K,
        num_heads_a=4,
        num_heads_b=4,
        a_rope_base=10000.0,
        b_rope_base=10000.0,
    )[2]
    torch.testing.assert_close(ours[EMBED][[of_donor[token] for token in new]], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("approximation", ["john_hewitt", "randn", "landmark_pca", "common_interpolation", "stb"])
def test_the_same_recipe_gives_the_same_rows(base: Path, donor: Path, tmp_path: Path, approximation: str) -> None:
    torch.manual_seed(1)
    first = transplant(base, donor, tmp_path / "first", approximation)
    torch.manual_seed(2)
    second = transplant(base, donor, tmp_path / "second", approximation)
    torch.testing.assert_close(first[EMBED], second[EMBED], rtol=1e-3, atol=1e-4)


def test_john_hewitt_with_fewer_rows_than_dimensions_has_small_noise(tmp_path: Path) -> None:
    base_tokenizer, tokenizer = byte_level_tokenizer(ENGLISH, size=300), byte_level_tokenizer(PYTHON, size=300)
    base = save(tmp_path / "base", make_model(base_tokenizer, hidden=512, layers=1), base_tokenizer)
    donor = save(tmp_path / "donor", make_model(tokenizer, layers=1), tokenizer)
    made = transplant(base, donor, tmp_path / "out", "john_hewitt")[EMBED]
    old = set(base_tokenizer.get_vocab())
    new = [id_ for token, id_ in tokenizer.get_vocab().items() if token not in old]
    assert made[new].std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    "approximation",
    [
        approximation.value
        for approximation in INITIALIZERS
        if approximation.value in ("omp", *dict((name, None) for name, *_ in CASES))
    ],
)
def test_works_for_other_tokenizers_and_types(tmp_path: Path, approximation: str) -> None:
    base_tokenizer, tokenizer = byte_level_tokenizer(ENGLISH, size=400), sentencepiece_tokenizer(PYTHON, size=400)
    base = save(tmp_path / "base", make_model(base_tokenizer, tied=True, dtype=torch.bfloat16), base_tokenizer)
    donor = save(tmp_path / "donor", make_model(tokenizer, hidden=24, dtype=torch.float16), tokenizer)
    parameters = {"approximation": approximation, "k": 10_000}
    made = run(recipe(base, donor, parameters=parameters, dtype="bfloat16"), tmp_path / "out")
    assert made[EMBED].dtype == torch.bfloat16
    assert bool(made[EMBED].isfinite().all())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert bool(loaded(torch.arange(5, 25)[None]).logits.isfinite().all())


@pytest.mark.parametrize("approximation", WITHOUT_FILES)
def test_a_tokenizer_without_a_model_is_enough(
    base: Path, donor: Path, tokenizer_alone: Path, tmp_path: Path, approximation: str
) -> None:
    alone = transplant(base, tokenizer_alone, tmp_path / "alone", approximation)
    with_model = transplant(base, donor, tmp_path / "with_model", approximation)
    for name in (EMBED, HEAD):
        assert torch.equal(alone[name], with_model[name])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "alone")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "alone")
    text = "while True: index"
    written = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(written[0]).startswith(text)


@pytest.fixture(scope="module")
def files(base: Path, folder: Path) -> dict[str, dict[str, str]]:
    """Write the files of methods that need more than the two models."""
    paths = {key: str(path) for key, path in word_files(folder).items()}
    save_hypernetwork(folder / "hypernetwork", AutoTokenizer.from_pretrained(base), n_embd=32)
    return {
        "focus": {"corpus": paths["corpus"]},
        "tokalign": {"corpus": paths["corpus"]},
        "wechsel": {key: paths[key] for key in ("vectors", "source_vectors", "dictionary")},
        "zett": {"hypernetwork": str(folder / "hypernetwork")},
    }


@pytest.mark.parametrize("approximation", ["focus", "tokalign", "wechsel", "zett"])
def test_a_tokenizer_without_a_model_is_enough_for_methods_with_files(
    base: Path, tokenizer_alone: Path, tmp_path: Path, files: dict[str, dict[str, str]], approximation: str
) -> None:
    parameters = {"approximation": approximation, **files[approximation]}
    made = run(recipe(base, tokenizer_alone, parameters=parameters), tmp_path / "out", trust_remote_code=True)
    mean = transplant(base, tokenizer_alone, tmp_path / "mean", "mean")
    of_base = AutoTokenizer.from_pretrained(base).get_vocab()
    of_output = AutoTokenizer.from_pretrained(tokenizer_alone).get_vocab()
    new = [id_ for token, id_ in of_output.items() if token not in of_base]
    assert bool(made[EMBED].isfinite().all())
    assert (made[EMBED][new] != mean[EMBED][new]).any(dim=1).sum() > len(new) / 4
    kept = [id_ for id_ in range(len(of_output)) if id_ not in new]
    assert torch.equal(made[EMBED][kept], mean[EMBED][kept])


@pytest.mark.parametrize("approximation", ["omp", "common_interpolation", "landmark_pca", "stb", "mp_rope"])
def test_other_methods_name_those_that_need_no_donor(
    base: Path, tokenizer_alone: Path, tmp_path: Path, approximation: str
) -> None:
    sentence = refusal(recipe(base, tokenizer_alone, parameters={"approximation": approximation}), tmp_path / "out")
    assert sentence.startswith(f"tokenizer.source: {tokenizer_alone} is a tokenizer without a model")
    assert f"approximation: {approximation} needs embeddings" in sentence
    assert all(f" {name}" in sentence for name in without_donor())


def test_magikarp_needs_the_donor_too(base: Path, tokenizer_alone: Path, tmp_path: Path) -> None:
    parameters = {"approximation": "mean", "magikarp": True}
    sentence = refusal(recipe(base, tokenizer_alone, parameters=parameters), tmp_path / "out")
    assert "magikarp: true needs embeddings" in sentence


def test_each_model_of_a_merge_may_have_its_own_method(base: Path, donor: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other", make_model(byte_level_tokenizer(), seed=5), byte_level_tokenizer())
    parts = [(base, "subword"), (other, "zero")]
    merged = run(
        {
            "merge_method": "omp_linear",
            "models": [
                {"model": str(model), "parameters": {"weight": 1.0, "approximation": approximation}}
                for model, approximation in parts
            ],
            "tokenizer": {"source": str(donor)},
            "dtype": "float32",
        },
        tmp_path / "merged",
    )
    alone = [
        transplant(model, donor, tmp_path / approximation, approximation)[EMBED] for model, approximation in parts
    ]
    torch.testing.assert_close(merged[EMBED], sum(alone) / 2)


def test_an_unknown_method_is_refused(base: Path, donor: Path, tmp_path: Path) -> None:
    sentence = refusal(recipe(base, donor, parameters={"approximation": "ompp"}), tmp_path / "out")
    assert sentence.startswith("parameters.approximation: 'ompp' is invalid")
    assert "'omp'" in sentence


def test_record_report_and_inspect_name_the_method(base: Path, donor: Path, tmp_path: Path) -> None:
    asked = recipe(base, donor, parameters={"approximation": "subword"})
    result = merge_here(asked, tmp_path / "out")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "omp_record.json").read_text())
    assert record["solves"] == []
    assert record["other_rows"][0]["targets"] > 0
    assert {tensor["parameters"]["approximation"] for tensor in record["tensors"]} == {"subword"}
    assert "by `approximation: subword`" in (tmp_path / "out" / "README.md").read_text()
    report = CliRunner().invoke(main, ["report", str(tmp_path / "out")])
    assert report.exit_code == 0, report.output
    assert "subword" in report.output
    (tmp_path / "recipe.yml").write_text(json.dumps(asked))
    inspected = CliRunner().invoke(main, ["inspect", str(tmp_path / "recipe.yml")])
    assert inspected.exit_code == 0, inspected.output
    assert "subword" in inspected.output


def test_tokens_ranks_by_residuals_which_only_omp_has(base: Path, donor: Path, tmp_path: Path) -> None:
    transplant(base, donor, tmp_path / "out", "subword")
    result = CliRunner().invoke(main, ["tokens", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "approximation: omp" in result.output


def test_every_method_of_the_parameter_exists() -> None:
    assert set(INITIALIZERS) == set(Approximation)
    assert OmpParameters().approximation is Approximation.OMP
    assert tokensurgeon.TARGETS_PER_BATCH == 512
