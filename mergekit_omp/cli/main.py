"""The command group ``mergekit-omp``."""

import click

from mergekit_omp import __version__
from mergekit_omp.cli.align import align
from mergekit_omp.cli.audit import audit
from mergekit_omp.cli.compare import compare
from mergekit_omp.cli.doctor import doctor
from mergekit_omp.cli.evaluate import eval_command
from mergekit_omp.cli.heal import heal
from mergekit_omp.cli.init import init
from mergekit_omp.cli.inspect import inspect
from mergekit_omp.cli.report import report
from mergekit_omp.cli.restore import restore
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
    texts, `audit` checks what the donor put into the model, `heal` trains it for some minutes, and `restore` goes back
    to the base's tokenizer. `doctor` checks the installation.
    """


for command in (
    align,
    audit,
    compare,
    doctor,
    eval_command,
    heal,
    init,
    inspect,
    report,
    restore,
    tokens,
):
    main.add_command(command)
