"""Which of a model's tensors have a vocabulary axis: input embeddings, and what belongs to the LM head."""

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


def vocabulary_size(config: PretrainedConfig) -> int | None:
    """Rows of the embedding matrix that a config describes, None where it does not say."""
    info = arch_info_for_config(config)
    for key in (info and info.vocab_size_config_key, "vocab_size", "text_config.vocab_size"):
        size = key and _config_value_or_none(config, key)
        if size:
            return size
    return None


def hidden_size(config: PretrainedConfig) -> int | None:
    """Width of the language model that a config describes, None where it does not say."""
    for key in ("hidden_size", "text_config.hidden_size", "n_embd", "d_model", "dim"):
        if size := _config_value_or_none(config, key):
            return size
    return None


def position_settings(config: PretrainedConfig) -> dict[str, float | str]:
    """What a config says of positions: the base and the scaling of RoPE, and the longest text."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {"rope_theta": getattr(text, "rope_theta", None)}
    parts = {f"{kind}.": part for kind, part in rope.items() if isinstance(part, dict)} or {"": rope}  # as in Gemma 3
    found = {f"{kind}{key}": value for kind, part in parts.items() for key, value in part.items()}
    found["max_position_embeddings"] = getattr(text, "max_position_embeddings", None)
    return {key: value for key, value in found.items() if isinstance(value, int | float | str)}


def has_second_embedding(config: PretrainedConfig) -> bool:
    """Whether every layer has an embedding of the vocabulary too, as in Gemma 3n, which mergekit takes for no such."""
    keys = ("hidden_size_per_layer_input", "text_config.hidden_size_per_layer_input")
    return any(_config_value_or_none(config, key) for key in keys)


def _config_value_or_none(config: PretrainedConfig, key: str) -> int | None:
    try:
        return get_config_value(config, key)
    except RuntimeError:  # mergekit's answer to a key that is not there
        return None
