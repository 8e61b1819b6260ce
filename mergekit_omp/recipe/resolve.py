"""Resolve a recipe to a :class:`Transplant`, reading each model's configuration and tokenizer once."""

from collections.abc import Mapping

import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from mergekit.tokenizer.config import TokenEmbeddingConfig
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from mergekit_omp.checkpoints.architecture import hidden_size, vocabulary_size
from mergekit_omp.checkpoints.files import is_tokenizer_alone, read_config
from mergekit_omp.checkpoints.tokenizers import load_tokenizer
from mergekit_omp.collection import collection_paused
from mergekit_omp.compat import chat_template_of
from mergekit_omp.errors import OmpError
from mergekit_omp.realign.problem import pose_problem
from mergekit_omp.recipe.blocks import keys_of_models, models_in_order
from mergekit_omp.recipe.checks import check_text
from mergekit_omp.recipe.model_checks import check_configs, check_vocabularies
from mergekit_omp.recipe.output_tokenizer import union_of, union_vocabulary, with_tokens
from mergekit_omp.recipe.overrides import asks_to_approximate
from mergekit_omp.recipe.transplant import DonorProblem, RecipeModel, Transplant, tokenizer_source
from mergekit_omp.vocabulary.alignment import Alignment
from mergekit_omp.vocabulary.duplicates import without_duplicates
from mergekit_omp.vocabulary.matching import VocabularyMatch, match_vocabularies
from mergekit_omp.vocabulary.tokens import LARGEST_GAP, Vocabulary, read_vocabulary

SOURCE_KEY = "tokenizer.source"


@collection_paused()
def resolve(config: MergeConfiguration, options: MergeOptions) -> Transplant:
    """Check a recipe and resolve it, without reading weights.

    Args:
        config: the recipe, before mergekit's planner rewrites it.
        options: mergekit's options.

    Returns:
        The resolved recipe.

    Raises:
        OmpError: for the first mistake.
    """
    check_text(config)
    trust = options.trust_remote_code
    input_names, donor_names = models_in_order(config), _donors(config)
    keys = keys_of_models(config)
    keys = {name: keys.get(name, SOURCE_KEY) for name in (*input_names, *donor_names)}
    configs = _read_configs(keys, donors=set(donor_names) - set(input_names), trust_remote_code=trust)
    check_configs(config, {name: configs[name] for name in input_names}, keys)
    rows = {name: _rows(name, configs.get(name), key) for name, key in keys.items()}
    tokenizers = {name: load_tokenizer(name, trust, key) for name, key in keys.items()}
    vocabularies = {name: read_vocabulary(tokenizer) for name, tokenizer in tokenizers.items()}

    overrides = (config.tokenizer and config.tokenizer.tokens) or {}
    output = _OutputVocabulary(config, donor_names, overrides, tokenizers, vocabularies, rows)
    alignments = output.align_all(keys)
    models = {
        name: RecipeModel(
            name, key, configs.get(name), rows[name], tokenizers[name], vocabularies[name].size, alignments[name]
        )
        for name, key in keys.items()
    }
    inputs, donors = ([models[name] for name in names] for names in (input_names, donor_names))
    multiple, source = config.tokenizer.pad_to_multiple_of if config.tokenizer else None, tokenizer_source(config)
    transplant = Transplant(
        config=config,
        options=options,
        inputs=tuple(inputs),
        donors=tuple(donors),
        tokenizer=output.tokenizer,
        vocabulary=output.vocabulary,
        tokenizer_is_unchanged=output.is_unchanged,
        overrides=overrides,
        chat_template=chat_template_of(config),
        rows=output_rows(output.vocabulary, multiple, rows[source] if isinstance(source, ModelReference) else None),
        problems={model.alignment: _pose(model.alignment, donors) for model in inputs},
    )
    check_vocabularies(transplant)
    return transplant


def output_rows(vocabulary: Vocabulary, pad_to_multiple_of: int | None, donor_rows: int | None) -> int:
    """Return the number of rows of the output's embedding: the highest id plus one, and padding.

    A draft model must have the number of rows of its target model: vLLM accepts no other, and llama.cpp none that
    differs by more than 128.

    Args:
        vocabulary: the output vocabulary.
        pad_to_multiple_of: setting of the recipe, which takes precedence; None if it is not set.
        donor_rows: rows of the model that ``tokenizer.source`` names; None for ``base``, ``union`` and a tokenizer
            without a model.

    Raises:
        OmpError: if the donor has far more rows than tokens.
    """
    if pad_to_multiple_of:
        return -(-vocabulary.size // pad_to_multiple_of) * pad_to_multiple_of
    rows = max(vocabulary.size, donor_rows or 0)
    if rows > vocabulary.size + LARGEST_GAP:
        raise OmpError(
            f"{SOURCE_KEY}: vocab_size in its config.json is {rows}, but its tokenizer has {vocabulary.size} tokens; "
            "download the model again."
        )
    return rows


def _donors(config: MergeConfiguration) -> tuple[ModelReference, ...]:
    """Return the models with rows for new tokens, in order of precedence."""
    source = tokenizer_source(config)
    return (source,) if isinstance(source, ModelReference) else models_in_order(config)


def _read_configs(
    keys: Mapping[ModelReference, str], donors: set[ModelReference], trust_remote_code: bool
) -> dict[ModelReference, PretrainedConfig]:
    """Read the configuration of each model except for donors that are a tokenizer without a model."""
    return {
        name: read_config(name, trust_remote_code, key, is_donor=name in donors)
        for name, key in keys.items()
        if name not in donors or not is_tokenizer_alone(name)
    }


def _rows(name: ModelReference, config: PretrainedConfig | None, key: str) -> int | None:
    if config is None:
        return None
    rows = vocabulary_size(config)
    if rows is None:
        raise OmpError(
            f"{key}: config.json of {name} has no vocab_size, so the rows of its embedding are unknown; add it."
        )
    for what, size in (("vocab_size", rows), ("hidden_size", hidden_size(config) or 1)):
        if type(size) is not int or size < 1:
            raise OmpError(f"{key}: {what} in config.json of {name} is {size!r}; download the model again.")
    return rows


class _OutputVocabulary:
    """The output tokenizer of a recipe and its vocabulary, with which the models' vocabularies are aligned."""

    def __init__(
        self,
        config: MergeConfiguration,
        donors: tuple[ModelReference, ...],
        overrides: Mapping[str, TokenEmbeddingConfig],
        tokenizers: Mapping[ModelReference, PreTrainedTokenizerBase],
        vocabularies: Mapping[ModelReference, Vocabulary],
        rows: Mapping[ModelReference, int | None],
    ) -> None:
        self._tokenizers, self._vocabularies, self._rows = tokenizers, vocabularies, rows
        self._first_donor = donors[0]
        is_union = tokenizer_source(config) == "union"
        self.is_unchanged = not is_union and not overrides
        if self.is_unchanged:
            self.tokenizer, self.vocabulary = tokenizers[donors[0]], vocabularies[donors[0]]
        else:
            union = union_of({name: tokenizers[name] for name in donors}, rows) if is_union else tokenizers[donors[0]]
            self.tokenizer = with_tokens(union, overrides)
            origins = [vocabularies[name] for name in donors] if is_union else []
            self.vocabulary = union_vocabulary(self.tokenizer, origins)
        approximated = {token for token, override in overrides.items() if asks_to_approximate(override)}
        ids = [id_ for id_, token in self.vocabulary.tokens.items() if token.text in approximated]
        self._approximated = torch.tensor(ids, dtype=torch.int64)

    def align_all(self, models: Mapping[ModelReference, str]) -> dict[ModelReference, Alignment]:
        """Return an alignment for each model; models with equal vocabularies share one.

        The first donor has its own if the recipe approximates tokens that it has, since it keeps their rows.
        """
        shared: dict[tuple[str, bool], Alignment] = {}
        alignments = {}
        for name in models:
            size = self._rows[name]
            vocabulary = self._vocabularies[name]
            vocabulary = vocabulary if size is None else vocabulary.truncated(size)
            keeps_all = name == self._first_donor or not len(self._approximated)
            key = vocabulary.fingerprint, keeps_all
            if key not in shared:
                shared[key] = self._align(name, vocabulary, keeps_all)
            alignments[name] = shared[key]
        return alignments

    def _align(self, name: ModelReference, vocabulary: Vocabulary, keeps_all: bool) -> Alignment:
        own_match = self._match(vocabulary)
        match = own_match if keeps_all else own_match.without(self._approximated)
        return Alignment(str(name), self._tokenizers[name], vocabulary, match, own_match)

    def _match(self, vocabulary: Vocabulary) -> VocabularyMatch:
        match = match_vocabularies(self.vocabulary, vocabulary)
        return without_duplicates(match, self.vocabulary, self.tokenizer)


def _pose(base: Alignment, donors: list[RecipeModel]) -> tuple[DonorProblem, ...]:
    return tuple(
        DonorProblem(
            base,
            donor,
            tuple(donors[:count]),
            pose_problem(base.match, donor.match, [earlier.match for earlier in donors[:count]]),
        )
        for count, donor in enumerate(donors)
    )
