"""Create small checkpoints, and run recipes with the real commands."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import mergekit_omp

ENGLISH = [
    "The quick brown fox jumps over the lazy dog while other foxes watch the river and the hills.",
    "Tokenizers split words into pieces, and every piece has a row in the embedding matrix of a model.",
    "Merging models whose vocabularies differ needs their rows to be realigned before anything is averaged.",
    "In the beginning there were 12 numbers, then 345 numbers, and at the end of 2024 there were 67890.",
] * 3
PYTHON = [
    "def realign(weight, match):\n    return weight[match.rows]\n\n\nfor index in range(10):\n    print(index)\n",
    "class Tokenizer:\n    def __init__(self, vocabulary):\n        self.vocabulary = vocabulary\n",
    "The river and the model: while True, every other token is a word of the vocabulary.",
] * 3


def byte_level_tokenizer(
    corpus: list[str] = ENGLISH, size: int = 420, eos: str = "<|endoftext|>", special: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, as in GPT-2, Llama 3 and Qwen."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[eos, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=eos, pad_token=eos)


def sentencepiece_tokenizer(corpus: list[str] = ENGLISH, size: int = 520) -> PreTrainedTokenizerFast:
    """Train a BPE tokenizer with ``▁`` for spaces and byte fallback, as in Gemma, Llama 2 and Mistral."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special + fallback, show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    described = json.loads(backend.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] not in fallback]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )


def wide_tokenizer(first: int, last: int) -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer with a token for each number of a range."""
    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"w{n}" for n in range(first, last))]
    backend = Tokenizer(models.BPE({token: id_ for id_, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokens[0], bos_token=tokens[0])


ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


def make_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    architecture: str = "llama",
    tied: bool = False,
    hidden: int = 32,
    intermediate: int = 64,
    layers: int = 2,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PreTrainedModel:
    """Create a random model for a tokenizer; its embedding and head differ unless they are tied."""
    config_class, model_class = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=rows or max(tokenizer.get_vocab().values()) + 1,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model_class(config).to(dtype)


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    shard_size: str = "5GB",
    safe: bool = True,
) -> Path:
    """Write a checkpoint, as .safetensors or as PyTorch .bin shards."""
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    if not safe:
        _as_pickles(folder)
    return folder


def _as_pickles(folder: Path) -> None:
    for path in list(folder.glob("*.safetensors")):
        torch.save(load_file(path), folder / (_pickle_name(path.name)))
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        described = json.loads(index.read_text())
        described["weight_map"] = {name: _pickle_name(shard) for name, shard in described["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(described))
        index.unlink()


def _pickle_name(name: str) -> str:
    return name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")


def cut_rows(folder: Path) -> None:
    """Truncate each vocabulary matrix of a checkpoint to 100 rows."""
    matrices = ("model.embed_tokens.weight", "lm_head.weight")
    tensors = load_file(folder / "model.safetensors")
    short = {name: t[:100].clone() if name in matrices else t for name, t in tensors.items()}
    save_file(short, folder / "model.safetensors")


def add_code(folder: Path) -> set[str]:
    """Give a checkpoint of a Llama code of its own, whose class has an ``own_name``; return the names of the files."""
    code = {
        "modeling_own.py": "from transformers import LlamaForCausalLM\n\nfrom .part_own import NAME\n\n\n"
        "class Model(LlamaForCausalLM):\n    own_name = NAME\n",
        "part_own.py": "NAME = 'own'\n",
    }
    for name, text in code.items():
        (folder / name).write_text(text)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    return set(code)


def run_recipe(
    recipe: dict[str, Any] | str,
    out: Path,
    *options: str,
    command: str = "mergekit-yaml",
    positional: tuple[str, ...] = (),
    within: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    """Run a recipe with a real command of mergekit.

    ``positional`` arguments come between recipe and ``out``; the command line begins with ``within``.
    """
    path = out.parent / f"{out.name}.yml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False))
    program = shutil.which(command, path=str(Path(sys.executable).parent)) or command
    arguments = [program, str(path), *positional, str(out), *options]
    return subprocess.run([*within, *arguments], capture_output=True, text=True, check=False)


def merge(recipe: dict[str, Any] | str, out: Path, *options: str, within: tuple[str, ...] = ()) -> str:
    """Run a recipe that must succeed, and return the command's standard error."""
    result = run_recipe(recipe, out, *options, within=within)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stderr


def refused(recipe: dict[str, Any] | str, out: Path, *options: str) -> str:
    """Run a recipe that must fail with a message and leave no files, and return the message."""
    result = run_recipe(recipe, out, *options)
    assert result.returncode == 1, (result.returncode, result.stderr[-4000:])
    assert "Traceback" not in result.stderr, result.stderr[-4000:]
    assert not out.exists()
    assert not out.with_name(out.name + ".unfinished").exists()
    return " ".join(result.stderr.split("Error: ", 1)[1].split())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a checkpoint in .safetensors shards."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def run(recipe: dict[str, Any], out: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Run a recipe in this process, quietly by default, and return the tensors that it wrote."""
    mergekit_omp.register()
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    settings = {"random_seed": 7, "quiet": True, **options}
    run_merge(MergeConfiguration.model_validate(recipe), str(out), MergeOptions(**settings))
    return tensors_of(out)


def word_files(folder: Path) -> dict[str, Path]:
    """Write a corpus, word vectors and a dictionary of each word with itself; return them by recipe key."""
    words = sorted({word for text in (*ENGLISH, *PYTHON) for word in text.split()})
    numbers = torch.randn(len(words), 8, generator=torch.Generator().manual_seed(0)).tolist()
    vectors = [f"{word} {' '.join(map(str, row))}" for word, row in zip(words, numbers, strict=True)]
    content = {
        "corpus": [*ENGLISH, *PYTHON] * 5,
        "vectors": [f"{len(words)} 8", *vectors],
        "source_vectors": [f"{len(words)} 8", *vectors],
        "dictionary": [f"{word}\t{word}" for word in words],
    }
    for key, lines in content.items():
        (folder / f"{key}.txt").write_text("\n".join(lines) + "\n")
    return {key: folder / f"{key}.txt" for key in content}
