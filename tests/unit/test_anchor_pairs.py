"""Every pair of docs/anchors.md, both ways: what becomes of each output id, by what the tokenizers themselves say.

The bytes and the kinds of tokens are read with the tokenizers' own decoders and lists of special tokens, without
``read_vocabulary``.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import helpers.tokenizers_for_tests as tt
import pytest
import torch
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mergekit_omp.parameters import OmpParameters
from mergekit_omp.realign.problem import Problem, pose_problem
from mergekit_omp.realign.rows import realign
from mergekit_omp.vocabulary.duplicates import without_duplicates
from mergekit_omp.vocabulary.matching import TEXT_REASONS, MatchReason, VocabularyMatch, match_vocabularies
from mergekit_omp.vocabulary.special import is_unused_text
from mergekit_omp.vocabulary.tokens import Vocabulary, read_vocabulary

DOCS = Path(__file__).parents[2] / "docs" / "anchors.md"
NAMES = ("Gemma 3", "Llama 3", "Mistral v3", "Qwen 2.5", "SmolLM2", "Tekken")
PAIRS = list(itertools.permutations(NAMES, 2))
pytestmark = pytest.mark.slow

PADDING = 7
"""Rows of the output beyond its tokens."""


@dataclass(frozen=True)
class Subject:
    """A tokenizer, and what it says of its own tokens."""

    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return read_vocabulary(self.tokenizer)

    @cached_property
    def strings(self) -> dict[int, str]:
        return {id_: text for text, id_ in self.tokenizer.get_vocab().items()}

    @cached_property
    def special(self) -> set[int]:
        """The tokens that no text becomes; byte-fallback tokens are text, although some files flag them so."""
        flagged = {id_ for id_, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        named = {id_ for id_ in flagged | set(self.tokenizer.all_special_ids) if _fallback(self.strings[id_]) is None}
        return named | {id_ for id_, text in self.strings.items() if is_unused_text(text)}

    @cached_property
    def written(self) -> dict[int, bytes]:
        """What each token that is text becomes in the middle of a decoded text."""
        backend = self.tokenizer.backend_tokenizer
        before = backend.encode("x", add_special_tokens=False).ids
        prefix = backend.decode(before)
        ids = [id_ for id_ in self.strings if id_ not in self.special]
        texts = backend.decode_batch([[*before, id_] for id_ in ids], skip_special_tokens=False)
        assert all(text.startswith(prefix) for text in texts)
        return {id_: self._bytes(id_, text.removeprefix(prefix)) for id_, text in zip(ids, texts, strict=True)}

    def _bytes(self, id_: int, text: str) -> bytes:
        """Encode a decoded token; bytes that are no text by themselves decode as U+FFFD, and are read off its name."""
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return text.encode()
        name = self.strings[id_]
        fallback = _fallback(name)
        if fallback is not None:
            return fallback
        return bytes(LETTERS[letter] for letter in name) if set(name) <= LETTERS.keys() else text.encode()


LETTERS = {letter: byte for byte, letter in bytes_to_unicode().items()}


def _fallback(name: str) -> bytes | None:
    is_byte = len(name) == 6 and name.startswith("<0x") and name.endswith(">")
    return bytes([int(name[3:5], 16)]) if is_byte else None


@pytest.fixture(scope="module")
def subjects(smollm2_dir: Path, gemma3_dir: Path) -> dict[str, Subject]:
    """The subjects by name; the fixtures download what is needed, and mark the tests as ``network``."""
    return {name: Subject(tokenizer) for name, tokenizer in tt.of_anchor_table().items()}


@pytest.fixture(params=PAIRS, ids=lambda pair: f"{pair[0]} from {pair[1]}", scope="module")
def pair(request: pytest.FixtureRequest, subjects: dict[str, Subject]) -> tuple[str, str]:
    return request.param


@pytest.fixture(scope="module")
def output(pair: tuple[str, str], subjects: dict[str, Subject]) -> Subject:
    return subjects[pair[0]]


@pytest.fixture(scope="module")
def model(pair: tuple[str, str], subjects: dict[str, Subject]) -> Subject:
    return subjects[pair[1]]


@pytest.fixture(scope="module")
def plain(output: Subject, model: Subject) -> VocabularyMatch:
    return match_vocabularies(output.vocabulary, model.vocabulary)


@pytest.fixture(scope="module")
def match(plain: VocabularyMatch, output: Subject) -> VocabularyMatch:
    """The match as a recipe has it."""
    return without_duplicates(plain, output.vocabulary, output.tokenizer)


@pytest.fixture(scope="module")
def problem(match: VocabularyMatch, output: Subject) -> Problem:
    """The new tokens, with the output's tokenizer as the donor."""
    return pose_problem(match, match_vocabularies(output.vocabulary, output.vocabulary))


def test_the_table_has_all_pairs(subjects: dict[str, Subject]) -> None:
    assert set(subjects) == set(NAMES)
    assert {f"{one} ← {other}" for one, other in PAIRS} == documented().keys()


def test_kept_rows_have_the_same_bytes_and_kind(
    output: Subject, model: Subject, plain: VocabularyMatch, match: VocabularyMatch
) -> None:
    for id_, (row, reason) in enumerate(zip(plain.rows.tolist(), plain.reasons.tolist(), strict=True)):
        if row < 0:
            continue
        names = output.strings[id_], model.strings[row]
        if reason in TEXT_REASONS:
            assert output.written[id_] == model.written[row], names
        elif reason == MatchReason.SPECIAL_EQUIVALENT:
            # A control token may be special in one tokenizer, and in the other one that is cut out of texts.
            for subject, one in ((output, id_), (model, row)):
                assert one in subject.special or one in subject.tokenizer.added_tokens_decoder, names
        else:
            assert id_ in output.special, names
            assert row in model.special, names
    assert not (match.rows[plain.rows < 0] >= 0).any(), "a row appears from nowhere"


def test_every_output_id_has_one_row(
    output: Subject, model: Subject, match: VocabularyMatch, problem: Problem
) -> None:
    """Give each row of the model, each new row and each override a number of its own, and see who got which."""
    size = output.vocabulary.size + PADDING
    rows = model.vocabulary.size
    kept_ids, new_ids = (match.rows >= 0).nonzero().flatten().tolist(), problem.target_ids.tolist()
    overridden = {kept_ids[0], new_ids[0], new_ids[-1]}
    weight = torch.arange(rows).double()[:, None]
    free_rows = model.vocabulary.free_rows(rows)
    result = realign(
        weight,
        match,
        [problem],
        [rows + problem.target_ids[:, None].double()],
        parameters=OmpParameters(),
        size=size,
        free_rows=free_rows,
        overrides={id_: torch.tensor([-1.0 - id_]) for id_ in overridden},
    ).flatten()
    means = {float(weight[free].float().mean()) for free in (match.rows[kept_ids], free_rows) if len(free)}

    row_of = match.rows.tolist()
    has, kept, new = set(model.written.values()), set(kept_ids), set(new_ids)
    spelt = {output.written[id_] for id_ in kept if id_ in output.written}
    assert not kept & new
    for id_, number in enumerate(result.tolist()):
        if id_ in overridden:
            assert number == -1 - id_
        elif id_ in kept:
            assert number == row_of[id_]
        elif id_ in new:
            assert number == rows + id_
            assert id_ not in output.written or output.written[id_] not in has, output.strings[id_]
        else:
            assert number in means
            is_duplicate = id_ in output.written and output.written[id_] in spelt
            is_free = id_ not in output.strings or is_unused_text(output.strings[id_])
            assert is_free or is_duplicate, output.strings[id_]


def documented() -> dict[str, tuple[int, int]]:
    """Read the numbers of rows and tokens with the same bytes from docs/anchors.md, by pair."""
    lines = [line.strip("| \n").split("|") for line in DOCS.read_text().splitlines() if " ← " in line]
    return {
        cells[0].strip(): (int(cells[5].replace(",", "")), int(cells[6].replace(",", "")))
        for cells in lines
        if cells[5].strip()[0].isdigit()
    }


def test_the_numbers_of_the_documentation(pair: tuple[str, str], plain: VocabularyMatch) -> None:
    assert documented()[f"{pair[0]} ← {pair[1]}"] == (len(plain.atoms()), int(plain.is_text().sum()))
