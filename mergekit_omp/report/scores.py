"""Score models on texts, and format their scores as tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from mergekit_omp.checkpoints.models import load_model, tokenizer_of
from mergekit_omp.errors import OmpError
from mergekit_omp.evaluation.bits_per_byte import (
    WINDOW_BYTES,
    ModelScore,
    Reading,
    TextScore,
    builtin_texts,
    read_text,
    score_readings,
)
from mergekit_omp.evaluation.spans import SpanClass, SpanRuler
from mergekit_omp.report.record import base_of
from mergekit_omp.report.tables import new_table, render
from mergekit_omp.vocabulary.tokens import Vocabulary, read_vocabulary

Spans = Mapping[str, Mapping[str, float]]
"""For each class of tokens "tokens", "bits_per_byte" and "ideal_bits_per_byte"."""


def evaluate(
    models: Sequence[str | Path],
    texts: Mapping[str, str] | None = None,
    *,
    base: str | Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    window_bytes: int = WINDOW_BYTES,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> list[ModelScore]:
    """Score models on texts, with one model in memory at a time.

    Args:
        models: folders or hub ids of causal language models with their tokenizers.
        texts: texts by name; the built-in held-out texts if None.
        base: the model to compare with, for agreement and ideal bits; if None, agreement with the first of ``models``.
        device: device of the models.
        dtype: dtype of the models; log-probabilities are float32 in any case.
        window_bytes: maximum length of a window of text, in bytes.
        progress: whether to show a progress bar, in bytes, where the error stream is a terminal.
        trust_remote_code: whether to run code that comes with a model.

    Returns:
        One score per model, in the order of ``models``.

    Raises:
        OmpError: if there is no model or no text, a model cannot be loaded, or a text is empty.

    Example:
        A model whose weights are all zero predicts a uniform distribution over its tokens:

        >>> import tempfile
        >>> from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> from mergekit_omp.report.scores import evaluate
        >>> backend = Tokenizer(models.BPE(vocab={"<s>": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")]))
        >>> backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=4, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1))
        >>> _ = model.lm_head.weight.data.zero_()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = model.save_pretrained(folder), tokenizer.save_pretrained(folder)
        ...     [score] = evaluate([folder], {"text": "abab"}, progress=False)
        >>> f"{score.overall.bits_per_byte:.3f} {score.overall.tokens_per_byte:.3f}"
        '1.000 0.500'
    """
    texts = builtin_texts() if texts is None else texts
    _check_request(models, texts)
    key = "MODEL" if base is None else "--base"
    measured = [] if base is None else [str(model) for model in models if str(model) != str(base)]
    base = base or models[0]
    order = [str(base), *(str(model) for model in models if str(model) != str(base))]
    readings: dict[str, dict[str, Reading]] = {}
    total = len(order) * sum(len(text.encode()) for text in texts.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=None if progress else True) as bar:
        for name in order:
            bar.set_description(Path(name).name)
            key = key if name == order[0] else "MODEL"
            tokenizer = tokenizer_of(name, trust_remote_code, key)
            others = {other: tokenizer_of(other, trust_remote_code) for other in measured} if name == order[0] else {}
            model = load_model(name, device, dtype, trust_remote_code, key)
            vocabulary = read_vocabulary(tokenizer)
            rulers = _rulers(vocabulary, others)
            readings[name] = {
                title: read_text(
                    model,
                    tokenizer,
                    text,
                    window_bytes=window_bytes,
                    progress=bar.update,
                    rulers=rulers,
                    vocabulary=vocabulary,
                )
                for title, text in texts.items()
            }
            del model
    return [
        score_readings(str(model), texts, readings[str(model)], readings[str(base)] if len(order) > 1 else None)
        for model in models
    ]


def score_table(scores: Sequence[ModelScore]) -> Table:
    """Build a table with a row per text and a group of numbers per model."""
    names = _short_names([score.model for score in scores])
    table = new_table("", *(f"{name}\nbits/B  tokens/B  agree" for name in names))
    rows = [(*score.texts, score.overall) for score in scores]
    for text_scores in zip(*rows, strict=True):
        table.add_row(text_scores[0].text, *map(_numbers, text_scores))
    return table


def span_table(score: ModelScore) -> Table:
    """Make a table of where a model loses bits against its base: bits per byte beside the ideal ones, by class."""
    return table_of_spans({text.text: text.as_dict()["spans"] for text in (*score.texts, score.overall)})


def table_of_spans(measured: Mapping[str, Spans | None]) -> Table:
    """Make the table of :func:`span_table` from what ``--json`` and the record have, with a name for each row."""
    table = new_table("", "gap", *(f"{kind.value}\nbits/B  ideal" for kind in SpanClass))
    for name, spans in measured.items():
        if spans is None:
            table.add_row(name, *["-"] * (len(SpanClass) + 1))
            continue
        cells = [(spans[kind.value]["bits_per_byte"], spans[kind.value]["ideal_bits_per_byte"]) for kind in SpanClass]
        table.add_row(name, f"{gap(spans):.3f}", *(f"{bits:.3f}  {ideal:.3f}" for bits, ideal in cells))
    return table


def gap(spans: Spans) -> float:
    """Bits per byte that a model loses against its base, given its spans of all classes."""
    return sum(span["bits_per_byte"] - span["ideal_bits_per_byte"] for span in spans.values())


def evaluate_output(
    record: Mapping[str, Any], folder: str | Path, base: str | None = None, **options: Any
) -> dict[str, Any]:
    """Measure a transplanted model beside its base on the built-in held-out texts.

    Args:
        record: of the model.
        folder: the model's.
        base: the model that it was made from; the record's first input if None.
        options: of :func:`evaluate`.

    Returns:
        The scores of both, under "base" and "output", as ``ModelScore.as_dict`` has them.

    Raises:
        OmpError: a model cannot be loaded.
    """
    base = base or base_of(record)
    scores = evaluate([base, folder], base=base, **options)
    return {"base": scores[0].as_dict(), "output": scores[1].as_dict()}


def format_scores(scores: Sequence[ModelScore]) -> str:
    """Format the table of :func:`score_table` as plain text."""
    return render(score_table(scores))


def _rulers(own: Vocabulary, others: Mapping[str, PreTrainedTokenizerBase]) -> dict[str, SpanRuler]:
    """Build rulers for the tokenizers that differ from the model's own."""
    vocabularies = {name: read_vocabulary(other) for name, other in others.items()}
    return {
        name: SpanRuler(own, others[name], vocabulary)
        for name, vocabulary in vocabularies.items()
        if vocabulary != own
    }


def _check_request(models: Sequence[str | Path], texts: Mapping[str, str]) -> None:
    if not models:
        raise OmpError("No model to evaluate: name at least one folder or hub id.")
    if not texts:
        raise OmpError("No text to evaluate on: name at least one file.")
    for title, text in texts.items():
        if not text:
            raise OmpError(f"The text {title} is empty: name a file that is not empty.")


def _numbers(score: TextScore) -> str:
    agreement = "-" if score.agreement is None else f"{score.agreement:.1%}"
    return f"{score.bits_per_byte:.3f}  {score.tokens_per_byte:8.3f}  {agreement:>6}"


def _short_names(names: Sequence[str]) -> list[str]:
    """Shorten names to their last part if that is unambiguous."""
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(set(names)) else list(names)
