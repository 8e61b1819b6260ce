"""The tensors of a model that have a vocabulary axis, read from a checkpoint of which little else is fetched."""

import json
import os
from pathlib import Path

import huggingface_hub
from mergekit.architecture import WeightInfo, arch_info_for_config
from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache, LoadTensor
from mergekit.options import MergeOptions

from mergekit_omp.checkpoints.architecture import VocabularyRole, architecture_of, vocabulary_role
from mergekit_omp.compat import open_loaders
from mergekit_omp.errors import OmpError


def vocabulary_matrix(
    model: ModelReference, role: VocabularyRole, options: MergeOptions, key: str
) -> tuple[LoadTensor, int]:
    """The task that loads a model's matrix for one role, and the matrix's vocabulary axis.

    A model with tied embeddings has one matrix for both roles, so that both roles give the same task and mergekit's
    graph solves for it once.

    Raises:
        OmpError: naming the recipe ``key`` that the model stands under, where it has no weights, or none with a
            vocabulary axis.
    """
    try:
        stored = open_checkpoint(model, options).index.tensor_paths
    except (RuntimeError, OSError) as error:
        raise OmpError(
            f"{key}: {model} has a tokenizer but no weights that mergekit can read ({error}); "
            "OMP needs the embeddings of the tokens that are new, so name a model that has both, or an approximation "
            "that needs none, such as subword."
        ) from error
    by_role: dict[VocabularyRole, tuple[LoadTensor, int]] = {}
    architecture = architecture_of(model, options)
    for weight in architecture.all_weights():
        name = _stored_name(weight, stored)
        if weight.vocabulary_axis is None or name is None or name.endswith(".bias"):
            continue
        task = LoadTensor(model=model, tensor=name, device=options.device if options.read_to_gpu else None)
        by_role.setdefault(vocabulary_role(weight.name), (task, weight.vocabulary_axis))
    if not by_role:
        raise OmpError(
            f"{key}: no tensor of {model} has a vocabulary axis that mergekit knows; "
            "name a model of an architecture that mergekit supports."
        )
    tied = getattr(architecture.config, "tie_word_embeddings", False)
    if VocabularyRole.INPUT in by_role and (tied or role not in by_role):
        return by_role[VocabularyRole.INPUT]
    return by_role.get(role) or next(iter(by_role.values()))


def open_checkpoint(model: ModelReference, options: MergeOptions) -> LazyTensorLoader:
    """The loader of a checkpoint, downloading from the Hub only the shards with a vocabulary axis.

    mergekit fetches whole repositories; a draft model's donor may have hundreds of gigabytes, of which one or two
    shards are needed.
    """
    loaders = open_loaders()
    known = arch_info_for_config(model.config(trust_remote_code=options.trust_remote_code))
    if model in loaders or model.lora or known is None or os.path.exists(model.model.path):
        return LoaderCache().get(model)
    hub = {"revision": model.model.revision, "cache_dir": options.transformers_cache}
    try:
        index = huggingface_hub.hf_hub_download(model.model.path, "model.safetensors.index.json", **hub)
    except huggingface_hub.errors.EntryNotFoundError:
        return LoaderCache().get(model)  # one file, or pickles
    shard_of = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    weights = known.all_weights(model.config(trust_remote_code=options.trust_remote_code))
    names = {_stored_name(weight, shard_of) for weight in weights if weight.vocabulary_axis is not None}
    shards = sorted({shard_of[name] for name in names if name is not None})
    folder = huggingface_hub.snapshot_download(model.model.path, allow_patterns=["*.json", *shards], **hub)
    loaders[model] = LazyTensorLoader.from_disk(folder, lazy_unpickle=options.lazy_unpickle)
    return loaders[model]


def _stored_name(weight: WeightInfo, stored: dict[str, str]) -> str | None:
    """The name under which a checkpoint holds a weight itself (not the one that it is tied to)."""
    return next((name for name in (weight.name, *(weight.aliases or ())) if name in stored), None)
