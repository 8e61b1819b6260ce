"""The last hidden states of a model, and what a head makes of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mergekit_omp.errors import OmpError
from mergekit_omp.evaluation.bits_per_byte import windows

STATES = 400
"""Positions of the texts whose states are used."""

_WINDOWS = 24
_WINDOW_BYTES = 640


@dataclass(frozen=True)
class States:
    """What a base model computes at S positions of some texts.

    Attributes:
        hidden: (S, d) float32, what its head reads.
        logits: (S, V) float32.
    """

    hidden: Tensor
    logits: Tensor


@torch.inference_mode()
def last_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    count: int = STATES,
    progress: bool = True,
) -> States:
    """Run a model over parts of texts, and keep its last states at positions that are spread over them.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        texts: from each, windows are taken at regular distances.
        count: how many states to keep at most.
        progress: show a progress bar, in windows.

    Raises:
        OmpError: the model's head is not a module whose input can be read, or there is no text.
    """
    cut = [window for text in texts for window in windows(text, _WINDOW_BYTES)]
    chosen = cut[:: -(-len(cut) // _WINDOWS) or 1]
    encoded = [tokenizer(window, add_special_tokens=False).input_ids for window in chosen]
    n_tokens = sum(map(len, encoded))
    if not n_tokens:
        raise OmpError("--text: there is nothing to read; name a file with text.")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    step = max(1, n_tokens // count)
    hidden = []
    for ids in tqdm(encoded, desc="Base", unit="window", disable=None if progress else True):
        read: list[Tensor] = []
        with _Hook(model, read.append):
            batch = torch.tensor([ids if start is None else [start, *ids]], device=model.device)
            model(batch, use_cache=False)
        hidden.append(read[0][0][::step].float().cpu())
    states = torch.cat(hidden)
    return States(states, logits_of(model, states))


@torch.inference_mode()
def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (S, V), float32, that a model's head gives to states (S, d), with whatever the model does after its head.

    The body reads one token, and its state is replaced.

    Raises:
        OmpError: the head reads states of another width, or is not a module whose input can be replaced.
    """
    head = model.get_output_embeddings()
    width = getattr(head, "weight", hidden).shape[1]
    if width != hidden.shape[1]:
        raise OmpError(f"--base: it is {hidden.shape[1]} wide, and the model {width}; name the base of this model.")
    states = hidden.to(model.device, model.dtype)[None]
    with _Hook(model, lambda _: states):
        return (
            model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False).logits[0].float().cpu()
        )


def with_head(model: PreTrainedModel, rows: Tensor) -> PreTrainedModel:
    """Give a model's head other rows (B, d), in place; a tied input embedding stays.

    A bias becomes its mean, since nobody has one for these rows.
    """
    head: Any = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(rows.detach().to(head.weight), requires_grad=False)
    if getattr(head, "bias", None) is not None:
        head.bias = torch.nn.Parameter(head.bias.detach().mean().expand(len(rows)), requires_grad=False)
    return model


class _Hook:
    """Have a function see, and replace, what a model's head reads."""

    def __init__(self, model: PreTrainedModel, function: Any) -> None:
        self._head, self._function, self._was_called = model.get_output_embeddings(), function, False

    def __enter__(self) -> None:
        if self._head is None:
            raise OmpError("The model has no head that can be audited; name a causal language model.")
        self._handle = self._head.register_forward_pre_hook(self._call)

    def __exit__(self, kind: object, *_: object) -> None:
        self._handle.remove()
        if kind is None and not self._was_called:
            raise OmpError("The model does not call its head as a module, so that it cannot be audited.")

    def _call(self, _module: object, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        self._was_called = True
        replaced = self._function(arguments[0])
        return None if replaced is None else (replaced,)
