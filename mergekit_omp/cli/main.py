"""The command group ``mergekit-omp``."""

import click

from mergekit_omp import __version__
from mergekit_omp.cli.align import align
from mergekit_omp.cli.audit import audit
from mergekit_omp.cli.compare import compare
from mergekit_omp.cli.doctor import doctor
from mergekit_omp.cli.evaluate import eval_command
from mergekit_omp.cli.inspect import inspect
from mergekit_omp.cli.report import report
from mergekit_omp.cli.restore import restore
from mergekit_omp.cli.tokens import tokens


@click.group()
@click.version_option(__version__, prog_name="mergekit-omp")
def main() -> None:
    """Give a model another model's tokenizer, inside a mergekit recipe.

    The transplant itself is a merge method, so a recipe with `merge_method: omp` runs with `mergekit-yaml`. These
    commands are for before and after it. Before: `inspect` reports what a recipe would do and cost, `compare` runs it
    with several approximations, and `align` writes the token map of one of them. After: `report` shows what a
    transplant did, `tokens` which new tokens matter for a text, `eval` measures how well models predict texts,
    and `audit` checks what the donor put into the model; `restore` goes back to the base's tokenizer. `doctor` checks
    the installation.
    """


for command in (align, audit, compare, doctor, eval_command, inspect, report, restore, tokens):
    main.add_command(command)
