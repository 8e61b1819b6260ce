"""``mergekit-omp report``: what a transplant did, as text and as a page with pictures."""

from pathlib import Path

import click

from mergekit_omp.cli.options import (
    DEVICE,
    JSON,
    TRUST_REMOTE_CODE,
    check_device,
    print_json,
    silence_transformers,
    working,
)


@click.command(short_help="Show what a transplant did, as text and as a page with pictures.")
@click.argument("out", type=click.Path())
@click.option(
    "--html", "page_path", type=click.Path(), help="Where to write the page.  [default: OUT/omp_report.html]"
)
@click.option("--evaluate", is_flag=True, help="Run the models, and show where bits are lost against the base.")
@click.option("--base", help="The base, for --evaluate.  [default: the model that the record names]")
@DEVICE
@TRUST_REMOTE_CODE
@JSON
def report(
    out: str,
    page_path: str | None,
    evaluate: bool,
    base: str | None,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Show what a transplant did.

    OUT is the folder of a model made with `merge_method: omp`. A summary is printed, and a page with pictures is
    written: how well new tokens are approximated, by which anchors, and which tokens are near them now. The page is
    one file that loads nothing else.

    With --evaluate, OUT and its base read the built-in held-out texts. Bits per byte are shown by how the output's
    tokens lie over the base's, each beside what the base says that it should cost, as `mergekit-omp eval --base` does.
    The option --base names a base that has been moved, and implies --evaluate.
    """
    with working("Starting"):
        from mergekit_omp.report.record import read_record

    record = read_record(out)
    if evaluate or base:
        from mergekit_omp.report.scores import evaluate_output

        silence_transformers()
        check_device(device)
        record["evaluation"] = evaluate_output(
            record, out, base, device=device, progress=not as_json, trust_remote_code=trust_remote_code
        )
    if as_json:
        print_json(record)
        return
    from mergekit_omp.errors import OmpError
    from mergekit_omp.report.page import page
    from mergekit_omp.report.summary import summary
    from mergekit_omp.report.tables import heading, show

    show(*summary(record))
    target = Path(page_path) if page_path else Path(out) / "omp_report.html"
    with working("Drawing the page"):
        text = page(record, Path(out).resolve().name)
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OmpError(f"{target} cannot be written ({error.strerror}); name another with --html.") from error
    show("", heading("Page with pictures: ").append(str(target), style="not bold cyan"))
