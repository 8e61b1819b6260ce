"""Check whether llama.cpp's converter supports the output tokenizer for an architecture.

The converter chooses by architecture how it reads a tokenizer, and some architectures were released with one kind
only. Source: ``set_vocab`` of the classes in ``conversion/*.py`` of llama.cpp, as in llama-cpp-python 0.3.36.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Any


class TokenizerKind(str, Enum):
    """The kind of a tokenizer for a converter."""

    BYTE_LEVEL = "byte-level BPE"
    SENTENCEPIECE = "a SentencePiece model"  # with tokenizer.model
    SENTENCEPIECE_BPE = "SentencePiece BPE without its tokenizer.model"  # in tokenizer.json only
    OTHER = "neither byte-level nor SentencePiece BPE"


_BYTE = frozenset({TokenizerKind.BYTE_LEVEL})
_PIECE = frozenset({TokenizerKind.SENTENCEPIECE})
_EITHER = _BYTE | _PIECE
_ANY_BPE = _EITHER | {TokenizerKind.SENTENCEPIECE_BPE}

_SUPPORTED: Mapping[str, frozenset[TokenizerKind]] = {
    **dict.fromkeys(
        (
            "afmoe",
            "apertus",
            "arcee",
            "granite",
            "granitemoe",
            "granitemoeshared",
            "llama",
            "mistral",
            "mixtral",
            "smollm3",
        ),
        _ANY_BPE,
    ),
    **dict.fromkeys(
        (
            "gemma3",
            "gemma3_text",
            "gemma3n",
            "gemma3n_text",
            "granitemoehybrid",
            "mpt",
            "qwen2",
            "qwen2_5_vl",
            "qwen2_vl",
            "qwen3",
            "qwen3_vl",
        ),
        _EITHER,
    ),
    **dict.fromkeys(
        (
            "baichuan",
            "bitnet",
            "ernie4_5",
            "gemma",
            "gemma2",
            "internlm2",
            "minicpm",
            "minicpm3",
            "mt5",
            "nemotron",
            "orion",
            "phi3",
            "phimoe",
            "t5",
            "umt5",
        ),
        _PIECE,
    ),
    **dict.fromkeys(
        (
            "cohere",
            "cohere2",
            "deepseek_v2",
            "deepseek_v3",
            "falcon",
            "gpt2",
            "gpt_bigcode",
            "gpt_neox",
            "gpt_oss",
            "lfm2",
            "llama4",
            "mamba",
            "olmo",
            "olmo2",
            "olmo3",
            "phi",
            "qwen2_moe",
            "qwen3_moe",
            "stablelm",
            "starcoder2",
        ),
        _BYTE,
    ),
}


def tokenizer_kind(tokenizer_json: Mapping[str, Any], has_sentencepiece_file: bool) -> TokenizerKind:
    """Classify a tokenizer as a converter does.

    Args:
        tokenizer_json: content of its tokenizer.json.
        has_sentencepiece_file: whether the folder contains a tokenizer.model.
    """
    if has_sentencepiece_file:
        return TokenizerKind.SENTENCEPIECE
    model, decoder = tokenizer_json["model"], tokenizer_json.get("decoder") or {}
    if model["type"] == "BPE" and (decoder.get("type") == "ByteLevel" or _has_byte_level(decoder)):
        return TokenizerKind.BYTE_LEVEL
    if model["type"] == "BPE" and model.get("byte_fallback") and decoder.get("type") == "Sequence":
        return TokenizerKind.SENTENCEPIECE_BPE
    return TokenizerKind.OTHER


def _has_byte_level(decoder: Mapping[str, Any]) -> bool:
    return any(part.get("type") == "ByteLevel" for part in decoder.get("decoders", ()))


def converter_note(model_type: str, kind: TokenizerKind) -> str | None:
    """Return a warning if llama.cpp's converter cannot read the kind of tokenizer for an architecture.

    Args:
        model_type: model type in config.json.
        kind: kind of the output tokenizer.

    Returns:
        The warning; None if it can, and for unlisted model types.
    """
    known = _SUPPORTED.get(model_type)
    if known is None or kind in known:
        return None
    return (
        f"llama.cpp's converter to GGUF reads {_listed(known)} for a {model_type} body, but the output tokenizer is "
        f"{kind.value}; transformers and vLLM read it."
    )


def _listed(kinds: frozenset[TokenizerKind]) -> str:
    return " or ".join(kind.value for kind in TokenizerKind if kind in kinds)
