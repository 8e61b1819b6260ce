"""Read a model's tokenizer as its files describe it.

For some model types (``qwen2`` is one) transformers 5 builds a class of its own whatever the folder says, with that
class's pre-tokenizer and decoder. Harmless for the tokenizers that these models were released with, it turns another
family's tokenizer into nonsense.
"""

import json
import logging
from pathlib import Path
from typing import Any

import transformers
from mergekit.common import ModelPath, ModelReference
from packaging.version import Version
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mergekit_omp.checkpoints.files import find_file
from mergekit_omp.errors import OmpError
from mergekit_omp.vocabulary.tokens import ROLES

LOG = logging.getLogger(__name__)

_TEKKEN_SINCE = "5.17"
"""The first transformers that reads a tekken.json with its special tokens and without mistral-common's classes."""

_ROLE_NAMES = {f"{role}_token" for role in ROLES}


def load_tokenizer(model: ModelReference, trust_remote_code: bool, key: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    ``tokenizer.json`` counts before what transformers would make of it. A ``tekken.json`` without one is converted,
    since mistral-common's class, which transformers takes for it, does not say how its tokens stand for bytes.

    Raises:
        OmpError: naming the recipe ``key`` that the model stands under, where there is none that can be read.
    """
    try:
        return _load(model, trust_remote_code)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever the parsers raise; a panic in tokenizers' Rust is no Exception
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OmpError(
            f"{key}: no tokenizer can be read from {model.model} ({reason}); name a model with a tokenizer."
        ) from error


def tokenizer_of(name: str | Path, trust_remote_code: bool = False, key: str = "MODEL") -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub id, as :func:`load_tokenizer` does for a model of a recipe."""
    return load_tokenizer(ModelReference(model=ModelPath(path=str(name))), trust_remote_code, key)


def named_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The tokens that a tokenizer has a name of its own for, such as ``image_token``: processors ask for them."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name not in _ROLE_NAMES}


def is_read_as_written(tokenizer: PreTrainedTokenizerBase, tokenizer_json: Path) -> bool:
    """Whether a tokenizer that transformers loaded splits texts as its ``tokenizer.json`` says."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    described = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    model, vocabulary = backend.model, described["model"]["vocab"]
    if backend.get_vocab_size(with_added_tokens=False) != len(vocabulary):
        return False
    # The parts alone, as this version of tokenizers writes them: with the vocabulary it takes seconds.
    empty = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    written = Tokenizer.from_str(json.dumps(described | {"model": empty, "added_tokens": [], "post_processor": None}))
    return described["model"].get("type") in (type(model).__name__, None) and _parts(backend) == _parts(written)


def _load(model: ModelReference, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    name = {"pretrained_model_name_or_path": model.model.path, "revision": model.model.revision}
    written = find_file(model, "tokenizer.json")
    if written is None and (tekken := find_file(model, "tekken.json")) is not None:
        return _convert_tekken(tekken)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**name, trust_remote_code=trust_remote_code)
    has_own_code = not type(tokenizer).__module__.startswith("transformers.")
    if written is None or has_own_code or is_read_as_written(tokenizer, written):
        return tokenizer
    LOG.info(
        "%s: transformers reads its tokenizer as a %s, which splits texts in another way than its tokenizer.json "
        "says; tokenizer.json is read instead",
        model,
        type(tokenizer).__name__,
    )
    return PreTrainedTokenizerFast.from_pretrained(**name)


def _convert_tekken(tekken: Path) -> PreTrainedTokenizerBase:
    """Convert a ``tekken.json``, and begin texts with bos, as mistral-common does.

    Raises:
        ValueError: transformers is too old for it.
    """
    if Version(transformers.__version__) < Version(_TEKKEN_SINCE):
        raise ValueError(
            f"a tekken.json without a tokenizer.json needs transformers {_TEKKEN_SINCE} or newer, and "
            f"{transformers.__version__} is installed"
        )
    from transformers.integrations.mistral import convert_tekken_tokenizer  # type: ignore[attr-defined]

    tokenizer = convert_tekken_tokenizer(str(tekken))
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def _parts(backend: Tokenizer) -> list[Any]:
    """What decides how texts are split and tokens are read, the model aside."""
    parts = (backend.normalizer, backend.pre_tokenizer, backend.decoder)
    return [None if part is None else json.loads(part.__getstate__()) for part in parts]
