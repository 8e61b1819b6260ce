"""``mergekit-omp compare``: one recipe with several approximations, side by side."""

from pathlib import Path

import click

from mergekit_omp.cli.options import (
    DEVICE,
    JSON,
    TEXTS,
    TRUST_REMOTE_CODE,
    check_device,
    load_recipe,
    print_json,
    read_recipe,
    read_texts,
    silence_transformers,
)


@click.command(short_help="Run a recipe with several approximations, side by side.")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--approximations",
    default="omp,subword,mean,zero",
    show_default=True,
    help="Their names, separated by commas, as in a recipe's approximation:.",
)
@TEXTS
@click.option(
    "--bytes", "size", type=click.IntRange(min=4), help="How much of each text to read.  [default: all of it]"
)
@click.option("--plot", type=click.Path(dir_okay=False), help="Also draw the table, as this .png, .svg or .pdf file.")
@DEVICE
@TRUST_REMOTE_CODE
@JSON
def compare(
    recipe: str,
    approximations: str,
    texts: tuple[str, ...],
    size: int | None,
    plot: str | None,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Run RECIPE once with each of several approximations, and compare the models.

    The table, in Markdown, has bits per byte of the original model and of each output (lower is better), and the
    seconds and memory of each merge. The models are deleted. Other parameters that an approximation needs, such as
    corpus:, are those of the recipe.

    \b
    mergekit-omp compare recipe.yml --approximations omp,subword,landmark_pca
    """
    silence_transformers()
    from mergekit_omp.evaluation.bits_per_byte import windows
    from mergekit_omp.recipe.blocks import models_in_order
    from mergekit_omp.report import comparison
    from mergekit_omp.report.tables import show

    chosen = comparison.parse_approximations(approximations)
    if plot:
        comparison.require_plot(Path(plot))
    config = load_recipe(recipe)
    check_device(device)
    rows = comparison.compare_approximations(
        read_recipe(recipe),
        str(models_in_order(config)[0]),
        chosen,
        {name: windows(text, size)[0] if size and text else text for name, text in read_texts(texts).items()},
        options=["--device", device, *(["--trust-remote-code"] if trust_remote_code else [])],
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_json([row.as_dict() for row in rows])
    else:
        show(*comparison.describe_comparison(rows))
    if plot:
        comparison.draw(rows, Path(plot))
    if all(row.problem for row in rows[1:]):
        raise SystemExit(1)
