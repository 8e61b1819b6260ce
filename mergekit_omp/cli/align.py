"""The map that ``approximation: tokalign`` would learn for a recipe, to look at, edit and give back to it."""

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_omp.errors import OmpError
from mergekit_omp.initializers import tokalign
from mergekit_omp.initializers.base import NewTokens
from mergekit_omp.parameters import Approximation, OmpParameters
from mergekit_omp.recipe.blocks import settings_of
from mergekit_omp.recipe.resolve import resolve


def learn_token_map(config: MergeConfiguration, options: MergeOptions) -> dict[str, str]:
    """Learn a map from new tokens of a recipe's output to tokens of its model; no weights are read.

    Args:
        config: a recipe of ours with one model, and ``corpus`` in its parameters.
        options: mergekit's; ``trust_remote_code`` matters here.

    Raises:
        OmpError: for whatever would stop the recipe before it starts, several models, or no corpus.
    """
    transplant = resolve(config, options)
    if len(transplant.inputs) != 1:
        names = ", ".join(map(str, transplant.inputs))
        raise OmpError(f"models: a map is for one model, and the recipe names {names}; keep the one that it is for.")
    corpora = [corpus for corpus in settings_of(config, "corpus") if corpus is not None]
    parameters = OmpParameters(approximation=Approximation.TOKALIGN, corpus=corpora[0] if corpora else None)
    tokalign.check(parameters, "parameters")
    base = transplant.base.alignment
    problem = transplant.problems[base][0].problem
    return tokalign.token_map(NewTokens.of(base, problem, transplant.vocabulary, transplant.tokenizer, parameters))
