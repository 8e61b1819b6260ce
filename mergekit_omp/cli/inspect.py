"""``mergekit-omp inspect``: what a recipe would do and cost."""

import click

from mergekit_omp.cli.options import (
    DEVICE,
    JSON,
    TRUST_REMOTE_CODE,
    check_device,
    load_recipe,
    print_json,
    silence_transformers,
    working,
)


@click.command(short_help="Report what a recipe would do and cost, before it runs.")
@click.argument("what", nargs=-1, required=True, metavar="RECIPE | BASE DONOR")
@click.option("-k", default=None, type=click.IntRange(min=1), help="With BASE DONOR: the sparsity.  [default: 64]")
@click.option("--time/--no-time", "measure", default=True, help="Estimate how long the solves take (the default).")
@DEVICE
@TRUST_REMOTE_CODE
@JSON
def inspect(
    what: tuple[str, ...], k: int | None, measure: bool, device: str, trust_remote_code: bool, as_json: bool
) -> None:
    """Report what a recipe would do, without running it.

    Name a recipe's file, or a base model and a donor of its new tokenizer. Nothing is written, and only tokenizers and
    configs of models on the hub are downloaded. The report says which tokens keep their rows, which are new, how
    special tokens pair, what is likely to get worse, and how much time, memory and disk a run takes.

    \b
    mergekit-omp inspect recipe.yml
    mergekit-omp inspect google/gemma-3-270m HuggingFaceTB/SmolLM2-135M
    """
    silence_transformers()
    from mergekit.options import MergeOptions

    from mergekit_omp import register
    from mergekit_omp.recipe.resolve import resolve
    from mergekit_omp.report.forecast import forecast
    from mergekit_omp.report.forecast_text import describe_forecast
    from mergekit_omp.report.recipe_text import transplant_recipe
    from mergekit_omp.report.tables import show

    if len(what) == 2:
        register()
        config = transplant_recipe(*what, {} if k is None else {"k": k})
    elif len(what) == 1 and k is None:
        config = load_recipe(what[0])
    else:
        raise click.UsageError("Name one recipe, whose own k counts, or a base model and a donor.")
    check_device(device)
    options = MergeOptions(device=device, trust_remote_code=trust_remote_code)
    with working("Reading configs and tokenizers"):
        transplant = resolve(config, options)
    with working("Measuring this machine" if measure else "Comparing vocabularies"):
        found = forecast(transplant, measure=measure)
    if as_json:
        print_json(found)
    else:
        show(*describe_forecast(found))
