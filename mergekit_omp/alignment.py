"""The map that ``approximation: tokalign`` would learn for a recipe, to look at, edit and give back to it."""

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_omp.errors import OmpError
from mergekit_omp.initializers import tokalign
from mergekit_omp.initializers.new_tokens import NewTokens
from mergekit_omp.parameters import Approximation, OmpParameters
from mergekit_omp.realign import pose_problem
from mergekit_omp.recipe import check_recipe, settings_of
from mergekit_omp.vocabularies import match_of, output_vocabulary, shared_output_tokenizer, tokenizer_of, vocabulary_of


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
    [model], donor = output.referenced_models, output.donors()[0]
    match, trust = match_of(output, model), output.trust_remote_code
    problem = pose_problem(match, match_of(output, donor))
    return tokalign.token_map(
        NewTokens(
            problem=problem,
            anchor_rows=match.rows[problem.atom_ids],
            output=output_vocabulary(output),
            output_tokenizer=shared_output_tokenizer(output),
            model=vocabulary_of(model, trust),
            tokenizer=tokenizer_of(model, trust),
            parameters=parameters,
            trust_remote_code=trust,
        )
    )
