"""Make a configuration's lists of layers fit a recipe that leaves layers out, repeats or reorders them."""

from mergekit.config import MergeConfiguration
from transformers import PretrainedConfig

from mergekit_omp.recipe.blocks import blocks_of


def with_layers_of_slices(settings: PretrainedConfig, original: PretrainedConfig, config: MergeConfiguration) -> None:
    """Take from lists such as ``layer_types`` the entries of the layers that the slices take.

    mergekit sets the number of layers alone, and transformers refuses to save or load a configuration whose
    ``layer_types`` are more than that.

    Args:
        settings: the output's configuration; changed in place.
        original: the base's, which has the same keys.
        config: the recipe.
    """
    sliced = [block for _, block in blocks_of(config) if block.slices]
    text, before = settings.get_text_config(), original.get_text_config()
    count = getattr(before, "num_hidden_layers", None)
    if len(sliced) != 1 or not count:
        return
    layers = [layer for part in sliced[0].slices for layer in range(*part.sources[0].layer_range)]
    if getattr(text, "num_hidden_layers", None) != len(layers) or max(layers) >= count:
        return  # the slices are of another part of the model
    for key, value in before.to_dict().items():
        if "layer" in key and isinstance(value, list) and len(value) == count:
            setattr(text, key, [value[layer] for layer in layers])
