"""Test ``merge_method: omp`` with the real ``mergekit-yaml``, on small checkpoints."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import (
    ENGLISH,
    PYTHON,
    byte_level_tokenizer,
    make_model,
    merge,
    run,
    save,
    sentencepiece_tokenizer,
    tensors_of,
)
from helpers.commands import must_merge, refusal
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mergekit_omp.vocabulary.matching import match_vocabularies
from mergekit_omp.vocabulary.tokens import read_vocabulary

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
K = 5


def recipe(base: Path, donor: Path | str, **more: object) -> dict:
    return {
        "merge_method": "omp",
        "models": [{"model": str(base)}],
        "tokenizer": {"source": str(donor)},
        "parameters": {"k": K, "reconstruction": "combination"},
        "dtype": "float32",
        **more,
    }


class Bytes(bytes):
    """The bytes of a token; ``fallback`` for a byte-fallback token such as ``<0x30>``."""

    fallback = False


def text_bytes(tokenizer: PreTrainedTokenizerFast) -> dict[int, Bytes]:
    """Return the bytes of every text token, by the definition of the two kinds of tokenizers used here."""
    alphabet = {char: byte for byte, char in enumerate(_byte_alphabet())}
    byte_level = "Ġ" in tokenizer.get_vocab()
    result = {}
    for token, id_ in tokenizer.get_vocab().items():
        if id_ in tokenizer.all_special_ids:
            continue
        if byte_level:
            result[id_] = Bytes(alphabet[char] for char in token)
        elif token.startswith("<0x"):
            result[id_] = Bytes([int(token[3:5], 16)])
            result[id_].fallback = True
        else:
            result[id_] = Bytes(token.replace("▁", " ").encode())
    return result


def preferred_last(tokens: dict[int, Bytes]) -> list[tuple[int, Bytes]]:
    """Sort tokens so that among those with equal bytes the preferred one is last: ordinary, and with a lower id."""
    return sorted(tokens.items(), key=lambda token: (not token[1].fallback, -token[0]))


def _byte_alphabet() -> list[str]:
    """Build GPT-2's alphabet: printable bytes are themselves, the others code points from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def unwritten_tokens(tokens: dict[int, Bytes], anchors: dict[int, int]) -> set[int]:
    """Return byte-fallback tokens whose row another token with the same bytes has: ``<0x35>`` and ``5``."""
    ordinary = {anchors[id_] for id_, data in tokens.items() if id_ in anchors and not data.fallback}
    return {id_ for id_, data in tokens.items() if id_ in anchors and data.fallback and anchors[id_] in ordinary}


def naive_omp(target: np.ndarray, atoms: np.ndarray, k: int) -> tuple[list[int], np.ndarray]:
    """Run OMP by its definition in float64; return the support and the least-squares coefficients."""
    support: list[int] = []
    coefficients = np.zeros(0)
    residual = target
    for _ in range(k):
        scores = np.abs(atoms @ residual)
        scores[support] = -1
        support.append(int(scores.argmax()))
        coefficients = np.linalg.lstsq(atoms[support].T, target, rcond=None)[0]
        residual = target - coefficients @ atoms[support]
    return support, coefficients


def expected_rows(
    base: torch.Tensor, donor: torch.Tensor, base_bytes: dict[int, Bytes], donor_bytes: dict[int, Bytes]
) -> tuple[dict[int, int], dict[int, np.ndarray]]:
    """Return the expected rows: donor id to base row for anchors, donor id to new row for new tokens."""
    rows_of = {data: row for row, data in preferred_last(base_bytes)}
    anchors = {id_: rows_of[data] for id_, data in donor_bytes.items() if data in rows_of}
    shared = {id_: data for id_, data in donor_bytes.items() if id_ in anchors}
    atom_ids = list({anchors[id_]: id_ for id_, _ in preferred_last(shared)}.values())
    donor64, base64 = donor.double().numpy(), base.double().numpy()
    new = {}
    for id_ in donor_bytes.keys() - anchors.keys():
        support, coefficients = naive_omp(donor64[id_], donor64[atom_ids], K)
        new[id_] = coefficients @ base64[[anchors[atom_ids[atom]] for atom in support]]
    return anchors, new


TOKENIZERS = {
    "byte_level": lambda corpus: byte_level_tokenizer(corpus, size=340),
    "sentencepiece": lambda corpus: sentencepiece_tokenizer(corpus, size=380),
}


@pytest.mark.parametrize("base_tied", [True, False])
@pytest.mark.parametrize("donor_tied", [True, False])
@pytest.mark.parametrize(
    ("base_kind", "donor_kind"), [("byte_level", "sentencepiece"), ("sentencepiece", "byte_level")]
)
def test_rows_are_those_of_the_definition(
    tmp_path: Path, base_tied: bool, donor_tied: bool, base_kind: str, donor_kind: str
) -> None:
    """Compare anchors bit for bit, and other rows with a float64 OMP, for input embedding and head."""
    base_tokenizer, donor_tokenizer = TOKENIZERS[base_kind](ENGLISH), TOKENIZERS[donor_kind](PYTHON)
    base_model = make_model(base_tokenizer, tied=base_tied, seed=1)
    donor_model = make_model(donor_tokenizer, architecture="mistral", tied=donor_tied, hidden=24, layers=1, seed=2)
    base = save(tmp_path / "base", base_model, base_tokenizer)
    donor = save(tmp_path / "donor", donor_model.to(torch.bfloat16), donor_tokenizer)

    must_merge(recipe(base, donor), tmp_path / "out")

    before, after, donor_tensors = tensors_of(base), tensors_of(tmp_path / "out"), tensors_of(donor)
    assert set(after) == set(before), "a tied base stays tied"
    assert (HEAD in after) is not base_tied
    donor_matrices = {EMBED: donor_tensors[EMBED], HEAD: donor_tensors[EMBED if donor_tied else HEAD]}
    for name in {EMBED, HEAD} & set(after):
        anchors, new = expected_rows(
            before[name], donor_matrices[name], text_bytes(base_tokenizer), text_bytes(donor_tokenizer)
        )
        assert len(new) > 20
        assert after[name].shape == (len(donor_tokenizer.get_vocab()), 32)
        silent = unwritten_tokens(text_bytes(donor_tokenizer), anchors)
        assert (len(silent) > 20) == (donor_kind == "sentencepiece")
        for id_, row in anchors.items():
            kept = torch.equal(after[name][id_], before[name][row])
            assert kept == (id_ not in silent), donor_tokenizer.convert_ids_to_tokens(id_)
        for id_, row in new.items():
            np.testing.assert_allclose(after[name][id_].numpy(), row, rtol=1e-3, atol=1e-5)
        eos = donor_tokenizer.eos_token_id
        assert torch.equal(after[name][eos], before[name][base_tokenizer.eos_token_id]), "special tokens pair by role"
    for name in set(before) - {EMBED, HEAD}:
        assert torch.equal(before[name], after[name]), f"{name} has no vocabulary axis"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write a SentencePiece-style base and a byte-level donor of another architecture."""
    folder = tmp_path_factory.mktemp("pair")
    base_tokenizer, donor_tokenizer = sentencepiece_tokenizer(ENGLISH), byte_level_tokenizer(PYTHON)
    donor_tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"
    base = save(folder / "base", make_model(base_tokenizer, seed=1), base_tokenizer)
    donor = save(folder / "donor", make_model(donor_tokenizer, architecture="mistral", hidden=24), donor_tokenizer)
    return base, donor


def test_output_is_a_model_that_loads_and_generates(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Check that configurations, tokenizer, chat template and card are consistent, and that every id has a row."""
    base, donor = pair
    out = tmp_path / "out"
    log = merge(recipe(base, donor), out)

    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    original = AutoTokenizer.from_pretrained(donor)
    assert tokenizer.get_vocab() == original.get_vocab()
    assert tokenizer.chat_template == original.chat_template
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == len(original.get_vocab())
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 0)
    prompt = tokenizer("def realign(weight):", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > prompt["input_ids"].shape[1]
    assert "OMP tokenizer transplantation" in (out / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.yml"]
    assert "tokens kept" in log
    assert "mean relative residual" in log


def test_no_warning_about_ids_beyond_a_smaller_vocabulary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check a base whose eos has its highest id: the output's ids are right, so there is no warning."""
    base_tokenizer, donor_tokenizer = byte_level_tokenizer(ENGLISH), byte_level_tokenizer(PYTHON)
    base_tokenizer.add_tokens([f"filler{i}" for i in range(500)])
    base_tokenizer.add_special_tokens({"eos_token": "<|the very last|>"})
    base = save(tmp_path / "base", make_model(base_tokenizer), base_tokenizer)
    donor = save(tmp_path / "donor", make_model(donor_tokenizer, hidden=24), donor_tokenizer)
    assert base_tokenizer.eos_token_id >= len(donor_tokenizer)

    must_merge(recipe(base, donor), tmp_path / "out")
    assert "token_id" not in caplog.text
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert config.eos_token_id == donor_tokenizer.eos_token_id


def test_quiet_silences_bar_and_log(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, donor = pair
    assert "Approximating tokens" in merge(recipe(base, donor), tmp_path / "loud")
    log = merge(recipe(base, donor), tmp_path / "quiet", "--quiet")
    assert "Approximating tokens" not in log
    assert "mergekit_omp" not in log


def test_pad_to_multiple_of(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Check that padding rows are the mean of kept rows, and that config.json counts them."""
    base, donor = pair
    must_merge(recipe(base, donor, tokenizer={"source": str(donor), "pad_to_multiple_of": 64}), tmp_path / "out")
    tokens = len(AutoTokenizer.from_pretrained(donor).get_vocab())
    embedding = tensors_of(tmp_path / "out")[EMBED]
    assert embedding.shape[0] == json.loads((tmp_path / "out/config.json").read_text())["vocab_size"]
    assert embedding.shape[0] % 64 == 0
    assert embedding.shape[0] > tokens
    assert torch.equal(embedding[tokens], embedding[-1])
    assert embedding[-1].norm() < embedding[:tokens].norm(dim=1).mean()


def test_ids_with_gaps(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Check that an output vocabulary with gaps has a row for every id up to the highest."""
    base, _ = pair
    tokenizer = byte_level_tokenizer(PYTHON)
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    last = max(described["model"]["vocab"].values())
    [moved] = [token for token, id_ in described["model"]["vocab"].items() if id_ == last]
    described["model"]["vocab"][moved] = last + 7
    gapped = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(described)),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    donor = save(tmp_path / "donor", make_model(gapped, rows=last + 8), gapped)
    must_merge(recipe(base, donor), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().num_embeddings == last + 8
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == last + 8
    embedding = tensors_of(tmp_path / "out")[EMBED]
    assert torch.equal(embedding[last], embedding[last + 6]), "gaps are padding"
    assert not torch.equal(embedding[last], embedding[last + 7])


@pytest.mark.parametrize("difference", [40, -40])
def test_donor_matrix_with_other_rows_than_tokens(
    tmp_path: Path, pair: tuple[Path, Path], difference: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Check more rows than tokens, which are kept, and fewer, for which tokens are named and get the fallback."""
    base, _ = pair
    tokenizer = byte_level_tokenizer(PYTHON)
    tokens = len(tokenizer.get_vocab())
    donor = save(tmp_path / "donor", make_model(tokenizer, rows=tokens + difference), tokenizer)
    must_merge(recipe(base, donor), tmp_path / "out")
    embedding = tensors_of(tmp_path / "out")[EMBED]
    assert embedding.shape[0] == max(tokens, tokens + difference)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == len(embedding)
    assert ("has no row for" in caplog.text) == (difference < 0)


@pytest.mark.parametrize("safe", [True, False])
def test_sharded_inputs_and_output(tmp_path: Path, safe: bool) -> None:
    """Compare base and donor in many shards, .safetensors or .bin, with single files."""
    base_tokenizer, donor_tokenizer = sentencepiece_tokenizer(ENGLISH), byte_level_tokenizer(PYTHON)
    base_model, donor_model = make_model(base_tokenizer, seed=1), make_model(donor_tokenizer, hidden=24, seed=2)
    single_files = [
        save(tmp_path / "base", base_model, base_tokenizer),
        save(tmp_path / "donor", donor_model, donor_tokenizer),
    ]
    sharded = [
        save(tmp_path / "base_shards", base_model, base_tokenizer, shard_size="30KB", safe=safe),
        save(tmp_path / "donor_shards", donor_model, donor_tokenizer, shard_size="20KB", safe=safe),
    ]
    assert len(list(sharded[0].glob("*-of-*"))) > 3
    must_merge(recipe(*single_files), tmp_path / "one")
    must_merge(recipe(*sharded), tmp_path / "many", "--out-shard-size", "20K")
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert set(one) == set(many)
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_same_vocabulary_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check that a donor with the base's vocabulary is valid, and that the log says so."""
    tokenizer = byte_level_tokenizer()
    base = save(tmp_path / "base", make_model(tokenizer, seed=1), tokenizer)
    donor = save(tmp_path / "donor", make_model(tokenizer, seed=2), tokenizer)
    must_merge(recipe(base, donor), tmp_path / "out")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert "nothing to approximate" in caplog.text
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_k_above_the_number_of_anchors(
    tmp_path: Path, pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    must_merge(recipe(*pair, parameters={"k": 100_000}), tmp_path / "out")
    assert "k is 100000, but" in caplog.text
    assert torch.isfinite(tensors_of(tmp_path / "out")[EMBED]).all()


@pytest.mark.parametrize(("which", "tensor"), [("base", EMBED), ("donor", HEAD)])
def test_nan_in_a_tensor(tmp_path: Path, which: str, tensor: str) -> None:
    """Check that a NaN is rejected with the names of tensor and rows, without output."""
    tokenizers = {"base": sentencepiece_tokenizer(ENGLISH), "donor": byte_level_tokenizer(PYTHON)}
    folders = {}
    for name, tokenizer in tokenizers.items():
        model = make_model(tokenizer)
        if name == which:
            dict(model.named_parameters())[tensor].data[[7, 300], 3] = float("nan")
        folders[name] = save(tmp_path / name, model, tokenizer)
    sentence = refusal(recipe(folders["base"], folders["donor"]), tmp_path / "out")
    assert f"{tensor} of {folders[which]} holds NaN or infinite values in 2 rows (first: 7, 300)" in sentence


def test_noise_and_scale_change_only_new_rows(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    must_merge(recipe(*pair, parameters={"k": K}), tmp_path / "plain")
    must_merge(recipe(*pair, parameters={"k": K, "new_vocab_scale": 0.5}), tmp_path / "scaled")
    must_merge(recipe(*pair, parameters={"k": K, "new_vocab_noise": 0.1}), tmp_path / "noisy")
    plain, scaled, noisy = (tensors_of(tmp_path / name)[EMBED] for name in ("plain", "scaled", "noisy"))
    new = (plain != noisy).any(dim=1)
    assert 50 < int(new.sum()) < len(plain)
    assert torch.equal(plain[~new], scaled[~new])
    torch.testing.assert_close(plain[new] * 0.5, scaled[new])
    assert (noisy[new] - plain[new]).std() == pytest.approx(0.1, rel=0.05)


def test_tokenizer_of_a_body_that_transformers_forces_a_class_on(tmp_path: Path) -> None:
    """Check a qwen2 folder, for which AutoTokenizer uses Qwen's pre-tokenizer: the output must be read unchanged."""
    base_tokenizer, donor_tokenizer = byte_level_tokenizer(ENGLISH), sentencepiece_tokenizer(PYTHON)
    base = save(tmp_path / "base", make_model(base_tokenizer, architecture="qwen2"), base_tokenizer)
    donor = save(tmp_path / "donor", make_model(donor_tokenizer, architecture="mistral", hidden=24), donor_tokenizer)
    must_merge(recipe(base, donor), tmp_path / "out")
    text = "def realign(the river):\n    return é"
    for trust in (False, True):
        loaded = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=trust)
        assert loaded.tokenize(text) == donor_tokenizer.tokenize(text)
        assert loaded.decode(loaded(text)["input_ids"]) == text


def test_regression_is_the_default_and_keeps_anchors(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Check that new rows depend on donor row, pieces and codes, and that `combination` is the paper's."""
    base, donor = pair
    default = run(recipe(base, donor, parameters={"k": K}), tmp_path / "default")
    named = run(recipe(base, donor, parameters={"k": K, "reconstruction": "regression"}), tmp_path / "named")
    combined = run(recipe(base, donor), tmp_path / "combined")
    match = match_vocabularies(*(read_vocabulary(AutoTokenizer.from_pretrained(path)) for path in (donor, base)))
    new = match.is_new()
    for name in (EMBED, HEAD):
        assert torch.equal(default[name], named[name])
        assert torch.equal(default[name][~new], combined[name][~new])
        assert not torch.isclose(default[name][new], combined[name][new]).all(dim=1).any()


def test_generation_stops_at_every_token_with_the_row_of_eos(tmp_path: Path) -> None:
    """Check a base with one token for bos and eos: the output's two tokens have equal logits."""
    base_tokenizer, donor_tokenizer = byte_level_tokenizer(ENGLISH), sentencepiece_tokenizer(PYTHON)
    base = save(tmp_path / "base", make_model(base_tokenizer), base_tokenizer)
    donor = save(tmp_path / "donor", make_model(donor_tokenizer, hidden=24), donor_tokenizer)
    embedding = run(recipe(base, donor), tmp_path / "out")[EMBED]
    bos, eos = donor_tokenizer.bos_token_id, donor_tokenizer.eos_token_id
    assert torch.equal(embedding[bos], embedding[eos])
    stops = json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"]
    assert {bos, eos} <= set(stops)
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == eos


@pytest.mark.parametrize("which", ["base", "donor"])
def test_rows_beyond_vocab_size_are_padding(tmp_path: Path, pair: tuple[Path, Path], which: str) -> None:
    """Check that a vocab_size below the number of rows only changes the mean of unused rows."""
    expected = run(recipe(*pair), tmp_path / "expected")
    changed = {"base": pair[0], "donor": pair[1]}
    folder = tmp_path / "padded"
    shutil.copytree(changed[which], folder)
    tensors = load_file(folder / "model.safetensors")
    padded = {
        name: torch.cat([t, torch.randn(64, t.shape[1])]) if name in (EMBED, HEAD) else t
        for name, t in tensors.items()
    }
    save_file(padded, folder / "model.safetensors", {"format": "pt"})
    result = run(recipe(**changed | {which: folder}), tmp_path / "out")
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())


def test_a_tokenizer_that_writes_tokens_without_a_row(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Check digits without rows, which are new tokens."""
    base = tmp_path / "base"
    shutil.copytree(pair[0], base)
    tensors = load_file(base / "model.safetensors")
    cut = {name: t[:300].clone() if name in (EMBED, HEAD) else t for name, t in tensors.items()}
    save_file(cut, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert max(tokenizer("12 345 67890").input_ids) >= 300
    run(recipe(base, pair[1]), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model.get_input_embeddings().weight).all()
