"""Test donors on the hub: only shards with vocabulary tensors are downloaded, for any architecture."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import (
    ENGLISH,
    PYTHON,
    byte_level_tokenizer,
    make_model,
    merge,
    refused,
    save,
    sentencepiece_tokenizer,
    tensors_of,
)
from helpers.commands import merge_here, recipe
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from mergekit_omp.checkpoints.architecture import VocabularyRole
from mergekit_omp.checkpoints.weights import vocabulary_matrix
from mergekit_omp.errors import OmpError


def mistral(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Return an architecture that mergekit has data on."""
    return make_model(tokenizer, architecture="mistral", hidden=24, seed=2)


def by_type(model_type: str, tokenizer: PreTrainedTokenizerFast, **more: object) -> PreTrainedModel:
    """Create a small model of a type that transformers supports."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        pad_token_id=None,
        **more,
    )
    return AutoModelForCausalLM.from_config(config)


def deepseek_v3(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return by_type(
        "deepseek_v3",
        tokenizer,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
    )


def gpt_oss(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return by_type("gpt_oss", tokenizer, num_local_experts=4, num_experts_per_tok=2, head_dim=8)


def with_code(folder: Path) -> None:
    """Give a checkpoint a type that transformers does not know, and code that must not run."""
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "of_its_own",
        "architectures": ["OfItsOwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_of_its_own.OfItsOwnConfig",
            "AutoModelForCausalLM": "modeling_of_its_own.OfItsOwnForCausalLM",
        },
        "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 64},
        "quantization_config": {"quant_method": "of_its_own"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    for module in ("configuration", "modeling"):
        (folder / f"{module}_of_its_own.py").write_text("raise RuntimeError('the code of the donor ran')\n")


def renamed(folder: Path, prefix: str) -> None:
    """Rename tensors as in multimodal checkpoints, with the sizes in a section of config.json."""
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    for shard in set(index["weight_map"].values()):
        save_file({prefix + name: tensor for name, tensor in load_file(folder / shard).items()}, folder / shard)
    index["weight_map"] = {prefix + name: shard for name, shard in index["weight_map"].items()}
    index_file.write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(
            {key: config[key] for key in ("model_type", "architectures", "auto_map")}
            | {"text_config": {key: config[key] for key in ("hidden_size", "vocab_size", "dtype")}}
        )
    )


DONORS = {"mistral": mistral, "deepseek_v3": deepseek_v3, "gpt_oss": gpt_oss}


@pytest.mark.parametrize("name", [*DONORS, "code", "code and parts"])
def test_other_shards_are_not_needed(tmp_path: Path, hub: Callable[[Path, set[str]], str], name: str) -> None:
    """Run offline with a hub cache that contains only the shards of the embedding and the head."""
    base_tokenizer, donor_tokenizer = sentencepiece_tokenizer(ENGLISH), byte_level_tokenizer(PYTHON)
    base = save(tmp_path / "base", make_model(base_tokenizer), base_tokenizer)
    model = DONORS.get(name, deepseek_v3)(donor_tokenizer)
    donor = save(tmp_path / "donor", model, donor_tokenizer, shard_size="20KB")
    matrices = {"model.embed_tokens.weight", "lm_head.weight"}
    # What is expected is read with the class that transformers has; then the type may become an unknown one.
    assert merge_here(recipe(base, donor), tmp_path / "expected").exit_code == 0
    if name.startswith("code"):
        with_code(donor)
        if name == "code and parts":
            renamed(donor, "language_model.")
            matrices = {f"language_model.{matrix}" for matrix in matrices}

    hub_name = hub(donor, matrices)
    merge(recipe(base, hub_name), tmp_path / "out")
    expected, found = tensors_of(tmp_path / "expected"), tensors_of(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not list((tmp_path / "out").glob("*of_its_own*"))


def test_a_donor_in_one_file(tmp_path: Path, hub: Callable[[Path, set[str]], str]) -> None:
    """Check a donor without an index, for which no list of files is requested."""
    base_tokenizer, donor_tokenizer = sentencepiece_tokenizer(ENGLISH), byte_level_tokenizer(PYTHON)
    base = save(tmp_path / "base", make_model(base_tokenizer), base_tokenizer)
    donor = save(tmp_path / "donor", mistral(donor_tokenizer), donor_tokenizer)
    assert merge_here(recipe(base, donor), tmp_path / "expected").exit_code == 0
    merge(recipe(base, hub(donor, set())), tmp_path / "out")
    expected, found = tensors_of(tmp_path / "expected"), tensors_of(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_shard_that_cannot_be_downloaded(tmp_path: Path, hub: Callable[[Path, set[str]], str]) -> None:
    base_tokenizer, donor_tokenizer = sentencepiece_tokenizer(ENGLISH), byte_level_tokenizer(PYTHON)
    base = save(tmp_path / "base", make_model(base_tokenizer), base_tokenizer)
    donor = save(tmp_path / "donor", mistral(donor_tokenizer), donor_tokenizer, shard_size="20KB")
    index = json.loads((donor / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["lm_head.weight"] != index["model.embed_tokens.weight"]
    sentence = refused(recipe(base, hub(donor, {"model.embed_tokens.weight"})), tmp_path / "out")
    assert sentence.startswith(
        "tokenizer.source: some/donor has a tokenizer but no weights that mergekit can read "
        f"({index['lm_head.weight']} cannot be downloaded);"
    )


def test_a_donor_with_code_in_a_folder(tmp_path: Path) -> None:
    base_tokenizer, donor_tokenizer = sentencepiece_tokenizer(ENGLISH), byte_level_tokenizer(PYTHON)
    base = save(tmp_path / "base", make_model(base_tokenizer), base_tokenizer)
    donor = save(tmp_path / "donor", mistral(donor_tokenizer), donor_tokenizer)
    assert merge_here(recipe(base, donor), tmp_path / "expected").exit_code == 0
    with_code(donor)
    result = merge_here(recipe(base, donor), tmp_path / "out")
    assert result.exit_code == 0, result.output
    expected, found = tensors_of(tmp_path / "expected"), tensors_of(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("names", "matrices"),
    [
        (["model.embed_tokens.weight", "lm_head.weight", "model.layers.3.embed_tokens.weight",
          "model.layers.3.shared_head.head.weight"], ["model.embed_tokens.weight", "lm_head.weight"]),
        (["embed.weight", "head.weight", "layers.0.ffn.gate.weight", "mtp.0.head.weight"],
         ["embed.weight", "head.weight"]),
        (["transformer.wte.weight", "lm_head.weight", "transformer.wpe.weight"],
         ["transformer.wte.weight", "lm_head.weight"]),
        (["model.language_model.embed_tokens.weight", "lm_head.weight", "model.visual.patch_embed.proj.weight"],
         ["model.language_model.embed_tokens.weight", "lm_head.weight"]),
        (["tok_embeddings.weight", "output.weight", "layers.0.attention.wq.weight"],
         ["tok_embeddings.weight", "output.weight"]),
        (["model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight"], ["model.embed_tokens.weight"] * 2),
    ],
)  # fmt: skip
def test_matrices_are_found_by_their_names(tmp_path: Path, names: list[str], matrices: list[str]) -> None:
    """Check the names of DeepSeek, the first Qwen, multimodal models and Mistral's own files."""
    config = {"model_type": "of_its_own", "architectures": ["OfItsOwn"], "vocab_size": 8, "hidden_size": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "x")}))
    save_file({name: torch.zeros(8, 2) for name in names}, tmp_path / "x")
    model = ModelReference.model_validate(str(tmp_path))
    found = [vocabulary_matrix(model, role, MergeOptions(), "tokenizer.source") for role in VocabularyRole]
    assert [(task.tensor, axis) for task, axis in found] == [(name, 0) for name in matrices]


def test_tensors_that_nobody_can_tell_are_refused(tmp_path: Path) -> None:
    """Name the key where mergekit's data does not fit a checkpoint, and transformers does not know its type."""
    config = {"model_type": "zzz", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"rows": "x"}}))
    model = ModelReference.model_validate(str(tmp_path))
    with pytest.raises(OmpError, match=r"tokenizer\.source: mergekit cannot tell the tensors of") as error:
        vocabulary_matrix(model, VocabularyRole.HEAD, MergeOptions(), "tokenizer.source")
    assert error.value.message.endswith("; name a model of an architecture that mergekit supports.")


def test_a_known_architecture_serves_without_a_known_type(tmp_path: Path) -> None:
    """Transplant from a complete donor whose type transformers has no class for."""
    base, donor = tmp_path / "base", tmp_path / "donor"
    for folder, corpus in ((base, ENGLISH), (donor, PYTHON)):
        tokenizer = byte_level_tokenizer(corpus)
        save(folder, make_model(tokenizer), tokenizer)
    config = json.loads((donor / "config.json").read_text())
    (donor / "config.json").write_text(json.dumps(config | {"model_type": "zzz"}))
    merge(recipe(base, donor), tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
