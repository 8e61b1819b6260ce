"""Adapt a configuration's per-layer lists to a recipe that omits, repeats or reorders layers."""

from mergekit.config import MergeConfiguration
from transformers import PretrainedConfig

from mergekit_omp.recipe.blocks import blocks_of


def with_layers_of_slices(settings: PretrainedConfig, original: PretrainedConfig, config: MergeConfiguration) -> None:
    """Select the entries of lists such as ``layer_types`` for the layers of the slices.

    mergekit only sets the number of layers, and transformers neither saves nor loads a configuration with more
    ``layer_types`` than layers.

    Args:
        settings: configuration of the output; modified in place.
        original: configuration of the base, with the same keys.
        config: the recipe.
    """
    sliced = [block for _, block in blocks_of(config) if block.slices]
    text, before = settings.get_text_config(), original.get_text_config()
    count = getattr(before, "num_hidden_layers", None)
    if len(sliced) != 1 or not count:
        return
    layers = [layer for part in sliced[0].slices for layer in range(*part.sources[0].layer_range)]
    if getattr(text, "num_hidden_layers", None) != len(layers) or max(layers) >= count:
        return  # the slices belong to another part of the model
    for key, value in before.to_dict().items():
        if "layer" in key and isinstance(value, list) and len(value) == count:
            setattr(text, key, [value[layer] for layer in layers])
