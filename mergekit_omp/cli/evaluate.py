"""``mergekit-omp eval``: how well models predict texts."""

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


@click.command(name="eval", short_help="Measure models: bits and tokens per byte, agreement.")
@click.argument("models", nargs=-1, required=True)
@click.option("--base", help="The model to compare with.  [default: the first of MODELS, for agreement alone]")
@TEXTS
@click.option(
    "--suite",
    type=click.Choice(["held_out", "tuning"]),
    default="held_out",
    show_default=True,
    help="The built-in texts to use without --text.",
)
@DEVICE
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="The type that the models compute in.",
)
@TRUST_REMOTE_CODE
@JSON
def eval_command(
    models: tuple[str, ...],
    base: str | None,
    texts: tuple[str, ...],
    suite: str,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Measure how well MODELS predict texts: bits per byte, tokens per byte, agreement.

    Bits and tokens are counted per byte of the text, so that models with different tokenizers can be compared; lower
    is better. Agreement is how often a model's most likely next bytes are those of the base.

    With --base, a second table shows where a model with another tokenizer loses bits: its tokens beside what the base
    says that they should cost. They are tokens of the base (equal), pieces of one (first piece, later pieces), or
    cross the borders of its tokens.

    \b
    mergekit-omp eval google/gemma-3-270m ./transplanted
    mergekit-omp eval ./transplanted --base google/gemma-3-270m
    """
    silence_transformers()
    import torch

    from mergekit_omp.report.scores import evaluate, score_table, span_table
    from mergekit_omp.report.tables import heading, show

    check_device(device)
    scores = evaluate(
        models,
        read_texts(texts, suite),
        base=base,
        device=device,
        dtype=getattr(torch, dtype),
        progress=not as_json,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_json([score.as_dict() for score in scores])
        return
    show(score_table(scores))
    for score in scores if base else ():
        if any(text.spans is not None for text in score.texts):
            show("", heading(f"{score.model}: bits per byte beside the ideal of {base}"), span_table(score))
