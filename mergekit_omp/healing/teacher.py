"""The base's next-token distribution over the output's tokens, at every position that has one.

A token of the base is split by the output's tokenizer into pieces. At a boundary that both tokenizers have, a piece
has the mass of all base tokens whose split begins with it. After the first pieces of a split, each possible next piece
has its share of the mass of the tokens whose split begins with those pieces; the share of the token that ends there
belongs to whatever follows it. Where a base token ended but might have gone on, both parts are known, and the
distribution is exact. In a span with several tokens of the base there is none, and the text itself is the target.
Byte-prefix marginalisation (arXiv 2607.22334) gives the same quantities from the same single pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_omp.evaluation.chunks import row_chunks
from mergekit_omp.evaluation.spans import SpanRuler
from mergekit_omp.healing.alignment import AlignedWindow, Reader
from mergekit_omp.vocabulary.tokens import ROLES, TokenKind, Vocabulary

Split = tuple[int, ...]


@dataclass(frozen=True)
class Targets:
    """What the output's tokens of a window should be predicted with.

    Attributes:
        known: (T, V) float32, probabilities of the tokens whose share is known, before each of T tokens.
        unknown: (T,) float32, the probability of all other tokens together. Both sum to 1 for each of T.
    """

    known: Tensor
    unknown: Tensor


@dataclass(frozen=True)
class Continuations:
    """The base tokens whose split begins with some pieces.

    Attributes:
        ids: (N,) int64, the base tokens.
        next_pieces: (N,) int64, the output token that each goes on with; the number of output rows where it ends.
    """

    ids: Tensor
    next_pieces: Tensor


class Teacher:
    """A base model that says what the output's tokens should be predicted with."""

    def __init__(
        self, model: PreTrainedModel, ruler: SpanRuler, base: Reader, output: Reader, output_rows: int
    ) -> None:
        """Find the first piece of every token of the base.

        Args:
            model: the base, in evaluation mode.
            ruler: how the output's tokenizer splits the base's tokens.
            base: its tokenizer.
            output: the output's tokenizer.
            output_rows: the number of rows of the healed model, at least as many as tokens.
        """
        self._model, self._ruler, self._start_id, self._rows = model, ruler, base.start_id, output_rows
        first_pieces = torch.full((_head_rows(model),), output_rows)
        first_pieces[ruler.ids] = torch.tensor([split[0] for split in ruler.splits])
        for base_id, output_id in _shared_special(base.vocabulary, output.vocabulary).items():
            first_pieces[base_id] = output_id
        self._first_pieces = first_pieces.to(model.device)
        self._continuations = lru_cache(maxsize=2**16)(self._find_continuations)

    @torch.no_grad()
    def targets(self, window: AlignedWindow) -> Targets:
        """Run the base over a window.

        Args:
            window: at least one token in both tokenizers.

        Returns:
            One row for each of the output's tokens, on the base's device.
        """
        device = self._model.device
        ids = torch.tensor([[self._start_id, *window.base_ids[:-1]]], device=device)
        logits = self._model(input_ids=ids, use_cache=False).logits[0]  # (number of base tokens, base rows)

        first_places: list[int] = []  # output tokens at common boundaries, and the base token there
        first_base: list[int] = []
        inner: list[tuple[int, int, Split]] = []  # output token, base token, and the pieces of that before it
        observed: list[int] = []
        ended: tuple[int, Split] | None = None  # the base token before this span, where it is one, and its split
        for span in window.spans():
            split = tuple(window.output_ids[place] for place in span.output)
            if len(span.base) == 1 and self._ruler.is_known(split):
                first_places.append(span.output[0])
                first_base.append(span.base[0])
                if ended is not None:
                    inner.append((span.output[0], *ended))
                inner += [(place, span.base[0], split[:count]) for count, place in enumerate(span.output[1:], 1)]
                ended = (span.base[0], split)
            else:
                observed += span.output
                ended = None

        known = torch.zeros(len(window.output_ids), self._rows, device=device)
        places, rows = (torch.tensor(values, device=device) for values in (first_places, first_base))
        for chunk in row_chunks(logits[: len(first_base)]):
            mass = torch.softmax(logits[rows[chunk]], dim=-1, dtype=torch.float32)
            firsts = torch.zeros(len(mass), self._rows + 1, device=device)
            known[places[chunk]] = firsts.index_add_(1, self._first_pieces, mass)[:, :-1]
        unknown = self._add_continuations(known, logits, inner, set(first_places))
        if observed:
            known[observed, [window.output_ids[place] for place in observed]] = 1.0
        # Mass of base tokens that no output token stands for, such as unused ones, is shared out.
        known *= ((1 - unknown) / known.sum(dim=1).clamp_min(1e-12))[:, None]
        return Targets(known, unknown)

    def _add_continuations(
        self,
        known: Tensor,
        logits: Tensor,
        inner: Sequence[tuple[int, int, Split]],
        boundaries: set[int],
    ) -> Tensor:
        """Add what follows the first pieces of split tokens to ``known``; returns the share that is unknown, (T,)."""
        unknown = torch.zeros(len(known), device=known.device)
        found = [(place, row, self._continuations(split)) for place, row, split in inner]
        if not found:
            return unknown
        sizes = torch.tensor([len(continuations.ids) for *_, continuations in found])
        places, rows = (
            torch.tensor(values).repeat_interleave(sizes).to(known.device)
            for values in zip(*((place, row) for place, row, _ in found), strict=True)
        )
        ids = torch.cat([continuations.ids for *_, continuations in found]).to(known.device)
        next_pieces = torch.cat([continuations.next_pieces for *_, continuations in found]).to(known.device)
        terms = logits[rows, ids].float()
        tops = torch.full_like(unknown, -torch.inf).scatter_reduce(0, places, terms, "amax")
        shares = torch.exp(terms - tops[places])
        shares /= torch.zeros_like(unknown).index_add_(0, places, shares)[places]
        ends = next_pieces == self._rows
        unknown.index_add_(0, places[ends], shares[ends])
        known_ends = torch.tensor([place for place, *_ in found if place in boundaries], device=known.device)
        if len(known_ends):  # what follows the end is known there
            known[known_ends] *= unknown[known_ends, None]
            unknown[known_ends] = 0
        known.view(-1).index_add_(0, places[~ends] * self._rows + next_pieces[~ends], shares[~ends])
        return unknown

    def _find_continuations(self, split: Split) -> Continuations:
        found, depth = self._ruler.range_of(split), len(split)
        splits = self._ruler.splits[found]
        next_pieces = [split[depth] if len(split) > depth else self._rows for split in splits]
        return Continuations(self._ruler.ids[found], torch.tensor(next_pieces))


def _head_rows(model: PreTrainedModel) -> int:
    return model.get_output_embeddings().get_parameter("weight").shape[0]


def _shared_special(base: Vocabulary, output: Vocabulary) -> dict[int, int]:
    """Map the ids of the base's special tokens to those of the output's with the same text, or the same role."""
    by_text = {token.text: id_ for id_, token in output.tokens.items() if token.kind is TokenKind.SPECIAL}
    shared = {
        id_: by_text[token.text]
        for id_, token in base.tokens.items()
        if token.kind is TokenKind.SPECIAL and token.text in by_text
    }
    both = [role for role in reversed(ROLES) if role in base.roles and role in output.roles]
    return shared | {base.roles[role]: output.roles[role] for role in both}
