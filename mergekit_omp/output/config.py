"""config.json and generation_config.json of the output, consistent with the tokenizer that it ships."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import arch_info_for_config
from mergekit.common import ModelReference
from transformers import GenerationConfig, PretrainedConfig

from mergekit_omp.checkpoints.architecture import architecture_of
from mergekit_omp.checkpoints.files import read_json, read_settings
from mergekit_omp.output.legacy_keys import add_legacy_keys
from mergekit_omp.output.processor import copy_processor
from mergekit_omp.output.tied_head import tied_parts, untie_where_head_differs
from mergekit_omp.output.tokenizer import finish_tokenizer, write_json
from mergekit_omp.recipe.transplant import RecipeModel, Transplant
from mergekit_omp.vocabulary.tokens import ROLES, Vocabulary

LOG = logging.getLogger(__name__)

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"

_GENERATION = GenerationConfig()

_SET_ROLES = ("bos", "eos", "pad")
"""Roles whose ids a configuration always states, if only as None."""


def without_ids_of_base(settings: PretrainedConfig) -> PretrainedConfig:
    """A configuration whose bos, eos and pad are None until :func:`finish_output` sets the output's.

    The base's ids mean nothing in the output vocabulary, and transformers warns of those beyond its end when mergekit
    saves the configuration.
    """
    for role in _SET_ROLES:
        setattr(settings, f"{role}_token_id", None)
    return settings


def finish_output(folder: Path, transplant: Transplant) -> None:
    """Make the files of a merged model agree with each other, and readable by transformers 4 and 5 alike.

    mergekit writes the base model's ids, one row for each token where ids may have gaps, and no
    generation_config.json.
    """
    base, vocabulary = transplant.base, transplant.vocabulary
    origin = transplant.donors[0]  # the model whose tokenizer the output's is, or begins with
    # A token that the recipe has approximated is the same token nevertheless.
    ids = TokenIds(vocabulary, base.vocabulary, base.alignment.own_match.rows)
    of_origin = TokenIds(vocabulary, origin.vocabulary, origin.match.rows)
    roles = _with_roles_of_config(ids.roles, of_origin, read_settings(origin.reference, CONFIG))

    settings = read_json(folder / CONFIG)
    ids.translate(settings)
    set_roles(settings, roles)
    _set_vocab_size(settings, base, transplant.rows)
    if any(tied_parts(settings)):
        untie_where_head_differs(folder, architecture_of(base.reference, transplant.options).all_weights(), settings)
    add_legacy_keys(settings, read_settings(base.reference, CONFIG))
    write_json(folder / CONFIG, settings)

    generation = _generation_settings(base.reference)
    stated = [
        *of_origin.translated(_stated_stop_ids(_generation_settings(origin.reference))),
        *ids.translated(_stated_stop_ids(generation)),
    ]
    ids.translate(generation)
    set_roles(generation, roles)
    generation["eos_token_id"] = stop_ids(stated, generation["eos_token_id"], base.match.rows)
    write_json(folder / GENERATION_CONFIG, generation)

    finish_tokenizer(
        folder,
        vocabulary,
        origin.reference,
        unchanged=transplant.tokenizer_is_unchanged,
        trust_remote_code=transplant.trust_remote_code,
    )
    copy_processor(folder, transplant)


class TokenIds:
    """The output's ids of a model's tokens, for what its configuration files name.

    Args:
        output: the output vocabulary.
        model: the model's own.
        rows: int64 [V], the model's row for each output id, -1 where it has none.
    """

    def __init__(self, output: Vocabulary, model: Vocabulary, rows: torch.Tensor) -> None:
        self.roles = output.roles
        by_role = {id_: self.roles[role] for role, id_ in model.roles.items() if role in self.roles}
        self.by_row = by_role | {row: id_ for id_, row in reversed(list(enumerate(rows.tolist()))) if row >= 0}

    def translated(self, ids: Iterable[int]) -> list[int]:
        """The output's ids of some tokens of the model, those left out that the output lacks."""
        return [self.by_row[id_] for id_ in ids if id_ in self.by_row]

    def translate(self, settings: dict[str, Any]) -> None:
        """Replace every token id in a configuration, nested ones included, by the output's id of the same token.

        A token that the output vocabulary lacks has no id any more: its setting becomes None, with a warning, or -1
        where it marks the place of an image or a sound, since those settings must be integers.
        """
        for key, value in settings.items():
            if isinstance(value, dict):
                self.translate(value)
            elif _names_a_token(key) and isinstance(value, int) and not isinstance(value, bool):
                role = key.removesuffix("_token_id")
                settings[key] = self.roles.get(role, self.by_row.get(value))
                if settings[key] is None and role not in ROLES:
                    LOG.warning("%s: the output vocabulary has no token for the base model's id %d", key, value)
                    settings[key] = None if hasattr(_GENERATION, key) else -1
            elif _names_a_token(key) and isinstance(value, list):
                settings[key] = self.translated(value) or None


def _with_roles_of_config(
    roles: Mapping[str, int], of_origin: TokenIds, config: Mapping[str, Any]
) -> dict[str, int | None]:
    """Roles of the output tokenizer, and those that it leaves open but the config.json it comes with sets.

    Qwen's tokenizers have no bos, and Qwen's config.json names one all the same.
    """
    result: dict[str, int | None] = dict(roles)
    for role in _SET_ROLES:
        key = f"{role}_token_id"
        id_ = config.get(key, config.get("text_config", {}).get(key))
        if role not in roles:
            result[role] = next(iter(of_origin.translated([id_] if isinstance(id_, int) else [])), None)
    return result


def set_roles(settings: dict[str, Any], roles: Mapping[str, int | None]) -> None:
    """Set bos, eos and pad, and unk where there is one, to those of the output, in place."""
    for role in _SET_ROLES:
        settings[f"{role}_token_id"] = roles.get(role)
    if "unk" in roles:
        settings["unk_token_id"] = roles["unk"]


def _names_a_token(key: str) -> bool:
    return key.endswith(("_token_id", "_token_index"))


def _generation_settings(model: ModelReference) -> dict[str, Any]:
    """What a model's generation_config.json sets; nothing where it has none."""
    try:
        loaded = GenerationConfig.from_pretrained(model.model.path, revision=model.model.revision)
    except OSError:
        return {}
    return loaded.to_diff_dict()


def _stated_stop_ids(generation: Mapping[str, Any]) -> list[int]:
    stated = generation.get("eos_token_id")
    return list(stated) if isinstance(stated, list) else [] if stated is None else [stated]


def stop_ids(stated: Iterable[int], eos: int | None, rows: torch.Tensor) -> int | list[int] | None:
    """Where generation stops: at the tokens that the models' own generation_config.json name, else at eos.

    And at every token with the row of one of those: equal rows have equal logits, so that the model says either. So a
    base whose bos and eos are one token says the output's bos where it means its eos.

    Args:
        stated: output ids, the donor's first, then the base's, which the body has learnt to say.
        eos: the tokenizer's.
        rows: int64 [V], the base's row for each output id, -1 where it has none.
    """
    ids = list(dict.fromkeys(stated)) or ([] if eos is None else [eos])
    same = [int(id_) for stop in ids if rows[stop] >= 0 for id_ in (rows == rows[stop]).nonzero()]
    ids = list(dict.fromkeys([*ids, *same]))
    return (ids if len(ids) > 1 else ids[0]) if ids else None


def _set_vocab_size(settings: dict[str, Any], base: RecipeModel, size: int) -> None:
    """Set the number of rows where mergekit looks for it, and wherever else a part of the model states the base's."""
    info = arch_info_for_config(base.config)
    *parents, last = ((info and info.vocab_size_config_key) or "vocab_size").split(".")
    part = settings
    for parent in parents:
        part = part[parent]
    if last in part:
        part[last] = size
    _replace_vocab_size(settings, base.rows, size)


def _replace_vocab_size(settings: dict[str, Any], old: int | None, new: int) -> None:
    for key, value in settings.items():
        if isinstance(value, dict):
            _replace_vocab_size(value, old, new)
        elif key == "vocab_size" and value == old:
            settings[key] = new
