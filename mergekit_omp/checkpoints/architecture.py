"""Find the tensors of a model with a vocabulary axis: input embedding, LM head and its bias."""

import logging
import re
from collections.abc import Iterable, Sequence
from enum import Enum

from mergekit.architecture import ConfiguredModelArchitecture, ModelArchitecture, WeightInfo, arch_info_for_config
from mergekit.common import ModelReference, get_config_value
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_omp.compat import can_convert_checkpoint_keys, get_transformers_info
from mergekit_omp.compat import infer_architecture_info as infer
from mergekit_omp.errors import OmpError

LOG = logging.getLogger(__name__)

_LAYER = re.compile(r"\.\d+\.")


class VocabularyRole(str, Enum):
    """The side of a model that a tensor with a vocabulary axis belongs to."""

    INPUT = "input embedding"
    HEAD = "LM head"


_INPUT_NAME = re.compile(r"(embed_tokens|embed_in|embeddings?|tok_embeddings|wte|shared)(\.|$)")


def vocabulary_role(name: str) -> VocabularyRole:
    """Determine the role of a tensor with a vocabulary axis from its name.

    mergekit's architecture data contains the axis but not the role. Input embeddings have few names; every other
    tensor with a vocabulary axis (``lm_head``, ``embed_out``, ``output_layer``, ``cls.predictions``, biases) belongs
    to the head.
    """
    return VocabularyRole.INPUT if _INPUT_NAME.search(name) else VocabularyRole.HEAD


def architecture_of(model: ModelReference, options: MergeOptions) -> ConfiguredModelArchitecture:
    """Return a model's architecture from mergekit's data if that fits, else inferred from the checkpoint."""
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
    """Return mergekit's data on an architecture if the checkpoints match it, else what mergekit infers from them.

    The data describes one variant of an architecture: it requires the query norms of the larger Command R, the gated
    feed-forward of T5 1.1, and buffers that transformers no longer saves. If neither fits, a tensor is missing from a
    checkpoint, and the data is returned since it names that tensor.

    Raises:
        OmpError: if neither describes a checkpoint, so that mergekit cannot plan a merge.
    """
    if options.allow_crimes or all(_fits(known, model, options) for model in models):
        return known
    name = models[0].config(trust_remote_code=options.trust_remote_code).architectures[0]
    if all(_is_complete(model, options) for model in models):
        LOG.info("The checkpoints do not match mergekit's data on %s; the architecture is inferred from them.", name)
        return infer(tuple(models), base_model, options)
    if any(_weights(known, model, options) is None for model in models):
        raise OmpError(
            f"models: {models[0]} is a {name}, but its config.json does not match mergekit's data on it, and "
            "its tensors do not have the names of transformers: mergekit cannot merge it; name another model."
        )
    return known


def _fits(info: ModelArchitecture, model: ModelReference, options: MergeOptions) -> bool:
    """Tell whether mergekit can load every tensor of a model that an architecture requires."""
    weights = _weights(info, model, options)
    if weights is None or any(weight.optional and weight.aliases for weight in weights):
        return False  # mergekit 0.1.5 cannot plan the latter: it adds a tuple to a list
    names = [(w.name, *(w.aliases or ()), *(w.tied_names or ())) for w in weights if not w.optional]
    return _are_stored(names, model, options)


def _weights(info: ModelArchitecture, model: ModelReference, options: MergeOptions) -> list[WeightInfo] | None:
    try:
        return info.all_weights(model.config(trust_remote_code=options.trust_remote_code))
    except RuntimeError:  # mergekit raises this for a missing key of config.json
        return None


def _is_complete(model: ModelReference, options: MergeOptions) -> bool:
    """Tell whether a checkpoint has every tensor of its transformers class, so that inference is safe.

    mergekit's inference treats tied tensors as optional, but also tensors that are missing from a checkpoint.
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
    if not is_tied(config):
        required += [(name,) for name in heads]
    return _are_stored(required, model, options)


def _are_stored(names: Iterable[tuple[str, ...]], model: ModelReference, options: MergeOptions) -> bool:
    """Tell whether a checkpoint has all tensors, under one of their names or convertible by mergekit to the first."""
    stored = set(LoaderCache().get(model).index.tensor_paths)
    model_type = model.config(trust_remote_code=options.trust_remote_code).model_type
    convertible: dict[str, bool] = {}  # by name without the layer number: the result is the same for every layer
    for aliases in names:
        if not stored.isdisjoint(aliases):
            continue
        template = _LAYER.sub(".", aliases[0])
        if template not in convertible:
            convertible[template] = can_convert_checkpoint_keys(model_type, stored, aliases[0])
        if not convertible[template]:
            return False
    return True


def vocabulary_size(config: PretrainedConfig) -> int | None:
    """Return the number of embedding rows according to a configuration; None if it has no such key."""
    info = arch_info_for_config(config)
    for key in (info and info.vocab_size_config_key, "vocab_size", "text_config.vocab_size"):
        size = key and _config_value_or_none(config, key)
        if size:
            return size
    return None


def hidden_size(config: PretrainedConfig) -> int | None:
    """Return the hidden size of the language model according to a configuration; None if it has no such key."""
    for key in ("hidden_size", "text_config.hidden_size", "n_embd", "d_model", "dim"):
        if size := _config_value_or_none(config, key):
            return size
    return None


def is_tied(config: PretrainedConfig) -> bool:
    """Tell whether a configuration ties the LM head to the input embedding.

    That of a model with image or audio input says it at its top, which transformers 5 reads, or for its text model.
    """
    tied = getattr(config, "tie_word_embeddings", None)
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False) if tied is None else tied)


def position_settings(config: PretrainedConfig) -> dict[str, float | str]:
    """Return a configuration's position settings: base and scaling of RoPE, and the maximum context length."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    rope = rope if rope and isinstance(rope, dict) else {"rope_theta": getattr(text, "rope_theta", None)}
    parts = {f"{kind}.": part for kind, part in rope.items() if isinstance(part, dict)} or {"": rope}  # as in Gemma 3
    found = {f"{kind}{key}": value for kind, part in parts.items() for key, value in part.items()}
    found["max_position_embeddings"] = getattr(text, "max_position_embeddings", None)
    return {key: value for key, value in found.items() if isinstance(value, int | float | str)}


def has_second_embedding(config: PretrainedConfig) -> bool:
    """Tell whether every layer has an embedding too, as in Gemma 3n, which mergekit does not recognise as such."""
    keys = ("hidden_size_per_layer_input", "text_config.hidden_size_per_layer_input")
    return any(_config_value_or_none(config, key) for key in keys)


def _config_value_or_none(config: PretrainedConfig, key: str) -> int | None:
    try:
        return get_config_value(config, key)
    except RuntimeError:  # mergekit raises this for a missing key
        return None
