"""Test how other programs read the output's files: transformers 4 and 5, and gguf's reader of vocabularies."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.vocab import SpecialVocab
from helpers import read_output
from helpers.checkpoints import (
    ENGLISH,
    PYTHON,
    byte_level_tokenizer,
    make_model,
    run,
    save,
    sentencepiece_tokenizer,
    tensors_of,
)
from helpers.tokenizers_for_tests import byte_level, llama3, load, mistral, qwen, tekken, unigram
from helpers.transformers4 import read_with_transformers_4
from mergekit.common import ModelReference
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mergekit_omp.output.legacy_keys import add_legacy_keys
from mergekit_omp.output.tokenizer import finish_tokenizer
from mergekit_omp.report.converters import TokenizerKind, converter_note, tokenizer_kind
from mergekit_omp.vocabulary.chat_template import absent_chat_tokens
from mergekit_omp.vocabulary.duplicates import without_duplicates
from mergekit_omp.vocabulary.matching import match_vocabularies
from mergekit_omp.vocabulary.tokens import Vocabulary, read_vocabulary

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
TEXTS = [
    "The quick brown fox, 1234 of them: $3.50!",
    "Größe, naïve café; здравствуй, мир",
    "今日は世界。 नमस्ते  🙂🙃",
    "def add(a, b):\n    return a + b\n\n\tprint( 1 )\n",
    " leading and  double spaces ",
]
BODIES = ("llama", "mistral", "qwen2", "gemma3_text")


def with_roles(tokenizer: PreTrainedTokenizerBase, **settings: Any) -> PreTrainedTokenizerBase:
    """Build a tokenizer with a chat template and more special tokens than roles."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    roles = {f"{role}_token": getattr(tokenizer, f"{role}_token") for role in ("bos", "eos", "unk", "pad")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles, **settings)


TOKENIZERS = {
    "qwen": lambda: with_roles(
        qwen(),
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template="<|im_start|>{{ messages[0]['role'] }}\n{{ messages[0]['content'] }}<|im_end|>\n",
    ),
    "llama3": llama3,
    "mistral": lambda: mistral(3),
    "tekken": tekken,
    "image": lambda: with_roles(byte_level(), extra_special_tokens={"image_token": "<|endoftext|>"}),
    "prefix space": lambda: byte_level(add_prefix_space=True),
    "unigram": unigram,
}


def donor_of(folder: Path, tokenizer: PreTrainedTokenizerBase, **stated: Any) -> Path:
    """Write a donor's tokenizer files; ``stated`` are additional settings of tokenizer_config.json."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | stated))
    return folder


def finished(folder: Path, donor: Path, vocabulary: Vocabulary, body: str) -> Path:
    """Finish the files that mergekit writes for a body's config.json and a donor's tokenizer."""
    AutoConfig.for_model(body, architectures=["X"], vocab_size=vocabulary.size).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (donor / name).exists():
            shutil.copy(donor / name, folder)
    origin = ModelReference.parse(str(donor))
    finish_tokenizer(folder, vocabulary, origin, unchanged=True, trust_remote_code=False)
    return folder


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("name", [*TOKENIZERS, "smollm2", "gemma3"])
def test_transformers_4_and_5_read_the_same_tokenizer(
    tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    """Compare ids, text, roles, special tokens and chat, also for bodies whose tokenizers transformers 5 rebuilds."""
    tokenizer = TOKENIZERS[name]() if name in TOKENIZERS else load(request.getfixturevalue(f"{name}_dir"))
    donor, vocabulary = donor_of(tmp_path / "donor", tokenizer), read_vocabulary(tokenizer)
    folders = [str(finished(tmp_path / body, donor, vocabulary, body)) for body in BODIES]
    four = read_with_transformers_4([("read_tokenizer", [folder, TEXTS]) for folder in folders])
    backend = tokenizer.backend_tokenizer
    for folder, by_four in zip(folders, four, strict=True):
        by_five = json.loads(json.dumps(read_output.read_tokenizer(folder, TEXTS)))
        assert by_four == by_five
        assert by_five["ids"] == [backend.encode(text).ids for text in TEXTS]
        assert by_five["plain_ids"] == [backend.encode(text, add_special_tokens=False).ids for text in TEXTS]
        assert by_five["inputs"] == ["attention_mask", "input_ids"]
        assert by_five["roles"]["eos"] == tokenizer.eos_token_id
        assert by_five["image_token"] == ("<|endoftext|>" if name == "image" else None)
    if name == "qwen":
        assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} == set(four[0]["special"])
        assert four[0]["chat"] == "<|im_start|>user\nHi<|im_end|>"


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("body", ["llama", "qwen2"])
def test_transformers_4_reads_a_complete_output(tmp_path: Path, body: str) -> None:
    """Compare tokenizer, ids and RoPE of a complete output in both versions."""
    ours, donors = byte_level_tokenizer(ENGLISH), sentencepiece_tokenizer(PYTHON)
    base = save(tmp_path / "base", make_model(ours, architecture=body), ours)
    donor = save(tmp_path / "donor", make_model(donors, rows=512, hidden=24), donors)
    edit(base / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 3e5})
    edit(donor / "tokenizer_config.json", add_bos_token=True)
    run(recipe(base, donor), tmp_path / "out")
    keys = ["vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"]
    calls = [("read_tokenizer", [str(tmp_path / "out"), TEXTS]), ("read_config", [str(tmp_path / "out"), keys])]
    four = read_with_transformers_4([*calls, ("read_config", [str(tmp_path / "out"), ["rope_theta"]])])
    five = [json.loads(json.dumps(getattr(read_output, name)(*arguments))) for name, arguments in calls]
    assert four[:2] == five
    assert four[2]["config"]["rope_theta"] == 3e5
    assert four[1]["config"]["vocab_size"] == 512
    assert all(ids[0] == donors.bos_token_id for ids in four[0]["ids"])


def test_tokenizer_config_names_no_class_of_transformers_5(tmp_path: Path) -> None:
    tokenizer = byte_level()
    finished(tmp_path / "out", donor_of(tmp_path / "donor", tokenizer), read_vocabulary(tokenizer), "llama")
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(settings.get("extra_special_tokens"), list)
    assert settings["unk_token"] is None, "not what a class has by default"
    assert settings["added_tokens_decoder"]["0"]["content"] == "<|endoftext|>"
    assert not (tmp_path / "out/plain_tokenizer.py").exists()


IDS = {"<|endoftext|>": 0, "<|begin|>": 1}


def template_of(*, bos: str | None, eos: str | None) -> dict[str, Any]:
    """Return a minimal post-processor of a tokenizer.json that adds tokens."""
    ends = [[{"SpecialToken": {"id": end, "type_id": 0}}] if end else [] for end in (bos, eos)]
    middle = {"Sequence": {"id": "A", "type_id": 0}}
    named = [end for end in (bos, eos) if end]
    return {
        "type": "TemplateProcessing",
        "single": [*ends[0], middle, *ends[1]],
        "pair": [*ends[0], middle, {"Sequence": {"id": "B", "type_id": 1}}, *ends[1]],
        "special_tokens": {name: {"id": name, "ids": [IDS[name]], "tokens": [name]} for name in named},
    }


def with_distinct_bos_and_eos(post_processor: dict[str, Any] | None) -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer whose bos is not its eos."""
    plain = byte_level_tokenizer(special=("<|begin|>",))
    described = json.loads(plain.backend_tokenizer.to_str()) | {"post_processor": post_processor}
    backend = type(plain.backend_tokenizer).from_str(json.dumps(described))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|endoftext|>")


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
KEPT = {
    # donor's template, what its tokenizer_config.json states -> whether bos and eos are added
    "stated, and not in the template": (BYTE_LEVEL, {"add_bos_token": True}, (True, False)),
    "both stated": (None, {"add_bos_token": True, "add_eos_token": True}, (True, True)),
    "in the template alone": (template_of(bos="<|begin|>", eos=None), {}, (True, False)),
    "eos in the template alone": (template_of(bos=None, eos="<|endoftext|>"), {}, (False, True)),
    "nowhere": (None, {}, (False, False)),
    "denied by a class that obeys": (
        template_of(bos="<|begin|>", eos=None),
        {"add_bos_token": False, "tokenizer_class": "LlamaTokenizerFast"},
        (False, False),
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_added_bos_and_eos_survive(tmp_path: Path, case: str) -> None:
    """Check the keys, which converters to GGUF read, and the template, which transformers applies."""
    post_processor, stated, (bos, eos) = KEPT[case]
    tokenizer = with_distinct_bos_and_eos(post_processor)
    donor = donor_of(tmp_path / "donor", tokenizer, **stated)
    out = finished(tmp_path / "out", donor, read_vocabulary(tokenizer), "llama")
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert (settings["add_bos_token"], settings["add_eos_token"]) == (bos, eos)
    read = read_output.read_tokenizer(str(out), ["the river"])
    before, behind = [tokenizer.bos_token_id] * bos, [tokenizer.eos_token_id] * eos
    assert read["ids"][0] == [*before, *read["plain_ids"][0], *behind]
    one, two = tokenizer.encode("one", add_special_tokens=False), tokenizer.encode("two", add_special_tokens=False)
    if case in ("stated, and not in the template", "both stated"):
        assert read["pair"] == [*before, *one, *behind, *before, *two, *behind]
    gguf_vocabulary = SpecialVocab(out)
    assert (gguf_vocabulary.add_special_token["bos"], gguf_vocabulary.add_special_token["eos"]) == (bos, eos)
    assert gguf_vocabulary.special_token_ids["eos"] == tokenizer.eos_token_id


ROPE = {
    "plain": ("llama", {"rope_theta": 5e5, "rope_scaling": None}),
    "llama 3": (
        "llama",
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "yarn": (
        "qwen2",
        {
            "rope_theta": 1e6,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
    ),
    "two kinds of layers": (
        "gemma3_text",
        {
            "rope_theta": 2e6,
            "rope_local_base_freq": 2e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "partial": ("stablelm", {"rope_theta": 2e4, "partial_rotary_factor": 0.5}),
    "other names": ("gpt_neox", {"rotary_emb_base": 20000, "rotary_pct": 0.5}),
    "long": (
        "phi3",
        {
            "rope_theta": 2e4,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
        },
    ),
    "in sections": (
        "qwen2_vl_text",
        {"rope_theta": 2e6, "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
    ),
    "nested": (
        "gemma3",
        {
            "text_config.rope_theta": 2e6,
            "text_config.rope_local_base_freq": 2e4,
            "text_config.rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "experts": ("qwen3_moe", {"num_experts": 12, "rope_theta": 2e6}),
}


def config_of_transformers_5(model_type: str, stated: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration that transformers 5 writes for keys of transformers 4."""
    settings: dict[str, Any] = {}
    for key, value in copy.deepcopy(stated).items():  # transformers changes what it is given
        *parents, last = key.split(".")
        part = settings
        for parent in parents:
            part = part.setdefault(parent, {})
        part[last] = value
    config = AutoConfig.for_model(model_type, **settings, architectures=["X"], dtype="bfloat16")
    return json.loads(config.to_json_string())


def rope_parameters(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the RoPE parameters of transformers 5."""
    return settings.get("text_config", settings)["rope_parameters"]


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("from_4", [True, False], ids=["base of 4", "base of 5"])
def test_transformers_4_reads_the_older_keys(tmp_path: Path, from_4: bool) -> None:
    """Check RoPE above all, for a base's config.json of transformers 4 or 5."""
    for name, (model_type, stated) in ROPE.items():
        settings = config_of_transformers_5(model_type, stated)
        for key in set(stated) - {"original_max_position_embeddings"}:
            settings.pop(key, None)  # transformers 5 drops most of them, and 5.1 fewer than 5.23
        (tmp_path / name).mkdir()
        add_legacy_keys(settings, stated if from_4 else None)
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
        (tmp_path / name / "generation_config.json").write_text("{}")
        assert settings["torch_dtype"] == settings["dtype"] == "bfloat16"
        again = AutoConfig.from_pretrained(tmp_path / name).to_dict()
        assert rope_parameters(again) == rope_parameters(config_of_transformers_5(model_type, stated))
    keys = {name: [*stated, "dtype"] for name, (_, stated) in ROPE.items()}
    four = read_with_transformers_4([("read_config", [str(tmp_path / name), keys[name]]) for name in ROPE])
    for (name, (_, stated)), read in zip(ROPE.items(), four, strict=True):
        found = read["config"]
        for key, value in stated.items():
            if isinstance(value, dict):
                assert found[key].items() >= value.items(), (name, key)
            else:
                assert found[key] == value, (name, key)
        assert found["dtype"] == "bfloat16"


def recipe(base: Path, source: Path | str, **more: Any) -> dict[str, Any]:
    return {
        "merge_method": "omp",
        "models": [{"model": str(base)}],
        "tokenizer": {"source": str(source)},
        "parameters": {"approximation": "mean"},
        "dtype": "float32",
        **more,
    }


def edit(path: Path, **settings: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | settings))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Write an untied model with one token for bos and eos."""
    tokenizer = byte_level_tokenizer(ENGLISH, special=("<|im_start|>", "<|im_end|>"))
    return save(tmp_path / "base", make_model(tokenizer), tokenizer)


@pytest.fixture
def donor(tmp_path: Path) -> Path:
    tokenizer = sentencepiece_tokenizer(PYTHON)
    return save(tmp_path / "donor", make_model(tokenizer, rows=1024, hidden=24), tokenizer)


@pytest.mark.parametrize(
    ("rows", "multiple", "expected"),
    [(1024, None, 1024), (1024, 96, 480), (1024, 1000, 1000), (430, None, 443)],
    ids=["the donor's", "the recipe's multiple wins", "another multiple", "not fewer than tokens"],
)
def test_rows_of_the_donor(tmp_path: Path, base: Path, rows: int, multiple: int | None, expected: int) -> None:
    """Check that a draft has its target's number of rows, and that rows without a token are the mean of kept rows."""
    tokenizer = sentencepiece_tokenizer(PYTHON)
    assert len(tokenizer) == 443
    donor = save(tmp_path / "donor", make_model(tokenizer, rows=rows, hidden=24), tokenizer)
    section = {"source": str(donor)} | ({"pad_to_multiple_of": multiple} if multiple else {})
    tensors = run(recipe(base, donor, tokenizer=section), tmp_path / "out")
    assert read(tmp_path / "out/config.json")["vocab_size"] == expected
    for name in (EMBED, HEAD):
        assert len(tensors[name]) == expected
        assert torch.equal(tensors[name][443:], tensors[name][443:444].expand(expected - 443, -1))
    if expected > 443:
        kept = {id_ for id_, row in enumerate(rows_kept(donor, base)) if row >= 0}
        torch.testing.assert_close(tensors[EMBED][-1], tensors[EMBED][sorted(kept)].mean(dim=0))


def rows_kept(donor: Path, base: Path) -> list[int]:
    vocabularies = [read_vocabulary(load(folder)) for folder in (donor, base)]
    return without_duplicates(match_vocabularies(*vocabularies), vocabularies[0], load(donor)).rows.tolist()


def test_rows_without_a_donor_model(tmp_path: Path, base: Path, donor: Path) -> None:
    """Check sources that do not determine a number of rows: a tokenizer without a model, ``base`` and ``union``."""
    edit(base / "config.json", vocab_size=len(load(base)))
    alone = donor_of(tmp_path / "alone", load(donor))
    for source, size in ((str(alone), 443), ("base", len(load(base)))):
        tensors = run(recipe(base, source), tmp_path / f"out {Path(source).name}")
        assert len(tensors[EMBED]) == size


def test_bos_that_only_the_config_sets(tmp_path: Path, base: Path) -> None:
    """Check a bos that only config.json sets, as in Qwen, and that GGUF readers use."""
    tokenizer = byte_level_tokenizer(PYTHON)
    tokenizer.bos_token = None
    donor = save(tmp_path / "donor", make_model(tokenizer, hidden=24), tokenizer)
    edit(donor / "config.json", bos_token_id=0)
    run(recipe(base, donor), tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert read(tmp_path / "out" / name)["bos_token_id"] == 0
    assert read(tmp_path / "out/tokenizer_config.json").get("bos_token") is None
    gguf_vocabulary = SpecialVocab(tmp_path / "out")
    assert gguf_vocabulary.special_token_ids["bos"] == 0
    assert not gguf_vocabulary.add_special_token.get("bos")


@pytest.mark.parametrize("source", ["base", "union", "donor"])
def test_stop_ids_survive(tmp_path: Path, base: Path, donor: Path, source: str) -> None:
    """Check the base's list with the output's ids, and the donor's if the source is a model."""
    tokenizer = load(base)
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    edit(base / "generation_config.json", eos_token_id=stops)
    if source == "donor":
        named = byte_level_tokenizer(PYTHON, special=("<filler>", "<|im_start|>", "<|im_end|>", "<|stop|>"))
        other = save(tmp_path / "other", make_model(named, hidden=24), named)
        edit(other / "generation_config.json", eos_token_id=named.convert_tokens_to_ids(["<|stop|>", "<|endoftext|>"]))
        run(recipe(base, other), tmp_path / "out")
        expected = ["<|stop|>", "<|endoftext|>", "<|im_end|>"]
    else:
        models = [{"model": str(base)}] + [{"model": str(save_like(base, tmp_path / "second"))}] * (source == "union")
        more = {"merge_method": "omp_linear", "models": [m | {"parameters": {"weight": 1}} for m in models]}
        run(recipe(base, source, **more, base_model=str(base)), tmp_path / "out")
        expected = ["<|im_end|>", "<|endoftext|>"]
    ids = load(tmp_path / "out").get_vocab()
    assert read(tmp_path / "out/generation_config.json")["eos_token_id"] == [ids[token] for token in expected]


def test_suppressed_tokens_are_the_same_tokens(
    tmp_path: Path, base: Path, donor: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Check lists of ids that are neither a role nor named by ``_token_id``."""
    own, new = load(base).get_vocab(), load(donor).get_vocab()
    absent = next(token for token in own if len(token) > 6 and token.isalpha() and token not in new)
    r, m, lacking = own["r"], own["m"], own[absent]
    edit(
        base / "generation_config.json",
        suppress_tokens=[r, lacking, m],
        begin_suppress_tokens=[m],
        bad_words_ids=[[r], [m, r], [r, lacking]],
        sequence_bias=[[[r], -1.0]],
    )
    run(recipe(base, donor), tmp_path / "out", quiet=False)
    generation = read(tmp_path / "out/generation_config.json")
    assert generation["suppress_tokens"] == [new["r"], new["m"]]
    assert generation["begin_suppress_tokens"] == [new["m"]]
    assert generation["bad_words_ids"] == [[new["r"]], [new["m"], new["r"]]]
    assert generation.get("sequence_bias") is None
    message = f"sequence_bias: [[[{r}], -1.0]] contains tokens of the base model and is left out; set it anew"
    assert message in caplog.messages


def save_like(base: Path, folder: Path) -> Path:
    """Write a model with the base's width and another vocabulary."""
    tokenizer = byte_level_tokenizer(PYTHON, size=380)
    return save(folder, make_model(tokenizer, seed=5), tokenizer)


def test_sentencepiece_file_is_copied_where_the_tokenizer_is_unchanged(
    tmp_path: Path, base: Path, donor: Path
) -> None:
    (donor / "tokenizer.model").write_bytes(b"pieces")
    run(recipe(base, donor), tmp_path / "same")
    added = {"source": str(donor), "tokens": {"<extra>": {"source": {"kind": "zero"}}}}
    run(recipe(base, donor, tokenizer=added), tmp_path / "more")
    assert (tmp_path / "same/tokenizer.model").read_bytes() == b"pieces"
    assert not (tmp_path / "more/tokenizer.model").exists()
    assert "<extra>" in load(tmp_path / "more").get_vocab()


@pytest.mark.parametrize("differs", [True, False])
def test_a_tied_model_that_stores_a_head(tmp_path: Path, donor: Path, differs: bool) -> None:
    """Check that the output is untied if the head differs, and has no head if it equals the embedding."""
    tokenizer = byte_level_tokenizer(ENGLISH)
    model = make_model(tokenizer)
    if not differs:
        model.lm_head.weight.data = model.get_input_embeddings().weight.data.clone()
    base = save(tmp_path / "base", model, tokenizer)
    assert set(tensors_of(base)) >= {EMBED, HEAD}
    edit(base / "config.json", tie_word_embeddings=True)
    out = tmp_path / "out"
    tensors = run(recipe(base, donor), out)
    assert (HEAD in tensors) == differs
    assert read(out / "config.json")["tie_word_embeddings"] == (not differs)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(loaded.get_output_embeddings().weight, tensors[HEAD if differs else EMBED])


def test_chat_tokens_that_the_output_lacks_are_named(base: Path) -> None:
    tokenizer = load(base)
    template = (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}\n{{ m['content'] }}<|im_end|>"
        "<end_of_turn>{% endfor %}<tools></tools>"
    )
    absent = absent_chat_tokens(tokenizer, read_vocabulary(tokenizer), template)
    assert absent == ["<end_of_turn>", "<|assistant|>", "<|system|>", "<|user|>"]
    assert absent_chat_tokens(tokenizer, read_vocabulary(tokenizer), "<|im_start|>") == []
    assert absent_chat_tokens(tokenizer, read_vocabulary(tokenizer), None) == []


def test_converters_that_do_not_support_a_pair(tmp_path: Path) -> None:
    kinds = {
        "byte": tokenizer_kind(json.loads(byte_level().backend_tokenizer.to_str()), False),
        "pieces": tokenizer_kind(json.loads(sentencepiece_tokenizer().backend_tokenizer.to_str()), False),
        "file": tokenizer_kind({}, True),
        "unigram": tokenizer_kind(json.loads(unigram().backend_tokenizer.to_str()), False),
    }
    assert kinds == {
        "byte": TokenizerKind.BYTE_LEVEL,
        "pieces": TokenizerKind.SENTENCEPIECE_BPE,
        "file": TokenizerKind.SENTENCEPIECE,
        "unigram": TokenizerKind.OTHER,
    }
    silent = {
        body: {name for name, kind in kinds.items() if converter_note(body, kind) is None}
        for body in ("llama", "qwen2", "gemma2", "gemma3_text", "qwen3_moe", "unheard of")
    }
    assert silent == {
        "llama": {"byte", "pieces", "file"},
        "qwen2": {"byte", "file"},
        "gemma2": {"file"},
        "gemma3_text": {"byte", "file"},
        "qwen3_moe": {"byte"},
        "unheard of": set(kinds),
    }
    assert converter_note("gemma2", TokenizerKind.BYTE_LEVEL) == (
        "llama.cpp's converter to GGUF reads a SentencePiece model for a gemma2 body, but the output tokenizer is "
        "byte-level BPE; transformers and vLLM read it."
    )


def test_a_merge_of_tied_and_untied_models_is_untied(tmp_path: Path) -> None:
    """Check config.json: if it were tied as the base's, engines would ignore the merged head."""
    tokenizer = byte_level_tokenizer(ENGLISH)
    tied = save(tmp_path / "tied", make_model(tokenizer, tied=True), tokenizer)
    untied = save(tmp_path / "untied", make_model(tokenizer, seed=1), tokenizer)
    models = [{"model": str(model), "parameters": {"weight": 1}} for model in (tied, untied)]
    more = {"merge_method": "omp_linear", "models": models, "base_model": str(tied)}
    tensors = run(recipe(tied, "base", **more), tmp_path / "out")
    before = [tensors_of(tied)[EMBED], tensors_of(untied)[HEAD]]
    torch.testing.assert_close(tensors[HEAD], sum(before) / 2)
    assert read(tmp_path / "out/config.json")["tie_word_embeddings"] is False
