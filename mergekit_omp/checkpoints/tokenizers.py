"""Load a model's tokenizer as its files describe it.

For some model types, such as ``qwen2``, transformers 5 always builds its own class with the pre-tokenizer and decoder
of that class. That works for the tokenizers with which these models were released, but breaks the tokenizer of another
family.
"""

import json
import logging
from pathlib import Path
from typing import Any

import transformers
from mergekit.common import ModelReference
from packaging.version import Version
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mergekit_omp.checkpoints.files import find_file, read_json, read_tokenizer_json
from mergekit_omp.errors import failures_as
from mergekit_omp.vocabulary.tokens import LARGEST_GAP, ROLES

LOG = logging.getLogger(__name__)

_TEKKEN_SINCE = "5.17"
"""First version of transformers that converts a tekken.json with its special tokens without mistral-common."""

_TOKENIZER_FILES = ("tokenizer.", "tekken.", "spiece.", "sentencepiece.", "vocab.")
"""The beginnings of the names of files with a vocabulary."""

_ROLE_NAMES = {f"{role}_token" for role in ROLES}


def load_tokenizer(model: ModelReference, trust_remote_code: bool, key: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    ``tokenizer.json`` takes precedence over the class that transformers chooses. A ``tekken.json`` without it is
    converted, since mistral-common's class, which transformers uses, does not declare the bytes of its tokens.

    Args:
        model: the model in the recipe.
        trust_remote_code: whether to run code that comes with the model.
        key: its recipe key, for messages.

    Returns:
        The tokenizer.

    Raises:
        OmpError: if no tokenizer can be read; the message names the recipe key.
    """
    with failures_as(
        lambda reason: (
            f"{key}: cannot read a tokenizer from {model.model} ({_lack_of_files(model) or reason}); name "
            "a model with a tokenizer."
        )
    ):
        tokenizer = _load(model, trust_remote_code)
        _check_settings(tokenizer)
    return tokenizer


def _lack_of_files(model: ModelReference) -> str | None:
    folder = Path(model.model.path)
    if folder.is_dir() and not any(path.name.startswith(_TOKENIZER_FILES) for path in folder.iterdir()):
        return "the folder has no tokenizer.json, tokenizer.model or tekken.json"
    return None


def named_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return a tokenizer's named tokens that are not roles, such as ``image_token``, which processors use."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name not in _ROLE_NAMES}


def is_read_as_written(tokenizer: PreTrainedTokenizerBase, path: Path) -> bool:
    """Tell whether a tokenizer that transformers loaded splits texts as its tokenizer.json, at ``path``, declares."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    model, described = backend.model, read_tokenizer_json(path)
    if type(tokenizer) is not PreTrainedTokenizerFast:  # which has the vocabulary of the file
        vocabulary = read_json(path)["model"]["vocab"]
        if backend.get_vocab_size(with_added_tokens=False) != len(vocabulary):
            return False
    # Compare the parts as this version of tokenizers serialises them; with the vocabulary that takes seconds.
    empty_model = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    written = Tokenizer.from_str(
        json.dumps({**described, "model": empty_model, "added_tokens": [], "post_processor": None})
    )
    return described["model"].get("type") in (type(model).__name__, None) and _parts(backend) == _parts(written)


def _load(model: ModelReference, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    name = {"pretrained_model_name_or_path": model.model.path, "revision": model.model.revision}
    written = find_file(model, "tokenizer.json")
    if written is not None:
        _check_merges(written)
    elif (tekken := find_file(model, "tekken.json")) is not None:
        return _convert_tekken(tekken)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**name, trust_remote_code=trust_remote_code)
    has_own_code = not type(tokenizer).__module__.startswith("transformers.")
    if written is None or has_own_code or is_read_as_written(tokenizer, written):
        return tokenizer
    LOG.info(
        "%s: transformers loads its tokenizer as a %s, which splits texts differently from its tokenizer.json; "
        "tokenizer.json is used instead",
        model,
        type(tokenizer).__name__,
    )
    return PreTrainedTokenizerFast.from_pretrained(**name)


def _check_merges(path: Path) -> None:
    """Raise a ValueError for merges on which tokenizers 0.23 ends the process instead of raising an exception.

    It takes the prefix of a continuing word off the second part of every merge, also of one that is shorter.
    """
    prefix = (read_tokenizer_json(path).get("model") or {}).get("continuing_subword_prefix") or ""
    for merge in read_json(path)["model"].get("merges", ()) if prefix else ():
        second = merge.split(" ")[-1] if isinstance(merge, str) else merge[-1]
        if not second.startswith(prefix):
            raise ValueError(f"the merge {merge!r} does not continue a word, which {prefix!r} would begin")


def _check_settings(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError for settings of tokenizer_config.json that transformers reads only when it needs them."""
    longest = getattr(tokenizer, "model_max_length", None)
    if longest is not None and not isinstance(longest, int | float):
        raise ValueError(f"its model_max_length is {longest!r}, not a number")
    template = getattr(tokenizer, "chat_template", None)
    texts = template.values() if isinstance(template, dict) else [template or ""]
    if other := next((text for text in texts if not isinstance(text, str)), None):
        raise ValueError(f"its chat_template is {other!r}, not text")


def _convert_tekken(tekken: Path) -> PreTrainedTokenizerBase:
    """Convert a ``tekken.json`` to a tokenizer that starts texts with bos, as mistral-common does.

    Raises:
        ValueError: if transformers is too old, or the file declares absurdly many special tokens.
    """
    if Version(transformers.__version__) < Version(_TEKKEN_SINCE):
        raise ValueError(
            f"a tekken.json without a tokenizer.json needs transformers {_TEKKEN_SINCE} or newer, and "
            f"{transformers.__version__} is installed"
        )
    special = json.loads(tekken.read_text(encoding="utf-8"))["config"]["default_num_special_tokens"]
    if special > LARGEST_GAP:  # one is made for each
        raise ValueError(f"default_num_special_tokens in its tekken.json is {special}")
    from transformers.integrations.mistral import convert_tekken_tokenizer  # type: ignore[attr-defined]

    tokenizer = convert_tekken_tokenizer(str(tekken))
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def _parts(backend: Tokenizer) -> list[Any]:
    """Serialise the components that determine how texts are split and decoded, except the model."""
    parts = (backend.normalizer, backend.pre_tokenizer, backend.decoder)
    return [None if part is None else json.loads(part.__getstate__()) for part in parts]
