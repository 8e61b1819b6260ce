"""Write the output's tokenizer files so that transformers 4 and 5 and llama.cpp load the same tokenizer.

transformers 5 writes a class name that transformers 4 does not have, lists special tokens under a key that has another
meaning in transformers 4, and omits ``add_bos_token``, which converters to GGUF read. For some model types, such as
``qwen2``, it always builds its own class with the pre-tokenizer and decoder of that class. That works for the
tokenizers with which these models were released, but breaks the tokenizer of another family.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from mergekit.common import ModelReference

from mergekit_omp.checkpoints.files import find_file, read_json, read_settings, read_tokenizer_json
from mergekit_omp.checkpoints.tokenizers import is_read_as_written
from mergekit_omp.vocabulary.byte_encoding import flattened
from mergekit_omp.vocabulary.tokens import ROLES, Vocabulary

LOG = logging.getLogger(__name__)

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER = "tokenizer.json"

_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")
_VERSION_5_KEYS = ("backend", "is_local", "local_files_only", "model_specific_special_tokens")
_ROLE_KEYS = tuple(f"{role}_token" for role in ROLES)
_ADDING_ROLES = ("bos", "eos")
_OVERRIDING_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")
"""Classes of transformers 4 in which ``add_bos_token`` and ``add_eos_token`` override the template of
tokenizer.json."""

_MODULE = "plain_tokenizer"
_CLASS = "PlainTokenizer"
_SOURCE = f'''"""Loads tokenizer.json unchanged; for this model type transformers would rebuild it."""

from transformers import PreTrainedTokenizerFast


class {_CLASS}(PreTrainedTokenizerFast):
    """Loads tokenizer.json without changes."""
'''


def finish_tokenizer(
    folder: Path,
    vocabulary: Vocabulary,
    origin: ModelReference,
    *,
    unchanged: bool,
    trust_remote_code: bool,
) -> None:
    """Rewrite the tokenizer files that transformers 5 wrote to ``folder``.

    Args:
        folder: the output folder, which contains config.json.
        vocabulary: the output vocabulary.
        origin: the model whose tokenizer it is, apart from added tokens.
        unchanged: whether no tokens were added, so that the SentencePiece file of the model is valid too.
        trust_remote_code: whether code that comes with the tokenizer was run, so that it may be named.
    """
    path = folder / TOKENIZER_CONFIG
    settings = read_json(path)
    if not trust_remote_code:
        settings.pop("auto_map", None)  # that code was neither run nor copied
    tokenizer_json = read_tokenizer_json(folder / TOKENIZER) if (folder / TOKENIZER).exists() else None
    if tokenizer_json is not None:
        make_readable_by_both(settings, tokenizer_json)
        donor_settings = read_settings(origin, TOKENIZER_CONFIG)
        roles = {role: (vocabulary.tokens[id_].text, id_) for role, id_ in vocabulary.roles.items()}
        if keep_added_roles(settings, tokenizer_json, donor_settings, roles):
            complete = read_json(folder / TOKENIZER)
            write_json(folder / TOKENIZER, complete | {"post_processor": tokenizer_json["post_processor"]})
    write_json(path, settings)
    if unchanged:
        copy_sentencepiece(folder, origin)
    if tokenizer_json is not None:  # else the class in its configuration loads it
        ensure_read_as_written(folder, tokenizer_json)


def make_readable_by_both(settings: dict[str, Any], tokenizer_json: Mapping[str, Any]) -> None:
    """Change a tokenizer_config.json of transformers 5 in place so that transformers 4 loads the same tokenizer.

    Args:
        settings: content of tokenizer_config.json.
        tokenizer_json: content of tokenizer.json.
    """
    if not settings.get("auto_map"):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    special = {token["content"] for token in tokenizer_json.get("added_tokens", []) if token["special"]}
    named = {key: token for key, token in settings.items() if key.endswith("_token") and key not in _ROLE_KEYS}
    extra = settings.pop("extra_special_tokens", None) or []
    if isinstance(extra, Mapping):
        named |= extra
    elif listed := [token for token in extra if _content(token) in special]:
        settings["additional_special_tokens"] = listed
    if named := {name: _content(token) for name, token in named.items() if isinstance(token, (str, Mapping))}:
        settings["extra_special_tokens"] = named
    for key in _VERSION_5_KEYS:
        settings.pop(key, None)
    for role in ("bos", "eos", "unk", "pad"):
        settings.setdefault(f"{role}_token", None)  # the class of the body may have other defaults
    # Otherwise transformers 4 adds token_type_ids, which causal models reject.
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    settings["add_prefix_space"] = adds_prefix_space(tokenizer_json)
    # Converters read special tokens from here, since a SentencePiece file does not contain added tokens.
    settings["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in tokenizer_json.get("added_tokens", [])
    }


def adds_prefix_space(tokenizer_json: Mapping[str, Any]) -> bool:
    """Tell whether a tokenizer.json prepends a space to texts, a setting that transformers 4 and llama.cpp read."""
    before = [*flattened(tokenizer_json.get("normalizer")), *flattened(tokenizer_json.get("pre_tokenizer"))]
    return any(
        part.get("add_prefix_space", False)
        if part["type"] == "ByteLevel"
        else part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never") != "never"
        for part in before
        if part["type"] in ("ByteLevel", "Metaspace")
    ) or any(part["type"] == "Prepend" for part in before)


def keep_added_roles(
    settings: dict[str, Any],
    tokenizer_json: dict[str, Any],
    donor_settings: Mapping[str, Any],
    roles: Mapping[str, tuple[str, int]],
) -> bool:
    """Keep a donor's ``add_bos_token`` and ``add_eos_token``, as keys and in the template of tokenizer.json, in place.

    Args:
        settings: tokenizer_config.json of the output.
        tokenizer_json: tokenizer.json of the output.
        donor_settings: tokenizer_config.json of the donor.
        roles: token and id of each role of the output vocabulary.

    Returns:
        Whether ``tokenizer_json`` was changed.
    """
    now = added_roles(tokenizer_json)
    overriding = str(donor_settings.get("tokenizer_class")).removesuffix("Fast") in _OVERRIDING_CLASSES
    adds = {}
    for role in _ADDING_ROLES:
        key = f"add_{role}_token"
        value = donor_settings.get(key) if isinstance(donor_settings.get(key), bool) else None
        adds[role] = role in roles and bool(value or (now[role] and not (overriding and value is False)))
        settings[key] = adds[role] if value is None else value
    processors = list(flattened(tokenizer_json.get("post_processor")))
    if adds == now or any(part["type"] in _FIXED_PROCESSORS for part in processors):
        return False
    tokenizer_json["post_processor"] = _template(
        [part for part in processors if part["type"] != "TemplateProcessing"],
        roles["bos"] if adds["bos"] else None,
        roles["eos"] if adds["eos"] else None,
    )
    return True


_FIXED_PROCESSORS = ("RobertaProcessing", "BertProcessing")


def added_roles(tokenizer_json: Mapping[str, Any]) -> dict[str, bool]:
    """Tell whether a tokenizer.json adds a token at the start ("bos") and at the end ("eos") of every text."""
    added = dict.fromkeys(_ADDING_ROLES, False)
    for part in flattened(tokenizer_json.get("post_processor")):
        if part["type"] in _FIXED_PROCESSORS:
            return dict.fromkeys(_ADDING_ROLES, True)
        if part["type"] == "TemplateProcessing":
            ends = {"bos": part["single"][:1], "eos": part["single"][-1:]}  # of an empty template, nothing
            for role, end in ends.items():
                added[role] |= any("SpecialToken" in piece for piece in end)
    return added


def _template(
    others: list[dict[str, Any]], bos: tuple[str, int] | None, eos: tuple[str, int] | None
) -> dict[str, Any]:
    """Return a post-processor that adds ``bos`` before and ``eos`` after a text, after the processors ``others``."""

    def sequence(name: str, type_id: int) -> list[dict[str, Any]]:
        ends = [[{"SpecialToken": {"id": end[0], "type_id": type_id}}] if end else [] for end in (bos, eos)]
        return [*ends[0], {"Sequence": {"id": name, "type_id": type_id}}, *ends[1]]

    template = {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": [*sequence("A", 0), *sequence("B", 1)],
        "special_tokens": {
            text: {"id": text, "ids": [id_], "tokens": [text]} for text, id_ in filter(None, (bos, eos))
        },
    }
    return {"type": "Sequence", "processors": [*others, template]} if others else template


def copy_sentencepiece(folder: Path, origin: ModelReference) -> None:
    """Copy a model's SentencePiece file, if it has one, for converters."""
    for name in _SENTENCEPIECE_FILES:
        found = find_file(origin, name)
        if found is not None and not (folder / name).exists():
            shutil.copyfile(found, folder / name)


def ensure_read_as_written(folder: Path, tokenizer_json: Mapping[str, Any]) -> None:
    """Make ``AutoTokenizer`` load a folder's tokenizer.json unchanged, or warn that it does not.

    transformers does not rebuild a tokenizer whose configuration names its own class in ``auto_map``. Without
    ``trust_remote_code`` it ignores that class and loads tokenizer.json unchanged; with it, it uses the short class
    that is written to the folder here.

    Args:
        folder: the output folder.
        tokenizer_json: content of its tokenizer.json.
    """
    if _is_read_as_written(folder, tokenizer_json):
        return
    path = folder / TOKENIZER_CONFIG
    settings = read_json(path)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["auto_map"] = {"AutoTokenizer": [None, f"{_MODULE}.{_CLASS}"]}
    write_json(path, settings)
    (folder / f"{_MODULE}.py").write_text(_SOURCE, encoding="utf-8")
    if not _is_read_as_written(folder, tokenizer_json):
        LOG.warning(
            "AutoTokenizer does not load this model's tokenizer unchanged; load it with "
            "transformers.PreTrainedTokenizerFast.from_pretrained(<the output folder>)."
        )


def _is_read_as_written(folder: Path, described: Mapping[str, Any]) -> bool:
    loaded = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not is_read_as_written(loaded, folder / TOKENIZER):
        return False
    processor = loaded.backend_tokenizer.post_processor
    added = added_roles({"post_processor": processor and json.loads(processor.__getstate__())})
    return added == added_roles(described)


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def write_json(path: Path, settings: Mapping[str, Any]) -> None:
    """Write an indented JSON file, as transformers does."""
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
