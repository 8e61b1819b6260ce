"""``mergekit-omp init``: write a recipe for a base and a donor, with comments on what was found about them."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import click

from mergekit_omp.cli.options import JSON, TRUST_REMOTE_CODE, print_json, silence_transformers, working
from mergekit_omp.errors import OmpError

STANDARD_OUTPUT = "-"


@click.command(short_help="Write a commented recipe for a base and a donor.")
@click.argument("base")
@click.argument("donor")
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, allow_dash=True),
    default="recipe.yml",
    show_default=True,
    help="Where to write the recipe; - prints it.",
)
@TRUST_REMOTE_CODE
@JSON
def init(base: str, donor: str, out: str, trust_remote_code: bool, as_json: bool) -> None:
    """Write a recipe that gives BASE the tokenizer of DONOR.

    Both are folders or names on the hub; DONOR may be a tokenizer without a model. Only their configs and tokenizers
    are downloaded. Keys are chosen by what these say, and comments tell it: shared tokens, tied heads, how numbers are
    split, what is likely to get worse. An existing file is never replaced.

    \b
    mergekit-omp init google/gemma-3-270m HuggingFaceTB/SmolLM2-135M
    mergekit-yaml recipe.yml out/
    """
    if out != STANDARD_OUTPUT and Path(out).exists():
        _refuse(out)
    silence_transformers()
    with working("Reading configs and tokenizers"):
        text = write_recipe(base, donor, "recipe.yml" if out == STANDARD_OUTPUT else out, trust_remote_code)
    if out != STANDARD_OUTPUT:
        _write(Path(out), text)
    if as_json:
        print_json({"path": None if out == STANDARD_OUTPUT else out, "recipe": text})
    elif out == STANDARD_OUTPUT:
        click.echo(text, nl=False)
    else:
        from mergekit_omp.report.tables import next_steps, show

        steps = [
            (["mergekit-omp", "inspect", out], "what it will do and cost"),
            (["mergekit-yaml", out, "out"], "run it; out is a new folder"),
        ]
        show(f"Recipe: {out}", "", *next_steps(steps))


def write_recipe(base: str, donor: str, path: str, trust_remote_code: bool) -> str:
    """Return the text of a recipe for a base and a donor.

    Args:
        base: a folder, or a name on the hub.
        donor: the same, of a model or of a tokenizer alone.
        path: where the recipe will be.
        trust_remote_code: whether models may run code of their own.

    Raises:
        OmpError: a model cannot be read, or does not suit the other.
    """
    from mergekit.common import ModelReference
    from mergekit.options import MergeOptions

    from mergekit_omp import register
    from mergekit_omp.checkpoints.files import is_tokenizer_alone
    from mergekit_omp.recipe.resolve import resolve
    from mergekit_omp.report.forecast import forecast
    from mergekit_omp.report.recipe_text import WITHOUT_DONOR, recipe_text, transplant_recipe, whole_path

    register()
    base, donor = whole_path(base), whole_path(donor)
    is_alone = is_tokenizer_alone(ModelReference.parse(donor))
    parameters = {"approximation": WITHOUT_DONOR.value} if is_alone else {}
    options = MergeOptions(trust_remote_code=trust_remote_code)
    transplant = resolve(transplant_recipe(base, donor, parameters), options)
    return recipe_text(transplant, forecast(transplant, measure=False), path)


def _write(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        _refuse(str(path))
    except OSError as error:
        raise OmpError(f"{path} cannot be written ({error.strerror}); name another file with --out.") from error


def _refuse(path: str) -> NoReturn:
    raise OmpError(f"{path} is there already, and nothing is replaced unasked; name another file with --out.")
