"""The output folder: whole or not there, and consistent with the tokenizer that it ships."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from mergekit.architecture import arch_info_for_config
from mergekit.common import ModelReference
from transformers import GenerationConfig, PretrainedConfig

from mergekit_omp.checkpoints.files import first_line, weight_file
from mergekit_omp.errors import OmpError, explanation
from mergekit_omp.output.tokenizer import ensure_read_as_written
from mergekit_omp.recipe.transplant import Transplant
from mergekit_omp.vocabulary.tokens import ROLES

LOG = logging.getLogger(__name__)

UNFINISHED = ".unfinished"

_GENERATION = GenerationConfig()

_SET_ROLES = ("bos", "eos", "pad")
"""Roles whose ids a configuration always states, if only as None."""


@contextmanager
def staged(out_path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write a model to, which becomes ``out_path`` when the block ends without an exception.

    Until then everything is under ``<out_path>.unfinished``. A failed run removes that folder unless the weights in it
    are whole, and the next run replaces it.

    Raises:
        WeightsAreKeptError: where the block fails after the weights were written.
        OmpError: where ``out_path`` holds something already, cannot be written, or is being written by another run.
    """
    final = Path(os.path.realpath(out_path))
    _check_free(final)
    with _locked(final.with_name(final.name + UNFINISHED), final) as staging:
        folder = staging / final.name  # mergekit takes the model card's title from the folder's name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with _keeping_weights(folder, final):
            yield folder
            _check_free(final)
            if final.exists():
                final.rmdir()
            os.rename(folder, final)


class WeightsAreKeptError(OmpError):
    """Raised where a run fails after its weights were written; the message names the folder that has them."""


@contextmanager
def _keeping_weights(folder: Path, final: Path) -> Iterator[None]:
    """Have a failure of the block keep weights that are whole, which may have taken hours."""
    try:
        yield
    except Exception as error:
        if weight_file(folder) is None:  # mergekit gives them their names when all of them are written
            raise
        reason = explanation(error, final)
        if reason is None:
            LOG.error("The run failed after its weights were written", exc_info=error)
            reason = f"The run failed after its weights were written ({type(error).__name__}: {first_line(error)})."
        raise WeightsAreKeptError(
            f"{reason} The weights are whole and stay in {folder}; other files may be missing there. "
            "The next run into the same output folder replaces them."
        ) from error


@contextmanager
def _locked(staging: Path, final: Path) -> Iterator[Path]:
    """The staging folder, for one run at a time, and gone afterwards unless it keeps whole weights."""
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = FileLock(staging / "lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OmpError(f"{final} is being written by another run; wait for it or name another folder.") from error
    except OSError as error:
        raise OmpError(f"{final}: the output folder cannot be made ({error.strerror}); name another one.") from error
    try:
        if not os.path.exists(lock.lock_file):  # the run that held it has just ended, and has removed it
            raise OmpError(f"{final} was being written by another run until now; look at it or name another folder.")
        yield staging
    except WeightsAreKeptError:
        os.unlink(lock.lock_file)
        raise
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)  # while the lock is held, so that no other run is in there
        raise
    else:
        shutil.rmtree(staging, ignore_errors=True)
    finally:
        lock.release()


def _check_free(final: Path) -> None:
    if not final.exists():
        return
    if not final.is_dir():
        raise OmpError(f"{final} is a file; name a folder that is new or empty.")
    if os.path.ismount(final):
        raise OmpError(f"{final} is a mount point, which a folder cannot replace; name a folder in it.")
    present = sorted(path.name for path in final.iterdir())
    if present:
        raise OmpError(
            f"{final} is not empty (it has {', '.join(present[:3])}{', …' if len(present) > 3 else ''}), "
            "and nothing is replaced unasked; name a new folder or empty that one."
        )


def without_ids_of_base(settings: PretrainedConfig) -> PretrainedConfig:
    """A configuration whose bos, eos and pad are None until :func:`finish_output` sets the output's.

    The base's ids mean nothing in the output vocabulary, and transformers warns of those beyond its end when mergekit
    saves the configuration.
    """
    for role in _SET_ROLES:
        setattr(settings, f"{role}_token_id", None)
    return settings


def finish_output(folder: Path, transplant: Transplant) -> None:
    """Make config.json and generation_config.json of a merged model agree with its tokenizer.

    mergekit writes the base model's ids, one row for each token where ids may have gaps, and no
    generation_config.json.
    """
    ids = TokenIds(transplant)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    ids.translate(settings)
    ids.set_roles(settings)
    _set_vocab_size(settings, transplant)
    _write_json(folder / "config.json", settings)

    generation = _generation_settings(transplant.base.reference)
    ids.translate(generation)
    ids.set_roles(generation)
    generation["eos_token_id"] = _stop_ids(transplant, generation["eos_token_id"])
    _write_json(folder / "generation_config.json", generation)
    if not transplant.trust_remote_code:
        _forget_code(folder / "tokenizer_config.json")
    ensure_read_as_written(folder)


def _forget_code(path: Path) -> None:
    """Remove the name of a tokenizer class that came with the donor: its code was neither run nor copied."""
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if settings.pop("auto_map", None):
        _write_json(path, settings)


class TokenIds:
    """The ids of the output vocabulary that a base model's configuration should name."""

    def __init__(self, transplant: Transplant) -> None:
        self.roles = transplant.vocabulary.roles
        of_base = transplant.base.vocabulary.roles
        by_role = {id_: self.roles[role] for role, id_ in of_base.items() if role in self.roles}
        # A token that the recipe has approximated is the same token nevertheless.
        rows = transplant.base.alignment.own_match.rows.tolist()
        self.by_base_id = by_role | {row: id_ for id_, row in reversed(list(enumerate(rows))) if row >= 0}

    def set_roles(self, settings: dict[str, Any]) -> None:
        """Set bos, eos and pad, and unk where there is one, to those of the output tokenizer."""
        for role in _SET_ROLES:
            settings[f"{role}_token_id"] = self.roles.get(role)
        if "unk" in self.roles:
            settings["unk_token_id"] = self.roles["unk"]

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
                settings[key] = self.roles.get(role, self.by_base_id.get(value))
                if settings[key] is None and role not in ROLES:
                    LOG.warning("%s: the output vocabulary has no token for the base model's id %d", key, value)
                    settings[key] = None if hasattr(_GENERATION, key) else -1
            elif _names_a_token(key) and isinstance(value, list):
                settings[key] = [self.by_base_id[id_] for id_ in value if id_ in self.by_base_id] or None


def _names_a_token(key: str) -> bool:
    return key.endswith(("_token_id", "_token_index"))


def _generation_settings(model: ModelReference) -> dict[str, Any]:
    """What a model's generation_config.json sets; nothing where it has none."""
    try:
        loaded = GenerationConfig.from_pretrained(model.model.path, revision=model.model.revision)
    except OSError:
        return {}
    return loaded.to_diff_dict()


def _stop_ids(transplant: Transplant, eos: int | None) -> int | list[int] | None:
    """Where generation stops: as the donor's own generation_config.json says, else at the tokenizer's eos.

    And at every token with the row of one of those: equal rows have equal logits, so that the model says either. So a
    base whose bos and eos are one token says the output's bos where it means its eos.
    """
    source = transplant.source
    stated = _generation_settings(source).get("eos_token_id") if isinstance(source, ModelReference) else None
    ids = stated if isinstance(stated, list) else [stated]
    ids = [id_ for id_ in ids if id_ in transplant.vocabulary.tokens] or ([] if eos is None else [eos])
    rows = transplant.base.match.rows
    same = [int(id_) for stop in ids if rows[stop] >= 0 for id_ in (rows == rows[stop]).nonzero()]
    ids = list(dict.fromkeys([*ids, *same]))
    return (ids if len(ids) > 1 else ids[0]) if ids else None


def _set_vocab_size(settings: dict[str, Any], transplant: Transplant) -> None:
    """Set the number of rows where mergekit looks for it, and wherever else a part of the model states the base's."""
    info = arch_info_for_config(transplant.base.config)
    *parents, last = ((info and info.vocab_size_config_key) or "vocab_size").split(".")
    part = settings
    for parent in parents:
        part = part[parent]
    if last in part:
        part[last] = transplant.rows
    _replace_vocab_size(settings, transplant.base.rows, transplant.rows)


def _replace_vocab_size(settings: dict[str, Any], old: int, new: int) -> None:
    for key, value in settings.items():
        if isinstance(value, dict):
            _replace_vocab_size(value, old, new)
        elif key == "vocab_size" and value == old:
            settings[key] = new


def _write_json(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
