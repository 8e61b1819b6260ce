"""``mergekit-omp restore``: a transplanted model with its base's tokenizer again."""

from dataclasses import asdict

import click

from mergekit_omp.cli.options import JSON, TRUST_REMOTE_CODE, print_json, silence_transformers


@click.command(short_help="Give a transplanted model its base's tokenizer again.")
@click.argument("model", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--base", help="The model that MODEL was made from.  [default: the model that its record names]")
@TRUST_REMOTE_CODE
@JSON
def restore(model: str, out: str, base: str | None, trust_remote_code: bool, as_json: bool) -> None:
    """Give MODEL its base's tokenizer again, and write the result to the new folder OUT.

    MODEL was made with `merge_method: omp`, and may have been trained since. Tokens that both tokenizers have keep the
    rows that MODEL has now. Rows that the transplant dropped are the base's; where training changed the shared rows,
    they are moved like these. A model that was not trained gets the base's matrices bit for bit.
    """
    silence_transformers()
    from mergekit_omp.output.restore import restore as restore_model

    matrices = restore_model(model, out, base, trust_remote_code)
    if as_json:
        print_json([asdict(matrix) for matrix in matrices])
        return
    for matrix in matrices:
        source = "the base's, moved as training moved the others" if matrix.moved else "the base's"
        click.echo(f"{matrix.name}: {matrix.kept:,} rows as they are now, {matrix.dropped:,} {source}")
    click.echo(f"Written: {out}")
