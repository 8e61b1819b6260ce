"""``mergekit-omp align``: the map that ``approximation: tokalign`` would learn for a recipe, to look at and edit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_omp.cli.options import (
    JSON,
    TRUST_REMOTE_CODE,
    load_recipe,
    print_json,
    silence_transformers,
    working,
)

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions


@click.command(short_help="Write the token map that approximation: tokalign learns.")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False))
@click.argument("out", type=click.Path(dir_okay=False))
@TRUST_REMOTE_CODE
@JSON
def align(recipe: str, out: str, trust_remote_code: bool, as_json: bool) -> None:
    """Learn which token of the model each new token of RECIPE is used like, and write the map to OUT.

    The text to learn from is corpus: in the recipe's parameters. OUT is JSON, one token a line, and can be edited;
    with token_map: OUT in place of corpus: the recipe uses it. No weights are read.
    """
    silence_transformers()
    from mergekit.options import MergeOptions

    from mergekit_omp.errors import OmpError
    from mergekit_omp.initializers.tokalign import write_token_map

    mapping = learn_token_map(load_recipe(recipe), MergeOptions(trust_remote_code=trust_remote_code))
    try:
        write_token_map(Path(out), mapping)
    except OSError as error:
        raise OmpError(f"{out} cannot be written ({error.strerror}); name another file.") from error
    if as_json:
        print_json({"path": out, "tokens": len(mapping)})
        return
    from mergekit_omp.report.tables import next_steps, show

    show(
        f"{len(mapping):,} tokens mapped: {out}",
        "",
        f"To use it, write token_map: {out} in place of corpus: in {recipe}.",
        "",
        *next_steps([(["mergekit-yaml", recipe, "out"], "run the recipe; out is a new folder")]),
    )


def learn_token_map(config: MergeConfiguration, options: MergeOptions) -> dict[str, str]:
    """Learn a map from new tokens of a recipe's output to tokens of its model; no weights are read.

    Args:
        config: a recipe of ours with one model, and ``corpus`` in its parameters.
        options: mergekit's; ``trust_remote_code`` matters here.

    Raises:
        OmpError: for whatever would stop the recipe before it starts, several models, or no corpus.
    """
    from mergekit_omp.errors import OmpError
    from mergekit_omp.initializers import tokalign
    from mergekit_omp.initializers.base import NewTokens
    from mergekit_omp.parameters import Approximation, OmpParameters
    from mergekit_omp.recipe.blocks import settings_of
    from mergekit_omp.recipe.resolve import resolve

    with working("Reading configs and tokenizers"):
        transplant = resolve(config, options)
    if len(transplant.inputs) != 1:
        names = ", ".join(map(str, transplant.inputs))
        raise OmpError(f"models: a map is for one model, and the recipe names {names}; keep the one that it is for.")
    corpora = [corpus for corpus in settings_of(config, "corpus") if corpus is not None]
    parameters = OmpParameters(approximation=Approximation.TOKALIGN, corpus=corpora[0] if corpora else None)
    tokalign.check_tokalign(parameters, "parameters")
    base = transplant.base.alignment
    problem = transplant.problems[base][0].problem
    return tokalign.token_map(NewTokens(base, problem, transplant.vocabulary, transplant.tokenizer, parameters))
