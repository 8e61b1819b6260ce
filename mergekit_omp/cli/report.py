"""``mergekit-omp report``: what a transplant did, as text and as a page with pictures."""

from pathlib import Path

import click

from mergekit_omp.cli.options import JSON, print_json, working


@click.command(short_help="Show what a transplant did, as text and as a page with pictures.")
@click.argument("out", type=click.Path())
@click.option(
    "--html", "page_path", type=click.Path(), help="Where to write the page.  [default: OUT/omp_report.html]"
)
@JSON
def report(out: str, page_path: str | None, as_json: bool) -> None:
    """Show what a transplant did.

    OUT is the folder of a model made with `merge_method: omp`. A summary is printed, and a page with pictures is
    written: how well new tokens are approximated, by which anchors, and which tokens are near them now. The page is
    one file that loads nothing else.
    """
    with working("Starting"):
        from mergekit_omp.report.record import read_record

    record = read_record(out)
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
