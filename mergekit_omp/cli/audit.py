"""``mergekit-omp audit``: what a donor put into a model, and whether a folder still is what its record says."""

from pathlib import Path

import click

from mergekit_omp.cli.options import (
    DEVICE,
    JSON,
    TEXTS,
    TRUST_REMOTE_CODE,
    check_device,
    print_json,
    read_texts,
    silence_transformers,
)


@click.command(short_help="Check what a donor put into a model.")
@click.argument("model", type=click.Path())
@click.option("--base", help="The model that MODEL was made from.  [default: the model that its record names]")
@TEXTS
@DEVICE
@TRUST_REMOTE_CODE
@click.option("--verify", is_flag=True, help="Compare the folder with the checksums in its record; runs no model.")
@JSON
def audit(
    model: str,
    base: str | None,
    texts: tuple[str, ...],
    device: str,
    trust_remote_code: bool,
    verify: bool,
    as_json: bool,
) -> None:
    """Check what a donor put into MODEL, a model made with `merge_method: omp`.

    A donor's row can be made to mean nothing in the donor, and something else in the base. It cannot make a token
    likelier than its bytes allow without being found: the base gives a text that begins with some bytes no more than
    the probability of all of its tokens that agree with them. The base reads texts, MODEL's head reads the base's last
    states, and rows whose tokens are far above that bound are listed, worst first. So are new rows with a higher logit
    on the mean state than any row of the base, and rows of the head or the input embedding that are far from what the
    rows of their tokens' pieces predict. Of the tokenizer, tokens are listed that it makes of no text, and added
    tokens that hold chat control strings.

    With --verify, the folder is compared with the checksums in its record, and the exit status is 1 where it differs.

    \b
    mergekit-omp audit ./transplanted
    mergekit-omp audit ./transplanted --verify
    """
    from mergekit_omp.report.record import read_record

    if verify:
        verify_folder(model, as_json)
        return
    silence_transformers()
    from mergekit_omp.audit.audit import audit_model
    from mergekit_omp.audit.summary import audit_summary
    from mergekit_omp.report.record import base_of
    from mergekit_omp.report.tables import show

    check_device(device)
    result = audit_model(
        model,
        base or base_of(read_record(model, of_merge=False)),
        [*read_texts(texts).values(), *(() if texts else read_texts((), "tuning").values())],
        device=device,
        progress=not as_json,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_json(result.as_dict())
    else:
        show(*audit_summary(result))


def verify_folder(model: str, as_json: bool) -> None:
    """Print whether a folder is what its record says; exit with status 1 where it is not."""
    from mergekit_omp.report.fingerprints import changes
    from mergekit_omp.report.record import read_record

    record = read_record(model)
    found = changes(Path(model), record)
    if as_json:
        print_json({"is_unchanged": not found, "changes": found})
    elif found:
        for name, change in found.items():
            click.echo(f"{name}: {change}")
        click.echo(f"{model} is not what its record says.")
    else:
        sums = record["sha256"]
        click.echo(
            f"{len(sums['files'])} files and {len(sums['tensors'])} vocabulary matrices are as they were written."
        )
    if found:
        raise SystemExit(1)
