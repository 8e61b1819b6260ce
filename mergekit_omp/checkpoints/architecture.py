"""Which of a model's tensors have a vocabulary axis: input embeddings, and what belongs to the LM head."""

import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path

import huggingface_hub
from mergekit.architecture import ConfiguredModelArchitecture, ModelArchitecture, WeightInfo, arch_info_for_config
from mergekit.architecture.auto import get_transformers_info
from mergekit.architecture.auto import infer_architecture_info as infer
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ModelReference, get_config_value
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache, LoadTensor
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_omp.errors import OmpError

LOG = logging.getLogger(__name__)

_LAYER = re.compile(r"\.\d+\.")


class VocabularyRole(str, Enum):
    """The side of a model that a tensor with a vocabulary axis belongs to."""

    INPUT = "input embedding"
    HEAD = "LM head"


_INPUT_NAME = re.compile(r"(embed_tokens|embed_in|embeddings?|tok_embeddings|wte|shared)(\.|$)")


def vocabulary_role(name: str) -> VocabularyRole:
    """The role of a tensor that is known to have a vocabulary axis, from its name.

    mergekit's architecture data tells the axis but not the role. Names of input embeddings are few; whatever else has
    a vocabulary axis (``lm_head``, ``embed_out``, ``output_layer``, ``cls.predictions``, their biases) is on the
    output side.
    """
    return VocabularyRole.INPUT if _INPUT_NAME.search(name) else VocabularyRole.HEAD


def architecture_of(model: ModelReference, options: MergeOptions) -> ConfiguredModelArchitecture:
    """A model's own architecture: mergekit's data where it has some that fits, else inferred from the checkpoint."""
    config = model.config(trust_remote_code=options.trust_remote_code)
    known = arch_info_for_config(config)
    info = fitting_architecture(known, (model,), None, options) if known else infer((model,), None, options)
    return ConfiguredModelArchitecture(info=info, config=config)


def fitting_architecture(
    known: ModelArchitecture,
    models: Sequence[ModelReference],
    base_model: ModelReference | None,
    options: MergeOptions,
) -> ModelArchitecture:
    """mergekit's data on an architecture where the checkpoints are as it says, else what mergekit infers from them.

    The data describes one vintage of an architecture: it wants the query norms of the larger Command R, the gated
    feed-forward of T5 1.1, buffers that transformers no longer saves. Where neither fits, a tensor is missing from a
    checkpoint, and the data is what tells which.

    Raises:
        OmpError: where neither describes a checkpoint, so that nothing can be planned.
    """
    if options.allow_crimes or all(_fits(known, model, options) for model in models):
        return known
    name = models[0].config(trust_remote_code=options.trust_remote_code).architectures[0]
    if all(_is_complete(model, options) for model in models):
        LOG.info(
            "The checkpoints are not as mergekit's data on %s says; the architecture is inferred from them.", name
        )
        return infer(tuple(models), base_model, options)
    if any(_weights(known, model, options) is None for model in models):
        raise OmpError(
            f"models: {models[0]} is a {name}, whose config.json is not as mergekit's data on that architecture says, "
            "and whose tensors are not named as transformers names them: mergekit cannot merge it."
        )
    return known


def _fits(info: ModelArchitecture, model: ModelReference, options: MergeOptions) -> bool:
    """Whether mergekit can load every tensor of a model that an architecture requires."""
    weights = _weights(info, model, options)
    if weights is None or any(weight.optional and weight.aliases for weight in weights):
        return False  # mergekit 0.1.5 cannot plan the latter: it adds a tuple to a list
    names = [(w.name, *(w.aliases or ()), *(w.tied_names or ())) for w in weights if not w.optional]
    return _are_stored(names, model, options)


def _weights(info: ModelArchitecture, model: ModelReference, options: MergeOptions) -> list[WeightInfo] | None:
    try:
        return info.all_weights(model.config(trust_remote_code=options.trust_remote_code))
    except RuntimeError:  # mergekit's answer to a key that config.json lacks
        return None


def _is_complete(model: ModelReference, options: MergeOptions) -> bool:
    """Whether a checkpoint has every tensor of the class of transformers that it is for, so that inference is safe.

    mergekit takes for optional what is tied, but also what a checkpoint lacks.
    """
    config = model.config(trust_remote_code=options.trust_remote_code)
    not_saved, _, axes, names = get_transformers_info(model, options)
    if names is None:
        return False

    inputs = tuple(name for name in axes if vocabulary_role(name) is VocabularyRole.INPUT)
    biases = tuple(name for name in axes if name.endswith(".bias"))
    heads = [name for name in axes if name not in inputs + biases]
    required = [(name,) for name in names if name not in axes and name not in (not_saved or ())]
    required += [tied for tied in (inputs, biases) if tied]
    if not config.tie_word_embeddings:
        required += [(name,) for name in heads]
    return _are_stored(required, model, options)


def _are_stored(names: Iterable[tuple[str, ...]], model: ModelReference, options: MergeOptions) -> bool:
    """Whether a checkpoint has each tensor, under one of its names or as one that mergekit converts to the first."""
    stored = set(LoaderCache().get(model).index.tensor_paths)
    model_type = model.config(trust_remote_code=options.trust_remote_code).model_type
    convertible: dict[str, bool] = {}  # by name without the layer's number, since it is the same for every layer
    for known_as in names:
        if not stored.isdisjoint(known_as):
            continue
        template = _LAYER.sub(".", known_as[0])
        if template not in convertible:
            convertible[template] = can_convert_checkpoint_keys(model_type, stored, known_as[0])
        if not convertible[template]:
            return False
    return True


def vocabulary_size(model: ModelReference, trust_remote_code: bool) -> int:
    """Rows of a model's embedding matrix, from its config alone."""
    config = model.config(trust_remote_code=trust_remote_code)
    info = arch_info_for_config(config)
    for key in (info and info.vocab_size_config_key, "vocab_size", "text_config.vocab_size"):
        size = key and _config_value_or_none(config, key)
        if size:
            return size
    raise OmpError(f"{model}: its config.json has no vocab_size, so the rows of its embedding are unknown; add it.")


def hidden_size(config: PretrainedConfig) -> int | None:
    """Width of the language model that a config describes, None where it does not say."""
    for key in ("hidden_size", "text_config.hidden_size", "n_embd", "d_model", "dim"):
        if size := _config_value_or_none(config, key):
            return size
    return None


def has_second_embedding(config: PretrainedConfig) -> bool:
    """Whether every layer has an embedding of the vocabulary too, as in Gemma 3n, which mergekit takes for no such."""
    keys = ("hidden_size_per_layer_input", "text_config.hidden_size_per_layer_input")
    return any(_config_value_or_none(config, key) for key in keys)


def _config_value_or_none(config: PretrainedConfig, key: str) -> int | None:
    try:
        return get_config_value(config, key)
    except RuntimeError:  # mergekit's answer to a key that is not there
        return None


def donor_weight(donor: ModelReference, role: VocabularyRole, options: MergeOptions) -> tuple[LoadTensor, int]:
    """The task that loads a donor's matrix for one role, and the matrix's vocabulary axis.

    A donor with tied embeddings has one matrix for both roles, so that both roles give the same task and mergekit's
    graph solves for it once.

    Raises:
        OmpError: where the donor has no weights, or none with a vocabulary axis.
    """
    try:
        stored = open_donor(donor, options).index.tensor_paths
    except (RuntimeError, OSError) as error:
        raise OmpError(
            f"tokenizer.source: {donor} has a tokenizer but no weights that mergekit can read ({error}); "
            "OMP needs the embeddings of the tokens that are new, so name a model that has both, or an approximation "
            "that needs none, such as subword."
        ) from error
    by_role: dict[VocabularyRole, tuple[LoadTensor, int]] = {}
    architecture = architecture_of(donor, options)
    for weight in architecture.all_weights():
        name = _stored_name(weight, stored)
        if weight.vocabulary_axis is None or name is None or name.endswith(".bias"):
            continue
        task = LoadTensor(model=donor, tensor=name, device=options.device if options.read_to_gpu else None)
        by_role.setdefault(vocabulary_role(weight.name), (task, weight.vocabulary_axis))
    if not by_role:
        raise OmpError(
            f"tokenizer.source: no tensor of {donor} has a vocabulary axis that mergekit knows; "
            "name a donor of an architecture that mergekit supports."
        )
    tied = getattr(architecture.config, "tie_word_embeddings", False)
    if VocabularyRole.INPUT in by_role and (tied or role not in by_role):
        return by_role[VocabularyRole.INPUT]
    return by_role.get(role) or next(iter(by_role.values()))


def open_donor(donor: ModelReference, options: MergeOptions) -> LazyTensorLoader:
    """The loader of a donor's checkpoint, downloading from the Hub only the shards with a vocabulary axis.

    mergekit fetches whole repositories; a draft model's donor may have hundreds of gigabytes, of which one or two
    shards are needed.
    """
    cache = LoaderCache()
    known = arch_info_for_config(donor.config(trust_remote_code=options.trust_remote_code))
    if donor in cache.loaders or donor.lora or known is None or os.path.exists(donor.model.path):
        return cache.get(donor)
    hub = {"revision": donor.model.revision, "cache_dir": options.transformers_cache}
    try:
        index = huggingface_hub.hf_hub_download(donor.model.path, "model.safetensors.index.json", **hub)
    except huggingface_hub.errors.EntryNotFoundError:
        return cache.get(donor)  # one file, or pickles
    shard_of = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    weights = known.all_weights(donor.config(trust_remote_code=options.trust_remote_code))
    names = {_stored_name(weight, shard_of) for weight in weights if weight.vocabulary_axis is not None}
    shards = sorted({shard_of[name] for name in names if name is not None})
    folder = huggingface_hub.snapshot_download(donor.model.path, allow_patterns=["*.json", *shards], **hub)
    cache.loaders[donor] = LazyTensorLoader.from_disk(folder, lazy_unpickle=options.lazy_unpickle)
    return cache.loaders[donor]


def _stored_name(weight: WeightInfo, stored: dict[str, str]) -> str | None:
    """The name under which a checkpoint holds a weight itself (not the one that it is tied to)."""
    return next((name for name in (weight.name, *(weight.aliases or ())) if name in stored), None)
