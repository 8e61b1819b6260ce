"""Check a recipe against its models: configurations, weights, vocabularies."""

from collections.abc import Mapping
from pathlib import Path

from mergekit.architecture import arch_info_for_config
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration, OutputSliceDefinition
from transformers import PretrainedConfig

from mergekit_omp.checkpoints.architecture import has_second_embedding, hidden_size
from mergekit_omp.checkpoints.files import check_adapter, check_weights, weight_file
from mergekit_omp.checkpoints.weights import stored_rows
from mergekit_omp.errors import OmpError
from mergekit_omp.initializers.registry import needs_donor, without_donor
from mergekit_omp.parameters import TRANSPLANT, Approximation, OmpParameters
from mergekit_omp.recipe.blocks import blocks_of, settings_of
from mergekit_omp.recipe.overrides import asks_to_approximate, source_model, source_rows
from mergekit_omp.recipe.transplant import DonorProblem, RecipeModel, Transplant

Configs = Mapping[ModelReference, PretrainedConfig]
"""Configurations of the inputs, the base model first."""


def check_configs(config: MergeConfiguration, configs: Configs, keys: Mapping[ModelReference, str]) -> None:
    """Raise an OmpError for the first mistake in the inputs' configurations.

    Args:
        config: the recipe.
        configs: configurations of its inputs.
        keys: recipe key of each input.
    """
    _check_embeddings(configs, keys)
    _check_transplant_inputs(config, configs)
    _check_layer_ranges(config, configs)
    _check_hidden_sizes(configs)


def check_vocabularies(transplant: Transplant) -> None:
    """Raise an OmpError for the first override or input that the vocabularies cannot provide rows for."""
    _check_overrides(transplant)
    need = _setting_that_needs_a_donor(transplant.config)
    for model in transplant.inputs:
        _check_donors(model, transplant, need)


def check_checkpoints(transplant: Transplant) -> None:
    """Raise an OmpError for the first model whose weights cannot be read."""
    for model in transplant.inputs:
        if model.reference.lora:
            check_adapter(model.reference, model.rows, transplant.options, model.key)
        check_weights(model.reference, transplant.options, model.key)
        _check_depth(model, transplant)
        _check_rows(model, transplant)
    if not any(bool(model.match.is_new().any()) for model in transplant.inputs):
        return
    for donor in transplant.donors:
        # Only some shards of a donor on the hub are downloaded; planning reports a donor without weights.
        if donor not in transplant.inputs and weight_file(Path(donor.reference.model.path)) is not None:
            check_weights(donor.reference, transplant.options, donor.key)
            _check_rows(donor, transplant)


def _check_embeddings(configs: Configs, keys: Mapping[ModelReference, str]) -> None:
    for model, config in configs.items():
        if has_second_embedding(config):
            [architecture, *_] = config.architectures or [config.model_type]
            raise OmpError(
                f"{keys[model]}: {model} is a {architecture}, which also has an "
                "embedding in every layer that mergekit does not handle; name a model with a single embedding."
            )


def _check_transplant_inputs(config: MergeConfiguration, configs: Configs) -> None:
    if config.merge_method == TRANSPLANT and config.models and len(configs) != 1:
        names = ", ".join(map(str, configs))
        raise OmpError(
            f"merge_method: omp transplants one model, but the recipe names {len(configs)} "
            f"({names}); keep the base (only tokenizer.source names the donor), "
            "or merge with omp_<method>."
        )


def _check_layer_ranges(config: MergeConfiguration, configs: Configs) -> None:
    for path, block in blocks_of(config):
        for i, part in enumerate(block.slices or ()):
            _check_slice(f"{path}slices[{i}]", part, configs, has_modules=bool(config.modules))


def _check_slice(place: str, part: OutputSliceDefinition, configs: Configs, *, has_modules: bool) -> None:
    for j, source in enumerate(part.sources):
        start, end = source.layer_range
        layers = None if has_modules else _layers(configs[source.model])
        if not 0 <= start < end or (layers is not None and end > layers):
            has = "" if layers is None else f" ({source.model} has {layers} layers)"
            raise OmpError(
                f"{place}.sources[{j}].layer_range: [{start}, {end}] is not a range of layers{has}; "
                f"write the first layer and the one after the last, such as [0, {layers or 12}]."
            )


def _layers(config: PretrainedConfig) -> int | None:
    info = arch_info_for_config(config)
    if info is None or len(info.modules) != 1:
        return None
    [module] = info.modules.values()
    return getattr(config, module.architecture.num_layers_config_key() or "", None)


def _check_hidden_sizes(configs: Configs) -> None:
    sizes = {model: hidden_size(config) for model, config in configs.items()}
    (first, expected), *others = sizes.items()
    for model, size in others:
        if None not in (size, expected) and size != expected:
            raise OmpError(
                f"models: {model} has hidden size {size} and {first} has {expected}, but models must have the same "
                "hidden size to be merged; to give one of them the other's tokenizer, use merge_method: omp with the "
                "other as tokenizer.source."
            )


def _check_depth(model: RecipeModel, transplant: Transplant) -> None:
    """Check the number of layers, since planning a merge of a billion layers would exhaust the memory."""
    layers = _layers(model.config) if model.config else None
    index = None if model.reference.lora else model.reference.tensor_index(transplant.options.transformers_cache)
    tensors = len(index.tensor_paths) if index else 0
    if tensors and layers and layers > tensors:
        raise OmpError(
            f"{model.key}: config.json of {model} declares {layers} layers, but its checkpoint has {tensors} tensors "
            "in all; download the model again."
        )


def _check_rows(model: RecipeModel, transplant: Transplant) -> None:
    """Check that config.json declares enough rows, so that tokens with a row do not count as new tokens.

    Further rows without tokens are padding.
    """
    tokens = model.tokenizer_size
    if model.rows is None or tokens <= model.rows:
        return
    stored = stored_rows(model.reference, transplant.options, model.key)
    if stored is not None and stored > model.rows:
        raise OmpError(
            f"{model.key}: config.json of {model} says vocab_size {model.rows}, but its tokenizer has {tokens} tokens "
            f"and its embedding {stored} rows; set vocab_size there to {stored}."
        )


def _check_overrides(transplant: Transplant) -> None:
    for token, override in transplant.overrides.items():
        source = override.source
        if asks_to_approximate(override):
            _check_approximated(token, transplant)
        reference = source_model(override)
        if reference is None:
            continue
        key = f"tokenizer.tokens[{token!r}].source"
        if reference not in [model.reference for model in transplant.inputs]:
            inputs = ", ".join(map(str, transplant.inputs))
            raise OmpError(f"{key}: {reference} is not an input of the merge; its rows can come from {inputs}.")
        model, rows = source_rows(transplant.id_of(token), override, transplant)
        if not rows or not all(0 <= row < (model.rows or 0) for row in rows):
            names = (getattr(source, "token", None), getattr(source, "token_id", None), token)
            missing = next(name for name in names if name is not None)
            raise OmpError(f"{key}: {model} has no token {missing!r}; name one that it has.")


def _check_approximated(token: str, transplant: Transplant) -> None:
    donor = transplant.donors[0]
    if donor.match.rows[transplant.id_of(token)] < 0:
        raise OmpError(
            f"tokenizer.tokens[{token!r}]: force without a source asks to approximate the token, but {donor} has no "
            "row to approximate; name a source, such as {kind: zero}."
        )


def _setting_that_needs_a_donor(config: MergeConfiguration) -> str | None:
    """Return the first setting that needs rows of a donor; None if a tokenizer without a model is enough."""
    for value in settings_of(config, "approximation"):
        approximation = Approximation(value)
        if needs_donor(OmpParameters(approximation=approximation)):
            return f"approximation: {approximation.value}"
    return "magikarp: true" if True in settings_of(config, "magikarp") else None


def _check_donors(model: RecipeModel, transplant: Transplant, need: str | None) -> None:
    """Check that new tokens of a model that a donor has can be approximated; others get the mean row."""
    new = model.match.is_new()
    new[[transplant.id_of(token) for token in transplant.overrides]] = False
    if not bool(new.any()):
        return
    for posed in transplant.problems[model.alignment]:
        if len(posed.problem.target_ids):
            _check_donor(model, posed, need)


def _check_donor(model: RecipeModel, posed: DonorProblem, need: str | None) -> None:
    if need is not None and posed.donor.config is None:
        raise OmpError(
            f"tokenizer.source: {posed.donor} is a tokenizer without a model, and {need} needs "
            "embeddings of new tokens; name a model that has both, or write, under parameters: of the recipe, "
            f"approximation: {' or '.join(without_donor())}, without magikarp."
        )
    if not len(posed.problem.atom_ids):
        raise OmpError(
            f"tokenizer.source: {posed.donor} and {model} share no token, so there are no anchors to approximate new "
            "tokens with; name a donor whose vocabulary overlaps with the model's."
        )
