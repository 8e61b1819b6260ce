"""The map that ``approximation: tokalign`` would learn for a recipe, to look at, edit and give back to it."""

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_omp.errors import OmpError
from mergekit_omp.initializers import tokalign
from mergekit_omp.parameters import Approximation, OmpParameters
from mergekit_omp.realign.rows import pose_problem
from mergekit_omp.recipe.checks import check_recipe, settings_of
from mergekit_omp.tasks.tasks import MatchVocabulary, new_tokens


def learn_token_map(config: MergeConfiguration, options: MergeOptions) -> dict[str, str]:
    """Learn a map from new tokens of a recipe's output to tokens of its model; no weights are read.

    Args:
        config: a recipe of ours with one model, and ``corpus`` in its parameters.
        options: mergekit's; ``trust_remote_code`` matters here.

    Raises:
        OmpError: for whatever would stop the recipe before it starts, several models, or no corpus.
    """
    output = check_recipe(config, options)
    if len(output.referenced_models) != 1:
        names = ", ".join(map(str, output.referenced_models))
        raise OmpError(f"models: a map is for one model, and the recipe names {names}; keep the one that it is for.")
    corpora = [corpus for corpus in settings_of(config, "corpus") if corpus is not None]
    parameters = OmpParameters(approximation=Approximation.TOKALIGN, corpus=corpora[0] if corpora else None)
    tokalign.check(parameters, "parameters")
    base = MatchVocabulary(output=output, model=output.referenced_models[0])
    donor = MatchVocabulary(output=output, model=output.donors()[0])
    return tokalign.token_map(new_tokens(base, pose_problem(base.execute(), donor.execute()), parameters))
