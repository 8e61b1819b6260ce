"""Write tiny models whose tokenizers have the structure of real ones, for tests that damage their files."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from helpers.checkpoints import ENGLISH, make_model, save, sentencepiece_tokenizer
from helpers.tokenizers_for_tests import package_file, qwen, unigram, word_piece

ORDINARY, ADDED = 300, 8
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def write_corpus(root: Path) -> dict[str, Path]:
    """Write the models; each has one layer and a width that differs from the others'."""
    small_qwen = shrunk(qwen(), eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    small_qwen.chat_template = TEMPLATE
    tokenizers = {
        "gemma": (sentencepiece_tokenizer(ENGLISH, 340), "llama"),
        "qwen": (small_qwen, "qwen2"),
        "unigram": (unigram(), "llama"),
        "wordpiece": (word_piece(), "mistral"),
    }
    folders = {}
    for number, (name, (tokenizer, architecture)) in enumerate(tokenizers.items()):
        model = make_model(
            tokenizer, architecture=architecture, layers=1, hidden=8 + 8 * number, intermediate=8, seed=number
        )
        folders[name] = save(root / name, model, tokenizer)
    folders["mistral"] = _mistral(root / "mistral", folders["gemma"])
    folders["tekken"] = _tekken(root / "tekken", folders["gemma"])
    folders["sharded"] = _sharded(root / "sharded", folders["qwen"])
    return folders


def shrunk(tokenizer: PreTrainedTokenizerFast, **roles: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with the first ids of another, and its components and added tokens."""
    described: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    model["vocab"] = {text: id_ for text, id_ in model["vocab"].items() if id_ < ORDINARY}
    model["merges"] = [
        [left, right] for left, right in model["merges"] if {left, right, left + right} <= model["vocab"].keys()
    ]
    described["added_tokens"] = [
        token | {"id": ORDINARY + number} for number, token in enumerate(described["added_tokens"][:ADDED])
    ]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)), **roles)


def _mistral(folder: Path, like: Path) -> Path:
    """Write a model that has a tokenizer.model of Mistral 7B, with its first pieces, and no tokenizer.json."""
    stored = package_file("mistral_common", "data/tokenizer.model.v1").read_bytes()
    model = sentencepiece_model.ModelProto.FromString(stored)
    single = [piece for piece in model.pieces[ORDINARY:] if len(piece.piece) == 1 and piece.piece < "\u3000"]
    kept = [*model.pieces[:ORDINARY], *single[:39]]
    del model.pieces[:]
    model.pieces.extend(kept)
    shutil.copytree(like, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _tekken(folder: Path, like: Path) -> Path:
    """Write a model that has the start of a tekken.json of Mistral Nemo, and no tokenizer.json."""
    described = json.loads(package_file("mistral_common", "data/tekken_240911.json").read_text())
    special = 20
    described["vocab"] = described["vocab"][:ORDINARY]
    described["config"] |= {
        "num_vocab_tokens": ORDINARY,
        "default_vocab_size": ORDINARY + special,
        "default_num_special_tokens": special,
    }
    assert base64.b64decode(described["vocab"][0]["token_bytes"]) == b"\0"
    shutil.copytree(like, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "tekken.json").write_text(json.dumps(described))
    return folder


def _sharded(folder: Path, like: Path) -> Path:
    """Write a model in two shards."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(like, folder)
    (folder / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(like, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="25KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder
