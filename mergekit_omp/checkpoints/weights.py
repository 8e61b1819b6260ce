"""Locate and open the tensors with a vocabulary axis, downloading only the shards that contain them."""

import json
import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from mergekit.architecture import WeightInfo, arch_info_for_config
from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache, LoadTensor
from mergekit.options import MergeOptions
from safetensors import safe_open
from transformers import PretrainedConfig

from mergekit_omp.checkpoints.architecture import VocabularyRole, architecture_of, is_tied, vocabulary_role
from mergekit_omp.checkpoints.files import WEIGHT_FILES, config_of_donor
from mergekit_omp.compat import open_loaders
from mergekit_omp.errors import OmpError, failures_as, first_line

SINGLE_FILE = WEIGHT_FILES[0]
_OTHER_MODEL = "name a model of an architecture that mergekit supports."

_PREFIXES = (
    "",
    "model.",
    "language_model.",
    "language_model.model.",
    "model.language_model.",
    "text_model.",
    "transformer.",
    "llm.",
    "llm.model.",
    "thinker.",
    "thinker.model.",
    "backbone.",
)
_NAMES = {
    VocabularyRole.INPUT: ("embed_tokens", "tok_embeddings", "wte", "word_embeddings", "embed_in", "embed"),
    VocabularyRole.HEAD: ("lm_head", "embed_out", "output_layer", "output", "head"),
}
"""Names of the matrices in architectures that mergekit has no data on, such as ``language_model.lm_head.weight``; all
have one row per token. Matrices of single layers, as in DeepSeek's multi-token prediction, are excluded."""


def vocabulary_matrix(
    model: ModelReference, role: VocabularyRole, options: MergeOptions, key: str
) -> tuple[LoadTensor, int]:
    """Return the task that loads a model's matrix for one role, and the vocabulary axis of the matrix.

    A model with tied embeddings has one matrix for both roles. Both roles then return the same task, and mergekit's
    graph solves for it once.

    Raises:
        OmpError: if the model has no weights, or none with a vocabulary axis, or a matrix that is none; the message
            names the recipe key.
    """
    try:
        loader = open_checkpoint(model, options)
    except Exception as error:  # arbitrary errors of the hub client, and of mergekit for an index or a header
        raise OmpError(
            f"{key}: {model} has a tokenizer but no weights that mergekit can read ({first_line(error)}); "
            "OMP needs embeddings of new tokens, so name a model that has both, or write an approximation that needs "
            "no weights, such as subword."
        ) from error
    with failures_as(lambda reason: f"{key}: mergekit cannot tell the tensors of {model} ({reason}); {_OTHER_MODEL}"):
        found = _vocabulary_tensors(model, loader.index.tensor_paths, options)
        shapes = {name: _stored_shape(name, loader) for name, _ in found.values()}
    for name, shape in shapes.items():
        if shape is not None and len(shape) < 2:
            raise OmpError(f"{key}: {name} of {model} has the shape {shape}, no rows; download the model again.")
    if not found:
        raise OmpError(f"{key}: mergekit finds no tensor of {model} with a vocabulary axis; {_OTHER_MODEL}")
    tasks = {
        side: (LoadTensor(model=model, tensor=name, device=options.device if options.read_to_gpu else None), axis)
        for side, (name, axis) in found.items()
    }
    config = config_of_donor(model, options.trust_remote_code)
    if VocabularyRole.INPUT in tasks and (is_tied(config) or role not in tasks):
        return tasks[VocabularyRole.INPUT]
    return tasks.get(role) or next(iter(tasks.values()))


def stored_rows(model: ModelReference, options: MergeOptions, key: str) -> int | None:
    """Return the number of rows of the input embedding in a checkpoint; None if it has no safetensors header.

    Raises:
        OmpError: as :func:`vocabulary_matrix`.
    """
    task, axis = vocabulary_matrix(model, VocabularyRole.INPUT, options, key)
    shape = _stored_shape(task.tensor, open_checkpoint(model, options))
    return None if shape is None else shape[axis]


def _stored_shape(tensor: str, loader: LazyTensorLoader) -> list[int] | None:
    """Return a tensor's shape by the header of its safetensors file; None for other files."""
    index = loader.index
    if not index.is_safetensors:
        return None
    with safe_open(os.path.join(index.base_path, index.tensor_paths[tensor]), framework="pt") as shard:
        return shard.get_slice(tensor).get_shape()


def _vocabulary_tensors(
    model: ModelReference, stored: Mapping[str, str], options: MergeOptions
) -> dict[VocabularyRole, tuple[str, int]]:
    """Return the name of a checkpoint's matrix for each role, and its vocabulary axis.

    mergekit's data on an architecture contains the names. Without data, usual names are tried, which needs neither a
    class of transformers nor other tensors of the checkpoint.
    """
    config = config_of_donor(model, options.trust_remote_code)
    is_known = type(config) is not PretrainedConfig and arch_info_for_config(config)
    by_name = {} if is_known else _known_names(stored, config)
    if by_name:
        return {role: (name, 0) for role, name in by_name.items()}
    found: dict[VocabularyRole, tuple[str, int]] = {}
    for weight in architecture_of(model, options).all_weights():
        name = _stored_name(weight, stored)
        if weight.vocabulary_axis is not None and name is not None and not name.endswith(".bias"):
            found.setdefault(vocabulary_role(weight.name), (name, weight.vocabulary_axis))
    return found


def _known_names(stored: Container[str], config: PretrainedConfig) -> dict[VocabularyRole, str]:
    """Return the matrices of a checkpoint that have usual names; {} if a required matrix has an unusual name."""
    found = {}
    for role, names in _NAMES.items():
        candidates = (f"{prefix}{name}.weight" for name in names for prefix in _PREFIXES)
        if name := next((name for name in candidates if name in stored), None):
            found[role] = name
    may_lack_head = is_tied(config) or type(config) is PretrainedConfig
    is_complete = VocabularyRole.INPUT in found and (VocabularyRole.HEAD in found or may_lack_head)
    return found if is_complete else {}


def open_checkpoint(model: ModelReference, options: MergeOptions) -> LazyTensorLoader:
    """Return the loader of a checkpoint, downloading from the hub only the shards with a vocabulary axis.

    mergekit downloads complete repositories. The donor of a draft model may have hundreds of gigabytes, of which one
    or two shards are needed.

    Raises:
        OSError, RuntimeError: if the weights cannot be downloaded.
    """
    loaders = open_loaders()
    if model in loaders or model.lora or os.path.exists(model.model.path):
        return LoaderCache().get(model)
    hub: dict[str, Any] = {"revision": model.model.revision, "cache_dir": options.transformers_cache}
    shards = _shards_on_the_hub(model, options, **hub)
    if not shards:
        return LoaderCache().get(model)
    folder = Path(huggingface_hub.snapshot_download(model.model.path, allow_patterns=["*.json", *shards], **hub))
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing and shards == [SINGLE_FILE]:
        return LoaderCache().get(model)  # pickles
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)} cannot be downloaded")
    loaders[model] = LazyTensorLoader.from_disk(str(folder), lazy_unpickle=options.lazy_unpickle)
    return loaders[model]


def _shards_on_the_hub(model: ModelReference, options: MergeOptions, **hub: Any) -> list[str]:
    """Return the files on the hub that contain a model's vocabulary tensors; [] if the index does not tell."""
    try:
        index = huggingface_hub.hf_hub_download(model.model.path, f"{SINGLE_FILE}.index.json", **hub)
    except huggingface_hub.errors.EntryNotFoundError:
        return [SINGLE_FILE]
    shard_of = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    config = config_of_donor(model, options.trust_remote_code)
    if known := arch_info_for_config(config):
        weights = [weight for weight in known.all_weights(config) if weight.vocabulary_axis is not None]
        names = [name for weight in weights if (name := _stored_name(weight, shard_of))]
    else:
        names = list(_known_names(shard_of, config).values())
    return sorted({shard_of[name] for name in names})


def _stored_name(weight: WeightInfo, stored: Container[str]) -> str | None:
    """Return the name under which a checkpoint stores a weight itself (not the weight that it is tied to)."""
    return next((name for name in (weight.name, *(weight.aliases or ())) if name in stored), None)
