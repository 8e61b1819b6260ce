"""Write the output's tokenizer files so that transformers 4 and 5, and llama.cpp, read the same tokenizer from them.

transformers 5 names a class that transformers 4 does not have, lists special tokens under a key that transformers 4
takes for something else, and drops ``add_bos_token``, which converters to GGUF go by. For some model types (``qwen2``
is one) it builds a class of its own whatever the folder says, with that class's pre-tokenizer and decoder: harmless
for the tokenizers that these models were released with, it turns another family's tokenizer into nonsense.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from mergekit.common import ModelReference

from mergekit_omp.checkpoints.files import find_file, read_json, read_settings
from mergekit_omp.checkpoints.tokenizers import is_read_as_written
from mergekit_omp.vocabulary.tokens import ROLES, Vocabulary

LOG = logging.getLogger(__name__)

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER = "tokenizer.json"

_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")
_VERSION_5_KEYS = ("backend", "is_local", "local_files_only", "model_specific_special_tokens")
_ROLE_KEYS = tuple(f"{role}_token" for role in ROLES)
_ADDING_ROLES = ("bos", "eos")
_OBEDIENT_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")
"""Classes of transformers 4 whose ``add_bos_token`` and ``add_eos_token`` win over tokenizer.json's template."""

_MODULE = "plain_tokenizer"
_CLASS = "PlainTokenizer"
_SOURCE = f'''"""The tokenizer in tokenizer.json as it is; for this model type transformers would rebuild it."""

from transformers import PreTrainedTokenizerFast


class {_CLASS}(PreTrainedTokenizerFast):
    """Read from tokenizer.json without changes."""
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
        folder: the output folder; it has config.json already.
        vocabulary: the output vocabulary.
        origin: the model whose tokenizer it is, or was before tokens were added.
        unchanged: whether it is that model's tokenizer without additions, so that its SentencePiece file fits too.
        trust_remote_code: whether code that comes with the tokenizer was run and so may be named.
    """
    path = folder / TOKENIZER_CONFIG
    settings = read_json(path)
    if not trust_remote_code:
        settings.pop("auto_map", None)  # the code was neither run nor copied
    if (folder / TOKENIZER).exists():
        described = read_json(folder / TOKENIZER)
        make_readable_by_both(settings, described)
        stated = read_settings(origin, TOKENIZER_CONFIG)
        roles = {role: (vocabulary.tokens[id_].text, id_) for role, id_ in vocabulary.roles.items()}
        if keep_added_roles(settings, described, stated, roles):
            write_json(folder / TOKENIZER, described)
    write_json(path, settings)
    if unchanged:
        copy_sentencepiece(folder, origin)
    ensure_read_as_written(folder)


def make_readable_by_both(settings: dict[str, Any], described: Mapping[str, Any]) -> None:
    """Change a tokenizer_config.json of transformers 5, in place, so that transformers 4 reads the same from it.

    Args:
        settings: what tokenizer_config.json holds.
        described: what tokenizer.json holds.
    """
    if not settings.get("auto_map"):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    special = {token["content"] for token in described.get("added_tokens", []) if token["special"]}
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
        settings.setdefault(f"{role}_token", None)  # a class that is taken for the body's sake has others by default
    # transformers 4 adds token_type_ids otherwise, which causal models refuse.
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    settings["add_prefix_space"] = adds_prefix_space(described)
    # Where converters look for what is special, since a SentencePiece file does not say it of tokens added later.
    settings["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in described.get("added_tokens", [])
    }


def adds_prefix_space(described: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json puts a space in front of a text, as transformers 4 and llama.cpp want to be told."""
    before = [*_components(described, "normalizer"), *_components(described, "pre_tokenizer")]
    return any(
        part.get("add_prefix_space", False)
        if part["type"] == "ByteLevel"
        else part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never") != "never"
        for part in before
        if part["type"] in ("ByteLevel", "Metaspace")
    ) or any(part["type"] == "Prepend" for part in before)


def keep_added_roles(
    settings: dict[str, Any],
    described: dict[str, Any],
    stated: Mapping[str, Any],
    roles: Mapping[str, tuple[str, int]],
) -> bool:
    """Keep a donor's ``add_bos_token`` and ``add_eos_token``, as keys and in the template of tokenizer.json, in place.

    Args:
        settings: the output's tokenizer_config.json.
        described: the output's tokenizer.json.
        stated: the donor's own tokenizer_config.json.
        roles: the token and the id of each role of the output vocabulary.

    Returns:
        Whether ``described`` was changed.
    """
    now = added_roles(described)
    obedient = str(stated.get("tokenizer_class")).removesuffix("Fast") in _OBEDIENT_CLASSES
    wanted = {}
    for role in _ADDING_ROLES:
        key = f"add_{role}_token"
        states = stated.get(key) if isinstance(stated.get(key), bool) else None
        wanted[role] = role in roles and bool(states or (now[role] and not (obedient and states is False)))
        settings[key] = wanted[role] if states is None else states
    if wanted == now or any(part["type"] in _FIXED_PROCESSORS for part in _components(described, "post_processor")):
        return False
    described["post_processor"] = _template(
        [part for part in _components(described, "post_processor") if part["type"] != "TemplateProcessing"],
        roles["bos"] if wanted["bos"] else None,
        roles["eos"] if wanted["eos"] else None,
    )
    return True


_FIXED_PROCESSORS = ("RobertaProcessing", "BertProcessing")


def added_roles(described: Mapping[str, Any]) -> dict[str, bool]:
    """Whether a tokenizer.json adds a token at the start, "bos", and at the end, "eos", of every text."""
    added = dict.fromkeys(_ADDING_ROLES, False)
    for part in _components(described, "post_processor"):
        if part["type"] in _FIXED_PROCESSORS:
            return dict.fromkeys(_ADDING_ROLES, True)
        if part["type"] == "TemplateProcessing":
            added["bos"] |= "SpecialToken" in part["single"][0]
            added["eos"] |= "SpecialToken" in part["single"][-1]
    return added


def _template(
    others: list[dict[str, Any]], bos: tuple[str, int] | None, eos: tuple[str, int] | None
) -> dict[str, Any]:
    """The post-processor that puts ``bos`` in front of a text and ``eos`` behind it, after the ``others``."""

    def one(name: str, type_id: int) -> list[dict[str, Any]]:
        ends = [[{"SpecialToken": {"id": end[0], "type_id": type_id}}] if end else [] for end in (bos, eos)]
        return [*ends[0], {"Sequence": {"id": name, "type_id": type_id}}, *ends[1]]

    template = {
        "type": "TemplateProcessing",
        "single": one("A", 0),
        "pair": [*one("A", 0), *one("B", 1)],
        "special_tokens": {
            text: {"id": text, "ids": [id_], "tokens": [text]} for text, id_ in filter(None, (bos, eos))
        },
    }
    return {"type": "Sequence", "processors": [*others, template]} if others else template


def copy_sentencepiece(folder: Path, origin: ModelReference) -> None:
    """Copy a model's SentencePiece file, which converters read, where it has one."""
    for name in _SENTENCEPIECE_FILES:
        found = find_file(origin, name)
        if found is not None and not (folder / name).exists():
            shutil.copyfile(found, folder / name)


def ensure_read_as_written(folder: Path) -> None:
    """Have ``AutoTokenizer`` read a folder's tokenizer.json unchanged, or warn how to read it.

    A tokenizer whose configuration names a class of its own in ``auto_map`` is not rebuilt. Without
    ``trust_remote_code`` that class is then ignored too, and tokenizer.json read as it is; with it, the class is the
    few lines that are written here beside it.
    """
    if _is_read_as_written(folder):
        return
    path = folder / TOKENIZER_CONFIG
    settings = read_json(path)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["auto_map"] = {"AutoTokenizer": [None, f"{_MODULE}.{_CLASS}"]}
    write_json(path, settings)
    (folder / f"{_MODULE}.py").write_text(_SOURCE, encoding="utf-8")
    if not _is_read_as_written(folder):
        LOG.warning(
            "AutoTokenizer does not read this model's tokenizer as it is; load it with "
            "transformers.PreTrainedTokenizerFast.from_pretrained(<the output folder>)."
        )


def _is_read_as_written(folder: Path) -> bool:
    written = folder / TOKENIZER
    if not written.exists():
        return True  # a tokenizer without this file is read by the class that its configuration names
    read = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not is_read_as_written(read, written):
        return False
    processor = read.backend_tokenizer.post_processor
    added = added_roles({"post_processor": processor and json.loads(processor.__getstate__())})
    return added == added_roles(read_json(written))


def _components(described: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """The parts of a normalizer, pre-tokenizer or post-processor of a tokenizer.json, sequences flattened."""
    component = described.get(name)
    if component is None:
        return
    yield from _flatten(component)


def _flatten(component: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if component["type"] != "Sequence":
        yield component
        return
    [children] = [value for key, value in component.items() if key != "type"]
    for child in children:
        yield from _flatten(child)


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def write_json(path: Path, settings: Mapping[str, Any]) -> None:
    """Write a JSON file as transformers does, indented."""
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
