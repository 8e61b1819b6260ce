"""Whether llama.cpp's converter knows what to do with a body and a tokenizer that never met before.

The converter chooses by the body's architecture how it looks for a tokenizer; some architectures were released with
one kind only. As of llama.cpp in llama-cpp-python 0.3.36, ``conversion/*.py``, ``set_vocab`` of each class.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Any


class TokenizerKind(str, Enum):
    """What a converter finds in a folder."""

    BYTE_LEVEL = "byte-level BPE"
    SENTENCEPIECE = "a SentencePiece model"  # with tokenizer.model
    SENTENCEPIECE_BPE = "SentencePiece BPE without its tokenizer.model"  # in tokenizer.json alone
    OTHER = "neither byte-level nor SentencePiece BPE"


_BYTE = frozenset({TokenizerKind.BYTE_LEVEL})
_PIECE = frozenset({TokenizerKind.SENTENCEPIECE})
_EITHER = _BYTE | _PIECE
_ANY_BPE = _EITHER | {TokenizerKind.SENTENCEPIECE_BPE}

_READ_FOR: Mapping[str, frozenset[TokenizerKind]] = {
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


def tokenizer_kind(described: Mapping[str, Any], has_sentencepiece_file: bool) -> TokenizerKind:
    """The kind of a tokenizer, as a converter sees it.

    Args:
        described: its tokenizer.json.
        has_sentencepiece_file: whether a tokenizer.model lies beside it.
    """
    if has_sentencepiece_file:
        return TokenizerKind.SENTENCEPIECE
    model, decoder = described["model"], described.get("decoder") or {}
    if model["type"] == "BPE" and (decoder.get("type") == "ByteLevel" or _holds_byte_level(decoder)):
        return TokenizerKind.BYTE_LEVEL
    if model["type"] == "BPE" and model.get("byte_fallback") and decoder.get("type") == "Sequence":
        return TokenizerKind.SENTENCEPIECE_BPE
    return TokenizerKind.OTHER


def _holds_byte_level(decoder: Mapping[str, Any]) -> bool:
    return any(part.get("type") == "ByteLevel" for part in decoder.get("decoders", ()))


def converter_note(model_type: str, kind: TokenizerKind) -> str | None:
    """One sentence where llama.cpp's converter cannot read such a tokenizer for such a body.

    Args:
        model_type: the body's, as in config.json.
        kind: the output tokenizer's.

    Returns:
        None where it can, and for bodies that are not listed here.
    """
    known = _READ_FOR.get(model_type)
    if known is None or kind in known:
        return None
    return (
        f"llama.cpp's converter to GGUF reads {_listed(known)} for a {model_type} body, but the output tokenizer is "
        f"{kind.value}; transformers and vLLM read it."
    )


def _listed(kinds: frozenset[TokenizerKind]) -> str:
    return " or ".join(kind.value for kind in TokenizerKind if kind in kinds)
