"""Check a recipe before anything is loaded, planned or written: every mistake gets a sentence."""

import importlib.resources
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
from mergekit import merge_methods
from mergekit._data import chat_templates
from mergekit.architecture import arch_info_for_config
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import ConditionalParameter, MergeConfiguration, OutputSliceDefinition, ParameterSetting
from mergekit.options import MergeOptions
from mergekit.tokenizer.config import ModelTokenEmbedding
from pydantic import TypeAdapter, ValidationError
from transformers import PretrainedConfig

from mergekit_omp.checkpoints.architecture import has_second_embedding, hidden_size, vocabulary_size
from mergekit_omp.checkpoints.files import check_weights, is_tokenizer_alone, read_config, weight_file
from mergekit_omp.checkpoints.tokenizers import OutputTokenizer, match_of, output_vocabulary, tokenizer_of
from mergekit_omp.errors import OmpError
from mergekit_omp.initializers.registry import needs_donor, without_donor
from mergekit_omp.names import PREFIX, TRANSPLANT, is_ours
from mergekit_omp.parameters import Approximation, OmpParameters
from mergekit_omp.plugin.merge_methods import RealignedMerge
from mergekit_omp.realign.rows import lacking, pose_problem
from mergekit_omp.recipe.keys import did_you_mean
from mergekit_omp.recipe.overrides import asks_to_approximate, source_rows
from mergekit_omp.tasks.plan import blocks_of, output_tokenizer

Settings = Mapping[str, ParameterSetting]

LARGEST_PADDING = 2**16
"""Hardware asks for multiples of some hundreds at most; beyond this it is a slip of the hand."""

REMOVED_PARAMETERS = {
    "scan_every": "every solve is exact now, and about as fast; leave it out",
}
"""Parameters of earlier versions, and why a recipe does not need them any more."""

_GENERATION_TAG = re.compile(r"{%-?\s*(end)?generation\s*-?%}")  # transformers' own, unknown to Jinja


def check_recipe(config: MergeConfiguration, options: MergeOptions) -> OutputTokenizer:
    """Raise an :class:`OmpError` for the first mistake in a recipe of ours; return its output tokenizer.

    What mergekit itself checks clearly (the number of inputs of a method, equal architectures) is left to it.
    """
    _check_method(config)
    _check_tokenizer_section(config)
    _check_parameters(config)
    _check_dtypes(config)
    _check_chat_template(config)
    _check_duplicates(config)
    output = output_tokenizer(config, options)
    configs = _read_configs(config, output)
    _check_embeddings(output, configs, places_of_models(config))
    _check_transplant_inputs(config, output)
    _check_layer_ranges(config, configs)
    _check_hidden_sizes(output, configs)
    _check_vocabularies(output, config, options)
    return output


def check_inputs(config: MergeConfiguration, output: OutputTokenizer, options: MergeOptions) -> None:
    """Raise an :class:`OmpError` for the first model of a checked recipe whose weights cannot be read."""
    places = places_of_models(config)
    for model in output.referenced_models:
        check_weights(model, options, places[model])
        _check_depth(model, options, places[model])
    if not any(bool(lacking(match_of(output, model)).any()) for model in output.referenced_models):
        return
    for donor in output.donors():
        # Of a donor on the hub only some shards are downloaded; planning tells of one that has no weights at all.
        if donor not in places and weight_file(Path(donor.model.path)) is not None:
            check_weights(donor, options, "tokenizer.source")


def _check_depth(model: ModelReference, options: MergeOptions, place: str) -> None:
    """A promise of a billion layers is refused here, since planning one would use up the memory."""
    layers = _layers(model.config(trust_remote_code=options.trust_remote_code))
    tensors = 0 if model.lora else len(model.tensor_index(options.transformers_cache).tensor_paths)
    if tensors and layers and layers > tensors:
        raise OmpError(
            f"{place}: config.json of {model} promises {layers} layers, but its checkpoint has {tensors} tensors in "
            "all; download the model again."
        )


def places_of_models(config: MergeConfiguration) -> dict[ModelReference, str]:
    """Where a recipe first names each of its inputs."""
    places: dict[ModelReference, str] = {}
    for path, block in blocks_of(config):
        for i, listed in enumerate(block.models or ()):
            places.setdefault(listed.model, f"{path}models[{i}].model")
        for i, part in enumerate(block.slices or ()):
            for j, source in enumerate(part.sources):
                places.setdefault(source.model, f"{path}slices[{i}].sources[{j}].model")
    if config.base_model:
        places.setdefault(config.base_model, "base_model")
    return places


def _check_method(config: MergeConfiguration) -> None:
    methods = {m.spec.name: m for m in merge_methods.registered_methods()}
    known = [name for name in methods if is_ours(name)]
    if config.merge_method not in known:
        inner = methods.get(config.merge_method.removeprefix(PREFIX))
        if inner is not None:
            RealignedMerge(config.merge_method, inner)  # says why it was not registered
        raise OmpError(
            f"merge_method: {config.merge_method} is unknown{did_you_mean(config.merge_method, known)}; "
            f"mergekit-omp has {', '.join(sorted(known))}."
        )


def _check_tokenizer_section(config: MergeConfiguration) -> None:
    if config.tokenizer is None and config.tokenizer_source is None:
        raise OmpError(
            f"tokenizer: is missing; merge_method: {config.merge_method} needs to know the output's tokenizer, "
            "so add for example `tokenizer: {source: <the donor model>}`."
        )
    multiple = config.tokenizer and config.tokenizer.pad_to_multiple_of
    if multiple is not None and multiple < 1:
        raise OmpError(f"tokenizer.pad_to_multiple_of: {multiple} is not a positive integer; write one such as 64.")
    if multiple is not None and multiple > LARGEST_PADDING:
        raise OmpError(
            f"tokenizer.pad_to_multiple_of: {multiple} is more than {LARGEST_PADDING}; write a multiple such as 64."
        )


def _check_parameters(config: MergeConfiguration) -> None:
    known = [p.name for p in merge_methods.get(config.merge_method).spec.parameters]
    for place, settings in _parameter_scopes(config):
        for name, setting in settings.items():
            if name in REMOVED_PARAMETERS and name not in known:
                raise OmpError(f"{place}.{name} was removed: {REMOVED_PARAMETERS[name]}.")
            if name not in known:
                raise OmpError(
                    f"{place}.{name} is not a parameter of {config.merge_method}{did_you_mean(name, known)}; "
                    f"it has {', '.join(known)}."
                )
            if name in OmpParameters.model_fields:
                for value in _leaves(f"{place}.{name}", setting):
                    _check_value(f"{place}.{name}", name, value)


def _parameter_scopes(config: MergeConfiguration) -> Iterator[tuple[str, Settings]]:
    """Every ``parameters:`` of a recipe, with the path to it."""
    for path, block in blocks_of(config):
        yield f"{path}parameters", block.parameters or {}
        for i, model in enumerate(block.models or ()):
            yield f"{path}models[{i}].parameters", model.parameters or {}
        for i, part in enumerate(block.slices or ()):
            yield f"{path}slices[{i}].parameters", part.parameters or {}
            for j, source in enumerate(part.sources):
                yield f"{path}slices[{i}].sources[{j}].parameters", source.parameters or {}


def _leaves(place: str, setting: ParameterSetting) -> Iterator[Any]:
    """The values that a setting can take: its own, or one for each of its filters."""
    if isinstance(setting, ConditionalParameter):
        yield from _leaves(place, setting.value)
    elif isinstance(setting, list):
        if not setting:
            raise OmpError(f"{place}: the list is empty; write one value, or a list of filters.")
        if not all(isinstance(each, ConditionalParameter) for each in setting):
            raise OmpError(
                f"{place}: {setting} is a gradient over layers, but vocabulary tensors belong to no layer; "
                "write one value, or a list of filters."
            )
        for each in setting:
            yield from _leaves(place, each)
    else:
        yield setting


def _check_value(place: str, name: str, value: Any) -> None:
    field = OmpParameters.model_fields[name]
    try:
        TypeAdapter(OmpParameters.__annotations__[name]).validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Input ")
        raise OmpError(
            f"{place}: {value!r} is not possible, it {problem}; the default is {field.default}. ({field.description})"
        ) from error


def _check_dtypes(config: MergeConfiguration) -> None:
    for key in ("dtype", "out_dtype"):
        name = getattr(config, key)
        try:
            dtype = dtype_from_name(name)
        except RuntimeError as error:
            raise OmpError(
                f"{key}: {name} is no type that mergekit knows; write bfloat16, float16 or float32."
            ) from error
        if dtype is not None and not dtype.is_floating_point:
            raise OmpError(f"{key}: {name} has no fractions; write bfloat16, float16 or float32.")


def _check_chat_template(config: MergeConfiguration) -> None:
    """mergekit looks at the template when everything else is done."""
    template = config.chat_template
    if not template or template == "auto":
        return
    if "{" not in template:
        known = sorted(
            path.name.removesuffix(".jinja")
            for path in importlib.resources.files(chat_templates).iterdir()
            if path.name.endswith(".jinja")
        )
        if template not in known:
            raise OmpError(
                f"chat_template: {template!r} is no template{did_you_mean(template, known)}; "
                f"write auto, {', '.join(known)}, or a Jinja template."
            )
        return
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION_TAG.sub("", template))
    except jinja2.TemplateSyntaxError as error:
        reason = error.message.rstrip(".")
        raise OmpError(f"chat_template: line {error.lineno} of the template is no Jinja: {reason}.") from error
    if len(template) < 20:
        raise OmpError(f"chat_template: {template!r} is too short for mergekit, which wants 20 characters or more.")


def _check_duplicates(config: MergeConfiguration) -> None:
    for path, block in blocks_of(config):
        lists = [(f"{path}models", block.models or ())]
        for i, part in enumerate(block.slices or ()):
            if not part.sources:
                raise OmpError(f"{path}slices[{i}].sources: the list is empty; name the models of this slice.")
            lists.append((f"{path}slices[{i}].sources", part.sources))
        for place, listed in lists:
            seen: dict[ModelReference, int] = {}
            for i, each in enumerate(listed):
                first = seen.setdefault(each.model, i)
                if first != i:
                    raise OmpError(
                        f"{place}[{i}].model: {each.model} is listed already, as {place}[{first}]; remove one of them."
                    )


def _read_configs(config: MergeConfiguration, output: OutputTokenizer) -> dict[ModelReference, PretrainedConfig]:
    places = places_of_models(config)
    others = [donor for donor in output.donors() if donor not in places]
    donors = [(donor, "tokenizer.source") for donor in others if not is_tokenizer_alone(donor)]
    configs = {}
    for model, place in itertools.chain(places.items(), donors):
        configs[model] = read_config(model, output.trust_remote_code, place)
        size = vocabulary_size(model, output.trust_remote_code)
        if size < 1:
            raise OmpError(f"{place}: vocab_size in config.json of {model} is {size}; download the model again.")
    return configs


def _check_embeddings(
    output: OutputTokenizer, configs: Mapping[ModelReference, PretrainedConfig], places: Mapping[ModelReference, str]
) -> None:
    for model in output.referenced_models:
        if has_second_embedding(configs[model]):
            raise OmpError(
                f"{places[model]}: {model} is a {configs[model].architectures[0]}, which looks up tokens in every "
                "layer too, and mergekit does not say where those rows are; name a model with one embedding."
            )


def _check_layer_ranges(config: MergeConfiguration, configs: Mapping[ModelReference, PretrainedConfig]) -> None:
    for path, block in blocks_of(config):
        for i, part in enumerate(block.slices or ()):
            _check_slice(f"{path}slices[{i}]", part, configs, has_modules=bool(config.modules))


def _check_slice(
    place: str, part: OutputSliceDefinition, configs: Mapping[ModelReference, PretrainedConfig], *, has_modules: bool
) -> None:
    for j, source in enumerate(part.sources):
        start, end = source.layer_range
        layers = None if has_modules else _layers(configs[source.model])
        if not 0 <= start < end or (layers is not None and end > layers):
            has = "" if layers is None else f" ({source.model} has {layers} layers)"
            raise OmpError(
                f"{place}.sources[{j}].layer_range: [{start}, {end}] is no range of layers{has}; "
                f"write the first layer and the one after the last, such as [0, {layers or 12}]."
            )


def _layers(config: PretrainedConfig) -> int | None:
    info = arch_info_for_config(config)
    if info is None or len(info.modules) != 1:
        return None
    [module] = info.modules.values()
    return getattr(config, module.architecture.num_layers_config_key() or "", None)


def _check_transplant_inputs(config: MergeConfiguration, output: OutputTokenizer) -> None:
    if config.merge_method == TRANSPLANT and config.models and len(output.referenced_models) != 1:
        names = ", ".join(map(str, output.referenced_models))
        raise OmpError(
            f"merge_method: omp transplants one model, but the recipe names {len(output.referenced_models)} "
            f"({names}); keep the one whose body is wanted (the donor is named by tokenizer.source alone), "
            "or merge with omp_<method>."
        )


def _check_hidden_sizes(output: OutputTokenizer, configs: Mapping[ModelReference, PretrainedConfig]) -> None:
    sizes = {model: hidden_size(configs[model]) for model in output.referenced_models}
    (first, expected), *others = sizes.items()
    for model, size in others:
        if None not in (size, expected) and size != expected:
            raise OmpError(
                f"models: {model} has hidden size {size} and {first} has {expected}, and no merge can mend that; "
                f"to give one of them the other's tokenizer, use merge_method: omp with that one as tokenizer.source."
            )


def _check_vocabularies(output: OutputTokenizer, config: MergeConfiguration, options: MergeOptions) -> None:
    trust = output.trust_remote_code
    places = places_of_models(config)
    for model in output.referenced_models:
        tokenizer_of(model, trust, places[model])
    for donor in output.donors():
        tokenizer_of(donor, trust, "tokenizer.source")
    _check_overrides(output, config, options)
    overridden = [_id_of(token, output) for token in output.add_tokens or ()]
    in_need = parameters_in_need_of_a_donor(config)
    for model in output.referenced_models:
        _check_donors(model, output, overridden, in_need)


def _check_overrides(output: OutputTokenizer, config: MergeConfiguration, options: MergeOptions) -> None:
    tokens = (config.tokenizer and config.tokenizer.tokens) or {}
    for token, embedding in tokens.items():
        if not token:
            raise OmpError("tokenizer.tokens: '' is no token; name one that has characters.")
        source = embedding.source
        model = source.model if isinstance(source, ModelTokenEmbedding) else source
        if asks_to_approximate(embedding):
            _check_approximated(token, output)
        if not isinstance(model, ModelReference):
            continue
        place = f"tokenizer.tokens[{token!r}].source"
        if model not in output.referenced_models:
            inputs = ", ".join(map(str, output.referenced_models))
            raise OmpError(f"{place}: {model} is not an input of the merge; its rows can come from {inputs}.")
        _, rows = source_rows(_id_of(token, output), embedding, output)
        if not rows or not all(0 <= row < vocabulary_size(model, options.trust_remote_code) for row in rows):
            named = (getattr(source, "token", None), getattr(source, "token_id", None), token)
            what = next(each for each in named if each is not None)
            raise OmpError(f"{place}: {model} has no token {what!r}; name one that it has.")


def _check_approximated(token: str, output: OutputTokenizer) -> None:
    donor = output.donors()[0]
    if match_of(output, donor).rows[_id_of(token, output)] < 0:
        raise OmpError(
            f"tokenizer.tokens[{token!r}]: force without a source asks to approximate the token, but {donor} has no "
            "row to approximate; name a source, such as {kind: zero}."
        )


def settings_of(config: MergeConfiguration, name: str) -> list[Any]:
    """Every value that a recipe gives to a parameter of ours, and the default where something is without one."""
    scopes = list(_parameter_scopes(config))
    values = [value for place, scope in scopes if name in scope for value in _leaves(f"{place}.{name}", scope[name])]
    if name in (config.parameters or {}):
        return values
    listed = [scope for place, scope in scopes if re.fullmatch(r"(modules\..*)?models\[\d+\]\.parameters", place)]
    if listed and not config.slices and all(name in scope for scope in listed):
        return values
    return [*values, OmpParameters.model_fields[name].default]


def parameters_in_need_of_a_donor(config: MergeConfiguration) -> str | None:
    """The first setting of a recipe that wants rows of the tokenizer's model; None where its tokenizer is enough."""
    for value in settings_of(config, "approximation"):
        approximation = Approximation(value)
        if needs_donor(OmpParameters(approximation=approximation)):
            return f"approximation: {approximation.value}"
    return "magikarp: true" if True in settings_of(config, "magikarp") else None


def _check_donors(
    model: ModelReference, output: OutputTokenizer, overridden: Iterable[int], in_need: str | None
) -> None:
    """Whatever the model lacks must be solvable: some donor has it, and shares an anchor with the model."""
    base = match_of(output, model)
    missing = lacking(base)
    missing[list(overridden)] = False
    if not bool(missing.any()):
        return
    earlier = []
    found = False
    for donor in output.donors():
        match = match_of(output, donor)
        problem = pose_problem(base, match, earlier)
        earlier.append(match)
        if not len(problem.target_ids):
            continue
        found = True
        if in_need is not None and is_tokenizer_alone(donor):
            raise OmpError(
                f"tokenizer.source: {donor} is a tokenizer without a model, and {in_need} needs "
                "the embeddings of the tokens that are new; name a model that has both, or write approximation: "
                f"{' or '.join(without_donor())}, without magikarp."
            )
        if not len(problem.atom_ids):
            raise OmpError(
                f"tokenizer.source: {donor} and {model} share no token, so there are no anchors to express new tokens "
                "with; name a donor whose vocabulary overlaps with the model's."
            )
    if not found:
        examples = [output_vocabulary(output).tokens[i].text for i in missing.nonzero().squeeze(1)[:3].tolist()]
        raise OmpError(
            f"tokenizer.source: {output.tokenizer_source} has no embedding row for any of the {int(missing.sum())} "
            f"tokens that {model} lacks (such as {', '.join(map(repr, examples))}); name a donor whose model has them."
        )


def _id_of(token: str, output: OutputTokenizer) -> int:
    return next(id_ for id_, each in output_vocabulary(output).tokens.items() if each.text == token)
