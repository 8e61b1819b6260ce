"""Test transplants for every architecture: those of mergekit's data, and others that it infers.

``python tests/recipes/test_architectures.py`` writes docs/architectures.md from the tables in this file.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.checkpoints import ENGLISH, PYTHON, byte_level_tokenizer, make_model, run, save, tensors_of
from helpers.versions import TRANSFORMERS
from mergekit.architecture.json_definitions import NAME_TO_ARCH
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from packaging.specifiers import SpecifierSet
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from mergekit_omp.checkpoints.architecture import architecture_of
from mergekit_omp.errors import OmpError
from mergekit_omp.report.record import read_record
from mergekit_omp.tasks.tasks import RealignVocabulary

DOCS = Path(__file__).parents[2] / "docs" / "architectures.md"

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
HEADS = SMALL | {"head_dim": 8}
EXPERTS = HEADS | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "num_heads": 4,
    "patch_size": 14,
    "intermediate_size": 48,
}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}


@dataclass(frozen=True)
class Architecture:
    """A class of transformers, settings of a tiny model, and the differences of its published files.

    ``renamed`` and ``buffers`` turn what transformers saves now into what the published checkpoints hold.
    ``forward_error`` is how the forward pass ends, whatever the weights, with the transformers of ``fails_with``.
    """

    name: str
    model_type: str
    settings: dict[str, Any] = field(default_factory=lambda: SMALL)
    tied: bool = False
    note: str = ""
    renamed: tuple[str, str] | None = None
    buffers: tuple[str, ...] = ()
    by: str = "data"
    fails_with: str = ""
    forward_error: str = ""

    @property
    def id(self) -> str:
        """A name that distinguishes two cases of one class."""
        return "-".join(filter(None, [self.name, self.note, "tied" if self.tied else "untied"]))


CAUSAL = [
    Architecture("LlamaForCausalLM", "llama"),
    Architecture("LlamaForCausalLM", "llama", tied=True),
    Architecture("MistralForCausalLM", "mistral"),
    Architecture("MixtralForCausalLM", "mixtral", SMALL | {"num_local_experts": 2}, note="mixture of experts"),
    Architecture("Qwen2ForCausalLM", "qwen2"),
    Architecture("Qwen3ForCausalLM", "qwen3", HEADS, tied=True),
    Architecture("Qwen3MoeForCausalLM", "qwen3_moe", EXPERTS, note="mixture of experts"),
    Architecture("GemmaForCausalLM", "gemma", HEADS, tied=True, note="embedding scaled by √d"),
    Architecture("Gemma2ForCausalLM", "gemma2", HEADS, tied=True, note="embedding scaled by √d"),
    Architecture("Gemma3ForCausalLM", "gemma3_text", HEADS, tied=True, note="embedding scaled by √d"),
    Architecture("PhiForCausalLM", "phi", note="head with a bias"),
    Architecture("Phi3ForCausalLM", "phi3"),
    Architecture("GPT2LMHeadModel", "gpt2", GPT, tied=True),
    Architecture("GPTBigCodeForCausalLM", "gpt_bigcode", GPT, tied=True),
    Architecture(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        note="with the buffers of Pythia's files",
        buffers=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
    ),
    Architecture("FalconForCausalLM", "falcon", note="as Falcon 7B", by="inferred"),
    Architecture("FalconForCausalLM", "falcon", SMALL | {"new_decoder_architecture": True}, note="as Falcon 40B"),
    Architecture("StableLmForCausalLM", "stablelm"),
    Architecture("Starcoder2ForCausalLM", "starcoder2"),
    Architecture("CohereForCausalLM", "cohere", tied=True, note="logits scaled, as Command R", by="inferred"),
    Architecture(
        "CohereForCausalLM", "cohere", SMALL | {"use_qk_norm": True}, tied=True, note="logits scaled, as Command R+"
    ),
    Architecture("Cohere2ForCausalLM", "cohere2", HEADS, tied=True, note="logits scaled"),
    Architecture("Olmo2ForCausalLM", "olmo2"),
    Architecture(
        "GraniteForCausalLM",
        "granite",
        SMALL | {"embedding_multiplier": 12.0, "logits_scaling": 8.0},
        tied=True,
        note="embedding and logits scaled",
    ),
    Architecture(
        "GraniteMoeHybridForCausalLM",
        "granitemoehybrid",
        SMALL
        | {
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "layer_types": ["mamba", "attention"],
        },
        note="state space and experts",
    ),
    Architecture("Glm4ForCausalLM", "glm4", HEADS),
    Architecture(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        HEADS
        | {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
        note="mixture of experts",
    ),
    Architecture(
        "MambaForCausalLM",
        "mamba",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        tied=True,
        note="state space",
    ),
    Architecture(
        "Lfm2ForCausalLM", "lfm2", SMALL | {"layer_types": ["conv", "full_attention"]}, tied=True, note="convolutions"
    ),
    Architecture("ApertusForCausalLM", "apertus"),
    Architecture("ArceeForCausalLM", "arcee", HEADS),
    Architecture("AfmoeForCausalLM", "afmoe", EXPERTS | {"num_dense_layers": 1}, note="mixture of experts"),
]
SEVERAL_MODULES = [
    Architecture(
        "Gemma3ForConditionalGeneration",
        "gemma3",
        {"text_config": HEADS, "vision_config": VISION | {"vision_use_head": False}, "mm_tokens_per_image": 1},
        tied=True,
        note="vision",
        renamed=("vision_tower.", "vision_tower.vision_model."),
    ),
    Architecture(
        "Mistral3ForConditionalGeneration",
        "mistral3",
        {
            "text_config": HEADS | {"model_type": "mistral"},
            "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
        },
        note="vision",
    ),
    Architecture(
        "Llama4ForConditionalGeneration",
        "llama4",
        {
            "text_config": HEADS | {"num_local_experts": 2, "intermediate_size_mlp": 48, "moe_layers": [1]},
            "vision_config": VISION | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        },
        note="vision and experts",
        fails_with="==5.24.*",
        forward_error="'MoeCausalLMOutputWithPast' object has no attribute 'image_outputs'",
    ),
    Architecture(
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl",
        {"text_config": SMALL | ROPE, "vision_config": QWEN_VISION},
        note="vision",
    ),
    Architecture(
        "Qwen3VLForConditionalGeneration",
        "qwen3_vl",
        {"text_config": HEADS | ROPE, "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0]}},
        note="vision",
        by="inferred",
    ),
    Architecture("T5ForConditionalGeneration", "t5", T5, tied=True, note="encoder–decoder, as T5", by="inferred"),
    Architecture(
        "T5ForConditionalGeneration", "t5", T5 | {"feed_forward_proj": "gated-gelu"}, note="encoder–decoder, as T5 1.1"
    ),
]
ENCODERS = [
    Architecture("BertForMaskedLM", "bert", tied=True, note="head with a bias", by="inferred"),
    Architecture("BertModel", "bert", tied=True, note="no head", by="inferred"),
    Architecture("BertForSequenceClassification", "bert", tied=True, note="no vocabulary in the head"),
    Architecture("RobertaForMaskedLM", "roberta", tied=True, note="head with a bias"),
    Architecture(
        "DistilBertForMaskedLM",
        "distilbert",
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
        tied=True,
        note="head with a bias",
    ),
    Architecture("LlamaForSequenceClassification", "llama", note="no vocabulary in the head"),
]
WITHOUT_DATA = [
    Architecture(
        "OPTForCausalLM",
        "opt",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
        },
        tied=True,
        by="inferred",
    ),
    Architecture("BloomForCausalLM", "bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, True, by="inferred"),
    Architecture("MptForCausalLM", "mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}, True, by="inferred"),
    Architecture("SmolLM3ForCausalLM", "smollm3", SMALL, True, by="inferred"),
    Architecture("OlmoForCausalLM", "olmo", by="inferred"),
    Architecture("Exaone4ForCausalLM", "exaone4", HEADS, by="inferred"),
    Architecture(
        "GptOssForCausalLM",
        "gpt_oss",
        HEADS | {"num_local_experts": 2, "num_experts_per_tok": 1},
        note="mixture of experts",
        by="inferred",
    ),
    Architecture("GPTJForCausalLM", "gptj", GPT | {"rotary_dim": 4}, note="head with a bias", by="inferred"),
    Architecture("CodeGenForCausalLM", "codegen", GPT | {"rotary_dim": 4}, note="head with a bias", by="inferred"),
    Architecture("ModernBertForMaskedLM", "modernbert", SMALL, True, note="head with a bias", by="inferred"),
]
SECTIONS = {
    "Causal language models": CAUSAL,
    "Several modules: vision–language models and encoder–decoders": SEVERAL_MODULES,
    "Encoders and classifiers": ENCODERS,
    "Without data in mergekit, which infers the architecture": WITHOUT_DATA,
}
ALL = [architecture for section in SECTIONS.values() for architecture in section]
AS_DONOR = ["LlamaForCausalLM", "GemmaForCausalLM", "PhiForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM"]
AS_DONOR += ["CohereForCausalLM", "MambaForCausalLM", "Gemma3ForConditionalGeneration", "T5ForConditionalGeneration"]
AS_DONOR += ["BertForMaskedLM", "OPTForCausalLM", "Qwen3VLForConditionalGeneration"]
DONORS = [architecture for architecture in ALL if architecture.name in AS_DONOR]

NOT_CHECKED = {
    "code that is not in transformers, only beside the weights (`--trust-remote-code`)": [
        "BaichuanForCausalLM",
        "ChatGLMModel",
        "ExaoneForCausalLM",
        "InternLM2ForCausalLM",
        "JAISLMHeadModel",
        "MixFormerSequentialForCausalLM",
        "Phi3SmallForCausalLM",
        "QWenLMHeadModel",
        "SolarForCausalLM",
        "StableLMEpochForCausalLM",
    ],
    "close kin of a row above, or another name for it": [
        "LLaMaForCausalLM",
        "_AfmoePartialForCausalLM",
        "Qwen3VLMoeForConditionalGeneration",
        "BertForMultipleChoice",
        "BertForTokenClassification",
        "DistilBertModel",
        "DistilBertForSequenceClassification",
        "DistilBertForTokenClassification",
        "RobertaModel",
        "RobertaForSequenceClassification",
        "RobertaForTokenClassification",
        "GPT2ForSequenceClassification",
    ],
    "speech; mergekit's data misspells its tensors' names": ["WhisperForConditionalGeneration"],
}
REFUSED = Architecture(
    "Qwen2VLForConditionalGeneration",
    "qwen2_vl",
    {
        "text_config": SMALL | ROPE,
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 14},
    },
)


HEADER = """# Architectures

Generated by `PYTHONPATH=tests python tests/recipes/test_architectures.py`, whose tests check each row on a tiny random
model with two layers.

- **as base**: the model takes another tokenizer. The output loads in transformers with no tensor missing, config.json
  fits it, the rows of anchors in every tensor with a vocabulary axis (input embedding, head, their biases) are the
  base's bit for bit, every other tensor is unchanged, and on a text of anchors the logits of anchors are the base's.
- **as donor**: a Llama takes the model's tokenizer; one solve where the donor ties its embeddings, two where not
  (transformers 5 says of every T5 that it does).
- **described by**: mergekit's own data, or inferred by mergekit from the checkpoint, which happens for recipes of this
  package also where the data exists but does not fit the files.
"""
DESCRIBED = {"data": "mergekit's data", "inferred": "inferred"}


@pytest.fixture(scope="module")
def tokenizers() -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """Return the tokenizers of base and donor; both are byte-level, so that equal strings are the anchors."""
    return byte_level_tokenizer(ENGLISH, size=330), byte_level_tokenizer(PYTHON, size=310, eos="</s>")


def tiny_model(architecture: Architecture, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = AutoConfig.for_model(architecture.model_type, **architecture.settings)
    for part in (config, config.get_text_config()):
        part.vocab_size = len(tokenizer.get_vocab())
        part.tie_word_embeddings = architecture.tied
        for role in ("bos", "eos", "pad"):
            setattr(part, f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
    model = getattr(transformers, architecture.name)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def checkpoint(architecture: Architecture, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Write a tiny model in the form of its published checkpoints."""
    save(folder, tiny_model(architecture, tokenizer), tokenizer)
    tensors = tensors_of(folder)
    # Older versions of transformers write the published names themselves.
    if architecture.renamed and not any(architecture.renamed[1] in name for name in tensors):
        tensors = {name.replace(*architecture.renamed): tensor for name, tensor in tensors.items()}
    for layer in range(2):
        tensors |= {f"gpt_neox.layers.{layer}.{name}": torch.zeros(4) for name in architecture.buffers}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(architecture: Architecture, folder: Path) -> PreTrainedModel:
    """Load the model of a folder, which must contain every parameter."""
    model, report = getattr(transformers, architecture.name).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    return model


def transplant(base: Path, donor: Path, out: Path) -> None:
    recipe = {"merge_method": "omp", "models": [{"model": str(base)}], "tokenizer": {"source": str(donor)}}
    run(recipe | {"parameters": {"k": 4}, "dtype": "float32"}, out)


def outputs(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    inputs = {"input_ids": torch.tensor([ids])}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        return model.eval()(**inputs)[0]


@pytest.mark.parametrize("architecture", ALL, ids=lambda a: a.id)
def test_as_base(
    architecture: Architecture, tmp_path: Path, tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]
) -> None:
    """Check that the output loads without missing tensors, keeps anchors and body, and computes finite logits."""
    tokenizer, donor_tokenizer = tokenizers
    base = checkpoint(architecture, tokenizer, tmp_path / "base")
    donor = make_model(donor_tokenizer, architecture="mistral", hidden=24, layers=1, seed=3)
    transplant(base, save(tmp_path / "donor", donor, donor_tokenizer), tmp_path / "out")

    described = architecture_of(ModelReference.parse(str(base)), MergeOptions()).info
    assert ("data" if described.architectures else "inferred") == architecture.by
    before, after = load(architecture, base), load(architecture, tmp_path / "out")
    own, new = tokenizer.get_vocab(), donor_tokenizer.get_vocab()
    anchors = [(new[token], own[token]) for token in new if token in own]
    assert 200 < len(anchors) < len(new)
    ids, rows = (list(column) for column in zip(*anchors, strict=True))
    realigned = set()
    for (name, old), (_, tensor) in zip(before.state_dict().items(), after.state_dict().items(), strict=True):
        if old.shape == tensor.shape:
            assert torch.equal(old, tensor), name
        else:
            realigned.add(name)
            assert tensor.shape == (len(new), *old.shape[1:])
            assert torch.equal(tensor[ids], old[rows]), name
            assert torch.isfinite(tensor).all()
    assert any(tensor is after.get_input_embeddings().weight for tensor in _parameters(after, realigned))
    head = after.get_output_embeddings()
    if head is not None:
        assert all(any(each is tensor for each in _parameters(after, realigned)) for tensor in head.parameters())
    if architecture.fails_with and TRANSFORMERS in SpecifierSet(architecture.fails_with):
        for model in (before, after):
            with pytest.raises(AttributeError, match=architecture.forward_error):
                outputs(model, [0])
        pytest.xfail(f"transformers {TRANSFORMERS} does not compute it: {architecture.forward_error}")
    result = outputs(after, ids[:6])
    assert torch.isfinite(result).all()
    if head is not None:
        assert result.shape[-1] == len(new)
    # What consists of anchors alone is read as before, save where a head without anchors says otherwise.
    expected = outputs(before, rows[:6])
    same = (result[..., ids], expected[..., rows]) if head is not None else (result, expected)
    torch.testing.assert_close(*same)


def _parameters(model: PreTrainedModel, names: set[str]) -> list[torch.Tensor]:
    return [parameter for name, parameter in model.named_parameters(remove_duplicate=False) if name in names]


@pytest.mark.parametrize("architecture", DONORS, ids=lambda a: a.id)
def test_as_donor(
    architecture: Architecture, tmp_path: Path, tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]
) -> None:
    """Transplant its tokenizer to a Llama, with one solve if the donor ties its embeddings, else two."""
    tokenizer, donor_tokenizer = tokenizers
    base = save(tmp_path / "base", make_model(tokenizer), tokenizer)
    donor = checkpoint(architecture, donor_tokenizer, tmp_path / "donor")
    transplant(base, donor, tmp_path / "out")
    solves = read_record(tmp_path / "out")["solves"]
    assert len(solves) == (1 if AutoConfig.from_pretrained(donor).tie_word_embeddings else 2)
    assert all(solve["targets"] > 10 for solve in solves)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(outputs(model, [1, 2, 300])).all()


def test_an_architecture_that_nothing_describes_is_refused_by_name(
    tmp_path: Path, tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]
) -> None:
    tokenizer, donor_tokenizer = tokenizers
    base = checkpoint(REFUSED, tokenizer, tmp_path / "base")
    donor = save(tmp_path / "donor", make_model(donor_tokenizer), donor_tokenizer)
    with pytest.raises(OmpError, match="is a Qwen2VLForConditionalGeneration, but its config"):
        transplant(base, donor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_embeddings_in_every_layer_are_refused_by_name(
    tmp_path: Path, tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]
) -> None:
    """Check Gemma 3n, whose embeddings in layers would keep the order of the old vocabulary."""
    base, donor = (
        save(tmp_path / name, make_model(t), t) for name, t in zip(("base", "donor"), tokenizers, strict=True)
    )
    gemma = AutoConfig.for_model(
        "gemma3n_text", architectures=["Gemma3nForCausalLM"], vocab_size=330, num_hidden_layers=2
    )
    gemma.save_pretrained(base)
    with pytest.raises(OmpError, match="is a Gemma3nForCausalLM, which also has an embedding in every layer"):
        transplant(base, donor, tmp_path / "out")


def test_another_vocabulary_axis(
    tmp_path: Path,
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Transpose the heads of model and donor, which no data of mergekit has, and compare the transposed result."""
    base, donor = (
        save(tmp_path / name, make_model(t), t) for name, t in zip(("base", "donor"), tokenizers, strict=True)
    )
    tasks: dict[str, RealignVocabulary] = {}
    execute = RealignVocabulary.execute

    def recording(task: RealignVocabulary, tensors: dict, **prepared: Any) -> dict:
        tasks[task.name] = task
        return execute(task, tensors, **prepared)

    monkeypatch.setattr(RealignVocabulary, "execute", recording)
    transplant(base, donor, tmp_path / "out")

    task = tasks["lm_head.weight"]
    [realigned_input] = task.inputs
    [new] = realigned_input.new_rows
    solve = new.solve.model_copy(update={"vocabulary_axis": 1})
    new = new.model_copy(update={"solve": solve, "vocabulary_axis": 1})
    task = task.model_copy(
        update={"inputs": (realigned_input.model_copy(update={"new_rows": (new,)}),), "vocabulary_axis": 1}
    )
    head, donor_head = (tensors_of(folder)["lm_head.weight"].T for folder in (base, donor))
    problem = new.pose.execute()
    prepared = new.execute(problem, solution=solve.execute(problem, donor_head), donor=donor_head)
    name = realigned_input.model.reference
    result = execute(task, {name: head}, rows_0_0=prepared)[name]
    torch.testing.assert_close(result.T, tensors_of(tmp_path / "out")["lm_head.weight"])


def test_every_architecture_of_mergekit_is_accounted_for() -> None:
    tried = {architecture.name for architecture in [*ALL, REFUSED]}
    assert set(NAME_TO_ARCH) == (tried & set(NAME_TO_ARCH)).union(*NOT_CHECKED.values())


def matrix() -> str:
    """Build the page of the documentation."""
    lines = [HEADER]
    for title, section in SECTIONS.items():
        lines += [f"## {title}", "", "| architecture | embeddings | described by | as base | as donor | |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [
            f"| {a.name} | {'tied' if a.tied else 'untied'} | {DESCRIBED[a.by]} | ✓ | {'✓' if a in DONORS else ''} "
            f"| {a.note} |"
            for a in section
        ]
        lines.append("")
    lines += ["## Not checked", ""]
    lines += [f"- {', '.join(sorted(names))}: {reason}." for reason, names in NOT_CHECKED.items()]
    lines += [
        "",
        "## What cannot work",
        "",
        f"- {REFUSED.name}: refused by name before any work. mergekit's data looks for `num_hidden_layers` where",
        "  transformers 5 has none, and cannot convert the names of its tensors either.",
        "- Gemma 3n, and Gemma 4 with per-layer embeddings: refused by name; every layer looks up tokens too.",
        "",
    ]
    return "\n".join(lines)


def test_docs_are_current() -> None:
    assert DOCS.read_text(encoding="utf-8") == matrix()


if __name__ == "__main__":
    DOCS.write_text(matrix(), encoding="utf-8")
