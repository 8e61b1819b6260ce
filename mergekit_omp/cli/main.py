"""The command ``mergekit-omp``: look before a merge, and look at what it did."""

import json
from pathlib import Path
from typing import Any

import click

from mergekit_omp import __version__

_DEVICE = click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1, …")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
_TEXTS = click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="A text file; may be repeated.  [default: the built-in texts]",
)
_TRUST = click.option("--trust-remote-code", is_flag=True, help="Let models run code of their own.")


@click.group()
@click.version_option(__version__, prog_name="mergekit-omp")
def main() -> None:
    """Give a model another model's tokenizer, inside a mergekit recipe.

    The transplant itself is a merge method, so a recipe with `merge_method: omp` runs with `mergekit-yaml`. These
    commands are for before and after: `inspect` tells what a recipe would do and cost, `report` shows what it did,
    `tokens` which new tokens matter for a text, `eval` measures how well a model reads, `compare` runs a recipe with
    several methods, and `doctor` finds out why mergekit might not know the method.
    """


@main.command(short_help="What a recipe would do and cost, before it runs.")
@click.argument("what", nargs=-1, required=True, metavar="RECIPE | BASE DONOR")
@click.option("-k", default=None, type=click.IntRange(min=1), help="With BASE DONOR: the sparsity.  [default: 64]")
@click.option("--time/--no-time", "measure", default=True, help="Estimate how long the solves take (the default).")
@_DEVICE
@_TRUST
@_JSON
def inspect(
    what: tuple[str, ...], k: int | None, measure: bool, device: str, trust_remote_code: bool, as_json: bool
) -> None:
    """Tell what a recipe would do, without doing it.

    Name a recipe's file, or a base model and a donor of its new tokenizer. Nothing is written, and of models on the
    hub only tokenizers and configs are downloaded. You see which tokens keep their row, which are new, how special
    tokens pair, what is known to suffer, and how much time, memory and disk a run takes.

    \b
    mergekit-omp inspect recipe.yml
    mergekit-omp inspect google/gemma-3-270m HuggingFaceTB/SmolLM2-135M
    """
    _quiet()
    from mergekit.options import MergeOptions

    from mergekit_omp.recipe.resolve import resolve
    from mergekit_omp.report.forecast import describe, forecast

    config = _load_recipe(what, k)
    _check_device(device)
    options = MergeOptions(device=device, trust_remote_code=trust_remote_code)
    found = forecast(resolve(config, options), measure=measure)
    click.echo(_as_json(found) if as_json else describe(found))


@main.command(short_help="What a transplant did, as text and as a page with pictures.")
@click.argument("out", type=click.Path())
@click.option(
    "--html", "page_path", type=click.Path(), help="Where to write the page.  [default: OUT/omp_report.html]"
)
@_JSON
def report(out: str, page_path: str | None, as_json: bool) -> None:
    """Show what a transplant did.

    OUT is the folder of a model made with `merge_method: omp`. A summary is printed, and a page with pictures is
    written: how well new tokens are approximated, by which anchors, and what is near them now. It is one file that
    needs nothing else, so it can be sent around.
    """
    from mergekit_omp.report.record import read_record

    record = read_record(out)
    if as_json:
        click.echo(_as_json(record))
        return
    from mergekit_omp.report.page import page, summary

    click.echo(summary(record))
    target = Path(page_path) if page_path else Path(out) / "omp_report.html"
    text = page(record, Path(out).resolve().name)
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(
            f"{target} cannot be written ({error.strerror}); name another with --html."
        ) from error
    click.echo(f"\nPage with pictures: {target}")


@main.command(short_help="Which new tokens matter most for a text.")
@click.argument("out", type=click.Path())
@_TEXTS
@click.option("--most", type=click.IntRange(min=1), default=20, show_default=True, help="How many to print.")
@_JSON
def tokens(out: str, texts: tuple[str, ...], most: int, as_json: bool) -> None:
    """Rank the approximated tokens of OUT by how often a text uses them times how badly they were approximated.

    OUT is the folder of a model made with `merge_method: omp`. What ranks high is worth an override in the recipe.
    """
    _quiet()
    from transformers import AutoTokenizer

    from mergekit_omp.evaluation.bits_per_byte import builtin_texts
    from mergekit_omp.report.record import read_record
    from mergekit_omp.report.token_impact import format_impacts, rank_tokens

    record = read_record(out)
    read = [Path(path).read_text(encoding="utf-8") for path in texts] or list(builtin_texts().values())
    ranked, total = rank_tokens(record, AutoTokenizer.from_pretrained(out), read)
    if as_json:
        click.echo(_as_json([{**vars(token), "impact": token.impact} for token in ranked]))
    else:
        click.echo(format_impacts(ranked, total, most))


@main.command(name="eval", short_help="How well models read: bits and tokens per byte, agreement.")
@click.argument("models", nargs=-1, required=True)
@click.option("--base", help="The model to compare greedy continuations with.  [default: the first of MODELS]")
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="A text file; may be repeated.",
)
@click.option(
    "--suite",
    type=click.Choice(["held_out", "tuning"]),
    default="held_out",
    show_default=True,
    help="The built-in texts to read where no --text is given.",
)
@_DEVICE
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="What the models compute in.",
)
@_TRUST
@_JSON
def evaluate(
    models: tuple[str, ...],
    base: str | None,
    texts: tuple[str, ...],
    suite: str,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Measure how well MODELS read: bits per byte, tokens per byte, agreement.

    Bits and tokens are counted by bytes of the text, so that models with different tokenizers compare; lower is
    better. Agreement is how often a model's most likely next bytes are those of the base.

    \b
    mergekit-omp eval google/gemma-3-270m ./transplanted
    """
    _quiet()
    import torch

    from mergekit_omp.evaluation.bits_per_byte import builtin_texts, evaluate, format_scores

    _check_device(device)
    chosen = {Path(path).stem: _read_text(path) for path in texts} if texts else builtin_texts(suite)
    scores = evaluate(
        models,
        chosen,
        base=base,
        device=device,
        dtype=getattr(torch, dtype),
        progress=not as_json,
        trust_remote_code=trust_remote_code,
    )
    click.echo(_as_json([score.as_dict() for score in scores]) if as_json else format_scores(scores))


@main.command(short_help="A recipe with several methods of approximation, side by side.")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--approximations",
    default="omp,subword,mean,zero",
    show_default=True,
    help="The methods, with commas between them, as in a recipe's approximation:.",
)
@_TEXTS
@click.option(
    "--bytes", "size", type=click.IntRange(min=4), help="How much of each text to read.  [default: all of it]"
)
@click.option("--plot", type=click.Path(dir_okay=False), help="Also draw the table, as this .png or .svg file.")
@_DEVICE
@_TRUST
@_JSON
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
    """Run RECIPE once for each of some methods of approximation, and compare what comes out.

    The table has bits per byte of the original model and of each output (lower is better), and the seconds and memory
    of each merge. The models are thrown away. What a method needs beside its name, such as corpus:, is taken from the
    recipe.

    \b
    mergekit-omp compare recipe.yml --approximations omp,subword,landmark_pca
    """
    _quiet()
    from mergekit_omp.evaluation.bits_per_byte import builtin_texts, windows
    from mergekit_omp.recipe.blocks import models_in_order
    from mergekit_omp.report import comparison

    chosen = comparison.parse_approximations(approximations)
    if plot:
        comparison.require_plot(Path(plot))
    config = _load_recipe((recipe,), None)
    _check_device(device)
    read = {Path(path).stem: _read_text(path) for path in texts} if texts else builtin_texts()
    rows = comparison.compare(
        _read_recipe(recipe),
        str(models_in_order(config)[0]),
        chosen,
        {name: "".join(windows(text, size)[:1]) if size else text for name, text in read.items()},
        options=["--device", device, *(["--trust-remote-code"] if trust_remote_code else [])],
        device=device,
        trust_remote_code=trust_remote_code,
    )
    click.echo(_as_json([row.as_dict() for row in rows]) if as_json else comparison.markdown(rows))
    if plot:
        comparison.draw(rows, Path(plot))
    if all(row.problem for row in rows[1:]):
        raise SystemExit(1)


@main.command(name="align", short_help="The token map that approximation: tokalign learns, as a file.")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False))
@click.argument("out", type=click.Path(dir_okay=False))
@_TRUST
def align(recipe: str, out: str, trust_remote_code: bool) -> None:
    """Learn which token of the model each new token of RECIPE is used like, and write the map to OUT.

    The text to learn from is corpus: in the recipe's parameters. OUT is JSON, one token a line, to be looked at and
    changed; with token_map: OUT in place of corpus: the recipe takes it as it is. No weights are read.
    """
    _quiet()
    from mergekit.options import MergeOptions

    from mergekit_omp.cli.align import learn_token_map
    from mergekit_omp.errors import OmpError
    from mergekit_omp.initializers.tokalign import write_token_map

    mapping = learn_token_map(_load_recipe((recipe,), None), MergeOptions(trust_remote_code=trust_remote_code))
    try:
        write_token_map(Path(out), mapping)
    except OSError as error:
        raise OmpError(f"{out} cannot be written ({error.strerror}); name another file.") from error
    click.echo(f"{len(mapping):,} tokens mapped: {out}")


@main.command(short_help="Whether mergekit knows the methods; versions and devices.")
@_JSON
def doctor(as_json: bool) -> None:
    """Check that mergekit knows the merge methods, and tell versions and devices.

    The exit status is 1 where something stands in the way.
    """
    from mergekit_omp.cli.doctor import diagnose

    checks = diagnose()
    if as_json:
        click.echo(_as_json([{"ok": check.ok, "text": check.text} for check in checks]))
    else:
        for check in checks:
            click.echo(f"{'ok     ' if check.ok else 'PROBLEM'}  {check.text}")
    if not all(check.ok for check in checks):
        raise SystemExit(1)


def _load_recipe(what: tuple[str, ...], k: int | None) -> Any:
    """The configuration of a recipe's file, or of the recipe that two models stand for."""
    from mergekit.config import MergeConfiguration

    from mergekit_omp import register
    from mergekit_omp.errors import OmpError
    from mergekit_omp.parameters import is_ours

    register()
    if len(what) == 2:
        base, donor = what
        return MergeConfiguration.model_validate(
            {
                "merge_method": "omp",
                "models": [{"model": base}],
                "tokenizer": {"source": donor},
                **({"parameters": {"k": k}} if k else {}),
            }
        )
    if len(what) > 2 or k is not None:
        raise click.UsageError("Name one recipe, whose own k counts, or a base model and a donor.")
    recipe = _read_recipe(what[0])
    method = recipe.get("merge_method") if isinstance(recipe, dict) else None
    if not is_ours(method):
        raise OmpError(
            f"{what[0]}: merge_method is {method!r}; there is something to inspect where it is omp or omp_<method>."
        )
    return MergeConfiguration.model_validate(recipe)


def _read_recipe(path: str) -> Any:
    import yaml

    from mergekit_omp.errors import OmpError

    try:
        return yaml.safe_load(_read_text(path))
    except yaml.YAMLError as error:
        raise OmpError(f"{path} is no YAML: {' '.join(str(error).split())}.") from error


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise click.ClickException(f"{path} cannot be read ({reason}); name a text file.") from error


def _check_device(device: str) -> None:
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise click.ClickException(f"--device: {device} cannot be used here ({reason}); try cpu.") from error


def _quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
