"""Check a recipe before anything is loaded, planned or written: every mistake gets a sentence."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, MergeConfiguration, ParameterSetting
from mergekit.options import MergeOptions
from mergekit.tokenizer.config import ModelTokenEmbedding
from pydantic import TypeAdapter, ValidationError

from mergekit_omp.architecture import hidden_size, vocabulary_size
from mergekit_omp.errors import OmpError
from mergekit_omp.methods import PREFIX, TRANSPLANT, RealignedMerge, is_ours
from mergekit_omp.parameters import OmpParameters
from mergekit_omp.planning import output_tokenizer
from mergekit_omp.realign import lacking, pose_problem
from mergekit_omp.tasks import override_source
from mergekit_omp.vocabularies import OutputTokenizer, match_of, output_vocabulary, tokenizer_of

Settings = Mapping[str, ParameterSetting]


def check_recipe(config: MergeConfiguration, options: MergeOptions) -> OutputTokenizer:
    """Raise an :class:`OmpError` for the first mistake in a recipe of ours; return its output tokenizer.

    What mergekit itself checks clearly (the number of inputs of a method, equal architectures) is left to it.
    """
    _check_method(config)
    _check_tokenizer_section(config)
    _check_parameters(config)
    output = output_tokenizer(config, options)
    _check_transplant_inputs(config, output)
    _check_hidden_sizes(output)
    _check_vocabularies(output, config, options)
    return output


def _check_method(config: MergeConfiguration) -> None:
    methods = {m.spec.name: m for m in merge_methods.registered_methods()}
    known = [name for name in methods if is_ours(name)]
    if config.merge_method not in known:
        inner = methods.get(config.merge_method.removeprefix(PREFIX))
        if inner is not None:
            RealignedMerge(config.merge_method, inner)  # says why it was not registered
        raise OmpError(
            f"merge_method: {config.merge_method} is unknown{_did_you_mean(config.merge_method, known)}; "
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


def _check_parameters(config: MergeConfiguration) -> None:
    known = [p.name for p in merge_methods.get(config.merge_method).spec.parameters]
    for place, settings in _parameter_scopes(config):
        for name, setting in settings.items():
            if name not in known:
                raise OmpError(
                    f"{place}.{name} is not a parameter of {config.merge_method}{_did_you_mean(name, known)}; "
                    f"it has {', '.join(known)}."
                )
            if name in OmpParameters.model_fields:
                for value in _leaves(f"{place}.{name}", setting):
                    _check_value(f"{place}.{name}", name, value)


def _parameter_scopes(config: MergeConfiguration) -> Iterator[tuple[str, Settings]]:
    """Every ``parameters:`` of a recipe, with the path to it."""
    blocks = [("", config), *((f"modules.{name}.", module) for name, module in (config.modules or {}).items())]
    for path, block in blocks:
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


def _check_transplant_inputs(config: MergeConfiguration, output: OutputTokenizer) -> None:
    if config.merge_method == TRANSPLANT and config.models and len(output.referenced_models) != 1:
        names = ", ".join(map(str, output.referenced_models))
        raise OmpError(
            f"merge_method: omp transplants one model, but the recipe names {len(output.referenced_models)} "
            f"({names}); keep the one whose body is wanted (the donor is named by tokenizer.source alone), "
            "or merge with omp_<method>."
        )


def _check_hidden_sizes(output: OutputTokenizer) -> None:
    sizes = {m: hidden_size(m.config(trust_remote_code=output.trust_remote_code)) for m in output.referenced_models}
    (first, expected), *others = sizes.items()
    for model, size in others:
        if None not in (size, expected) and size != expected:
            raise OmpError(
                f"models: {model} has hidden size {size} and {first} has {expected}, and no merge can mend that; "
                f"to give one of them the other's tokenizer, use merge_method: omp with that one as tokenizer.source."
            )


def _check_vocabularies(output: OutputTokenizer, config: MergeConfiguration, options: MergeOptions) -> None:
    trust = output.trust_remote_code
    for index, model in enumerate(output.referenced_models):
        tokenizer_of(model, trust, f"models[{index}]")
    for donor in output.donors():
        tokenizer_of(donor, trust, "tokenizer.source")
    _check_overrides(output, config, options)
    overridden = [_id_of(token, output) for token in output.add_tokens or ()]
    for model in output.referenced_models:
        _check_donors(model, output, overridden)


def _check_overrides(output: OutputTokenizer, config: MergeConfiguration, options: MergeOptions) -> None:
    tokens = (config.tokenizer and config.tokenizer.tokens) or {}
    for token, embedding in tokens.items():
        source = embedding.source
        model = source.model if isinstance(source, ModelTokenEmbedding) else source
        if not isinstance(model, ModelReference):
            continue
        place = f"tokenizer.tokens[{token!r}].source"
        if model not in output.referenced_models:
            inputs = ", ".join(map(str, output.referenced_models))
            raise OmpError(f"{place}: {model} is not an input of the merge; its rows can come from {inputs}.")
        _, row = override_source(_id_of(token, output), embedding, output)
        if not 0 <= row < vocabulary_size(model, options):
            what = getattr(source, "token", None) or getattr(source, "token_id", None) or token
            raise OmpError(f"{place}: {model} has no token {what!r}; name one that it has.")


def _check_donors(model: ModelReference, output: OutputTokenizer, overridden: Iterable[int]) -> None:
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


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
