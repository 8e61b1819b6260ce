"""Combine two models by the mean of their log-probabilities, after a transplant to a common tokenizer.

    python examples/logit_ensemble.py --model a/ --other b/

Prints bits per byte of the model, of the other model with its tokenizer and of the ensemble, and a text of the
ensemble.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import SimpleNamespace

import one_vocabulary
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel

from mergekit_omp.evaluation.bits_per_byte import builtin_texts, read_text, windows


def mix(scores: Tensor, other: Tensor, weight: float) -> Tensor:
    """Compute the normalised weighted mean of two models' log-probabilities.

    Args:
        scores: (…, V), logits of the first model.
        other: (…, V'), logits of the other model; ids without a row in one of the two are padding and get -inf.
        weight: weight of the other model, in [0, 1].

    Returns:
        float32 (…, V).
    """
    shared = min(scores.shape[-1], other.shape[-1])
    one, two = (part[..., :shared].float().log_softmax(dim=-1) for part in (scores, other))
    mixed = torch.full_like(scores, -torch.inf, dtype=torch.float32)
    mixed[..., :shared] = torch.lerp(one, two, weight).log_softmax(dim=-1)
    return mixed


class Ensemble(LogitsProcessor):
    """Mixes the logits of another model into ``generate``, without beam search. Use one object per call."""

    def __init__(self, other: PreTrainedModel, weight: float = 0.5) -> None:
        self.other = other
        self.weight = weight
        self.cache = DynamicCache(config=other.config)
        self.n_read = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the mixed logits (B, V), given the ids int64 (B, T) so far and the first model's logits (B, V)."""
        new = input_ids[:, self.n_read :]
        self.n_read = input_ids.shape[1]
        logits = self.other(new, past_key_values=self.cache, use_cache=True).logits[:, -1]
        return mix(scores, logits, self.weight)


class Reader:
    """The ensemble with the interface that ``mergekit_omp.evaluation.bits_per_byte.read_text`` needs."""

    def __init__(self, model: PreTrainedModel, other: PreTrainedModel, weight: float = 0.5) -> None:
        self.model, self.other, self.weight = model, other, weight
        self.device = model.device
        self.get_input_embeddings = model.get_input_embeddings

    def __call__(self, ids: Tensor, use_cache: bool) -> SimpleNamespace:
        """Return the mixed logits of ids int64 (B, T)."""
        one, two = (model(ids, use_cache=use_cache).logits for model in (self.model, self.other))
        return SimpleNamespace(logits=mix(one, two, self.weight))


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the two models with their ensemble."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one_vocabulary.add_arguments(parser, keeps="model", changes="other")
    parser.add_argument("--weight", type=float, default=0.5, help="weight of the other model: %(default)s")
    parser.add_argument("--bytes", type=int, default=1536, help="bytes of each built-in text: %(default)s")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--tokens", type=int, default=24, help="tokens to write: %(default)s")
    options = parser.parse_args(arguments)
    model_folder, other_folder = one_vocabulary.folders(options)
    model, tokenizer = one_vocabulary.load(model_folder)
    other, _ = one_vocabulary.load(other_folder)

    readers = (model, other, Reader(model, other, options.weight))
    print(f"\n{'bits per byte':<16}{'model':>10}{'other':>10}{'ensemble':>10}")
    for name, text in builtin_texts().items():
        part = windows(text, options.bytes)[0]
        bits = [read_text(reader, tokenizer, part).bits / len(part.encode()) for reader in readers]
        print(f"{name:<16}" + "".join(f"{value:>10.3f}" for value in bits))
    prompt = one_vocabulary.with_start(tokenizer, options.prompt)
    [ids] = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        logits_processor=[Ensemble(other, options.weight)],
        do_sample=False,
        max_new_tokens=options.tokens,
    )
    print(f"\n{tokenizer.decode(ids, skip_special_tokens=True)!r}")


if __name__ == "__main__":
    main()
