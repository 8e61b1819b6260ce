"""The command group ``mergekit-omp``."""

import click

from mergekit_omp import __version__
from mergekit_omp.cli.align import align
from mergekit_omp.cli.compare import compare
from mergekit_omp.cli.doctor import doctor
from mergekit_omp.cli.evaluate import eval_command
from mergekit_omp.cli.heal import heal
from mergekit_omp.cli.init import init
from mergekit_omp.cli.inspect import inspect
from mergekit_omp.cli.report import report
from mergekit_omp.cli.tokens import tokens


@click.group(
    epilog="\b\nCompletion by the tab key, in bash (zsh and fish: zsh_source, fish_source):\n"
    '  eval "$(_MERGEKIT_OMP_COMPLETE=bash_source mergekit-omp)"'
)
@click.version_option(__version__, prog_name="mergekit-omp")
def main() -> None:
    """Give a model another model's tokenizer, inside a mergekit recipe.

    The transplant itself is a merge method, so a recipe with `merge_method: omp` runs with `mergekit-yaml`. These
    commands are for before and after it. Before: `init` writes a recipe, `inspect` reports what it would do and cost,
    `compare` runs it with several approximations, and `align` writes the token map of one of them. After: `report`
    shows what a transplant did, `tokens` which new tokens matter for a text, `eval` measures how well models predict
    texts, and `heal` trains a transplanted model for some minutes. `doctor` checks the installation.
    """


for command in (
    align,
    compare,
    doctor,
    eval_command,
    heal,
    init,
    inspect,
    report,
    tokens,
):
    main.add_command(command)
