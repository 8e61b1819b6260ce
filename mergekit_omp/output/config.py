"""Write config.json and generation_config.json of the output, consistent with its tokenizer."""

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
from mergekit_omp.errors import first_line
from mergekit_omp.output.code import copy_code
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

_LISTS = ("suppress_tokens", "begin_suppress_tokens")
"""Settings that list token ids."""

_SEQUENCES = "bad_words_ids"
"""A setting that lists sequences of token ids."""

_OTHER_SEQUENCES = ("force_words_ids", "sequence_bias", "forced_decoder_ids")
"""Settings with sequences of token ids that are left out: the output tokenizer splits these texts differently."""

_SET_ROLES = ("bos", "eos", "pad")
"""Roles whose ids a configuration always contains, even if they are None."""


def without_ids_of_base(settings: PretrainedConfig) -> PretrainedConfig:
    """Set bos, eos and pad of a configuration to None until :func:`finish_output` sets the output's ids.

    The base's ids are meaningless in the output vocabulary, and transformers warns about ids beyond its end when
    mergekit saves the configuration.
    """
    for role in _SET_ROLES:
        setattr(settings, f"{role}_token_id", None)
    return settings


def finish_output(folder: Path, transplant: Transplant) -> None:
    """Make the files of a merged model consistent, and readable by both transformers 4 and 5.

    mergekit writes the base model's ids, a vocab_size that ignores gaps between ids, and no generation_config.json.
    """
    base, vocabulary = transplant.base, transplant.vocabulary
    origin = transplant.donors[0]  # the output tokenizer is that of this model, or extends it
    # Uses own_match, since a token that the recipe approximates is still the same token.
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
    if transplant.trust_remote_code:
        copy_code(settings, base.reference, folder)
    else:
        settings.pop("auto_map", None)  # as for a tokenizer: that code was not run
    write_json(folder / CONFIG, settings)

    generation = _generation_settings(base.reference)
    stop_candidates = [
        *of_origin.translated(_stop_ids_of(_generation_settings(origin.reference))),
        *ids.translated(_stop_ids_of(generation)),
    ]
    ids.translate(generation)
    set_roles(generation, roles)
    generation["eos_token_id"] = stop_ids(stop_candidates, generation["eos_token_id"], base.match.rows)
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
    """Translates token ids in a model's configuration files to output ids.

    Args:
        output: the output vocabulary.
        model: the model's vocabulary.
        rows: int64 (V,), the model's row for each output id, -1 for none.
    """

    def __init__(self, output: Vocabulary, model: Vocabulary, rows: torch.Tensor) -> None:
        self.roles = output.roles
        by_role = {id_: self.roles[role] for role, id_ in model.roles.items() if role in self.roles}
        self.by_row = by_role | {row: id_ for id_, row in reversed(list(enumerate(rows.tolist()))) if row >= 0}

    def translated(self, ids: Iterable[int]) -> list[int]:
        """Return the output ids of tokens of the model, without tokens that the output lacks."""
        return [self.by_row[id_] for id_ in ids if isinstance(id_, int) and id_ in self.by_row]

    def translate(self, settings: dict[str, Any]) -> None:
        """Replace every token id in a configuration, including nested ones, by the output id of the same token.

        The setting of a token that the output vocabulary lacks becomes None, with a warning. Placeholders of images
        and audio become -1, since these settings must be integers. Lists lose tokens that the output vocabulary lacks.
        """
        for key, value in settings.items():
            if key in _OTHER_SEQUENCES and value is not None:
                LOG.warning("%s: %s contains tokens of the base model and is left out; set it anew", key, value)
                settings[key] = None
            elif isinstance(value, dict):
                self.translate(value)
            elif _names_a_token(key) and isinstance(value, int) and not isinstance(value, bool):
                role = key.removesuffix("_token_id")
                settings[key] = self.roles.get(role, self.by_row.get(value))
                if settings[key] is None and role not in ROLES:
                    LOG.warning("%s: the output vocabulary has no token for the base model's id %d", key, value)
                    settings[key] = None if hasattr(_GENERATION, key) else -1
            elif (key in _LISTS or _names_a_token(key)) and isinstance(value, list):
                settings[key] = self.translated(value) or None
            elif key == _SEQUENCES and isinstance(value, list):
                found = [(ids, self.translated(ids)) for ids in value if isinstance(ids, list)]
                settings[key] = [new for ids, new in found if len(new) == len(ids)] or None


def _with_roles_of_config(
    roles: Mapping[str, int], of_origin: TokenIds, config: Mapping[str, Any]
) -> dict[str, int | None]:
    """Return the roles of the output tokenizer, and further roles that the config.json of its origin sets.

    Qwen's tokenizers have no bos, for example, but Qwen's config.json sets one.
    """
    result: dict[str, int | None] = dict(roles)
    for role in _SET_ROLES:
        key = f"{role}_token_id"
        text_config = config.get("text_config")
        id_ = config.get(key, text_config.get(key) if isinstance(text_config, dict) else None)
        if role not in roles:
            result[role] = next(iter(of_origin.translated([id_] if isinstance(id_, int) else [])), None)
    return result


def set_roles(settings: dict[str, Any], roles: Mapping[str, int | None]) -> None:
    """Set bos, eos and pad, and unk if it exists, to the ids of the output, in place."""
    for role in _SET_ROLES:
        settings[f"{role}_token_id"] = roles.get(role)
    if "unk" in roles:
        settings["unk_token_id"] = roles["unk"]


def _names_a_token(key: str) -> bool:
    return key.endswith(("_token_id", "_token_index"))


def _generation_settings(model: ModelReference) -> dict[str, Any]:
    """Read the settings of a model's generation_config.json; return {} if there is none, or none that can be read."""
    try:
        loaded = GenerationConfig.from_pretrained(model.model.path, revision=model.model.revision)
        return loaded.to_diff_dict()
    except OSError:
        return {}
    except Exception as error:  # arbitrary errors for values of other types; not worth the weights
        LOG.warning("%s: its generation_config.json cannot be read (%s) and is left out", model, first_line(error))
        return {}


def _stop_ids_of(generation: Mapping[str, Any]) -> list[int]:
    eos = generation.get("eos_token_id")
    return list(eos) if isinstance(eos, list) else [] if eos is None else [eos]


def stop_ids(candidates: Iterable[int], eos: int | None, rows: torch.Tensor) -> int | list[int] | None:
    """Return the ids at which generation stops: those of the models' generation_config.json, or else eos.

    Includes every token with the row of one of these: equal rows have equal logits, so the model generates either. A
    base whose bos and eos are one token, for example, may generate the output's bos for its eos.

    Args:
        candidates: output ids of the donor's stop tokens, then of the base's, which the body has learnt to generate.
        eos: eos of the tokenizer.
        rows: int64 (V,), the base's row for each output id, -1 for none.
    """
    ids = list(dict.fromkeys(candidates)) or ([] if eos is None else [eos])
    equal_rows = [int(id_) for stop in ids if rows[stop] >= 0 for id_ in (rows == rows[stop]).nonzero()]
    ids = list(dict.fromkeys([*ids, *equal_rows]))
    return (ids if len(ids) > 1 else ids[0]) if ids else None


def _set_vocab_size(settings: dict[str, Any], base: RecipeModel, size: int) -> None:
    """Set vocab_size where mergekit reads it, and wherever else the configuration contains the base's."""
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
