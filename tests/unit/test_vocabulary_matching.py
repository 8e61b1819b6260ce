"""Test the match of output tokens with the rows of a model."""

import random
from pathlib import Path

import helpers.tokenizers_for_tests as tt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_omp.vocabulary.matching import TEXT_REASONS, MatchReason, VocabularyMatch, match_vocabularies
from mergekit_omp.vocabulary.special import equivalents_of, is_unused_text, meaning_of, table
from mergekit_omp.vocabulary.tokens import ROLES, Token, TokenKind, Vocabulary, read_vocabulary

ORDINARY, BYTE, SPECIAL, UNUSED = TokenKind.ORDINARY, TokenKind.BYTE, TokenKind.SPECIAL, TokenKind.UNUSED


def vocabulary(*tokens: tuple[str, bytes, TokenKind] | tuple[str, bytes, TokenKind, bool], **roles: int) -> Vocabulary:
    """Build a vocabulary of (text, bytes, kind[, added]) with ascending ids."""
    return Vocabulary({id_: Token(id_, *token) for id_, token in enumerate(tokens)}, roles)


def special(*texts: str, **roles: int) -> Vocabulary:
    return vocabulary(*((text, text.encode(), SPECIAL, True) for text in texts), **roles)


def found(match: VocabularyMatch) -> list[tuple[int, MatchReason]]:
    return [
        (row, MatchReason(reason)) for row, reason in zip(match.rows.tolist(), match.reasons.tolist(), strict=True)
    ]


def pairs(output: Vocabulary, model: Vocabulary) -> dict[str, str | None]:
    """Return pairs of output token and model token, as strings."""
    rows = match_vocabularies(output, model).rows.tolist()
    return {
        token.text: model.tokens[rows[id_]].text if rows[id_] >= 0 else None for id_, token in output.tokens.items()
    }


@pytest.fixture(scope="module")
def smollm2(smollm2_dir: Path) -> Vocabulary:
    return read_vocabulary(tt.load(smollm2_dir))


@pytest.fixture(scope="module")
def gemma3(gemma3_dir: Path) -> Vocabulary:
    return read_vocabulary(tt.load(gemma3_dir))


@pytest.fixture(scope="module")
def qwen() -> Vocabulary:
    return read_vocabulary(tt.qwen())


def test_digits_of_smollm2_have_gemmas_digit_rows(smollm2: Vocabulary, gemma3: Vocabulary) -> None:
    """Check that a digit matches Gemma's ``0`` and not ``<0x30>``; both of Gemma's match SmolLM2's ``0``."""
    ids = {token.text: id_ for id_, token in gemma3.tokens.items()}
    back = match_vocabularies(gemma3, smollm2)
    forth_rows, back_rows, atoms = found(match_vocabularies(smollm2, gemma3)), found(back), set(back.atoms().tolist())
    for id_, token in smollm2.tokens.items():
        if token.text in "0123456789":
            digit, fallback = ids[token.text], ids[f"<0x{ord(token.text):02X}>"]
            assert forth_rows[id_] == (digit, MatchReason.SAME_STRING)
            assert back_rows[digit] == (id_, MatchReason.SAME_STRING)
            assert back_rows[fallback] == (id_, MatchReason.BYTE_TOKEN)
            assert digit in atoms
            assert fallback not in atoms


def test_anchor_counts_of_real_pairs(smollm2: Vocabulary, gemma3: Vocabulary, qwen: Vocabulary) -> None:
    """Check the numbers of tokens with the same bytes in real pairs.

    These are 46,138 without Gemma's added runs of tabs and newlines, of which SmolLM2 has 7; 95,934 without the 34
    added tokens that Qwen has; and 39,237 with the 3 special tokens of equal content.
    """
    assert len(match_vocabularies(smollm2, gemma3).atoms()) == 46_138 + 7
    assert len(match_vocabularies(gemma3, smollm2).atoms()) == 46_138 + 7
    assert len(match_vocabularies(qwen, gemma3).atoms()) == 95_934 + 34
    assert int((match_vocabularies(smollm2, qwen).rows >= 0).sum()) == 39_234 + 3


def test_special_tokens_of_real_pairs(smollm2: Vocabulary, gemma3: Vocabulary, qwen: Vocabulary) -> None:
    paired = pairs(smollm2, gemma3)
    assert (paired["<|im_start|>"], paired["<|im_end|>"], paired["<|endoftext|>"]) == ("<bos>", "<eos>", "<eos>")
    assert paired["<jupyter_code>"] is None
    paired = pairs(qwen, gemma3)
    assert (paired["<|im_start|>"], paired["<|im_end|>"]) == ("<start_of_turn>", "<end_of_turn>")
    assert (paired["<|endoftext|>"], paired["<|vision_start|>"]) == ("<eos>", "<start_of_image>")
    paired = pairs(gemma3, qwen)
    assert (paired["<end_of_turn>"], paired["<pad>"], paired["<unused7>"]) == ("<|im_end|>", "<|endoftext|>", None)


R1_NAMES = {
    151643: "<｜end▁of▁sentence｜>",
    151644: "<｜User｜>",
    151645: "<｜Assistant｜>",
    151646: "<｜begin▁of▁sentence｜>",
    151647: "<|EOT|>",
}


def renamed(vocabulary: Vocabulary, names: dict[int, str], **roles: int) -> Vocabulary:
    """Return the same vocabulary with other names of special tokens."""
    tokens = {
        id_: token._replace(text=names[id_], data=names[id_].encode(), kind=SPECIAL) if id_ in names else token
        for id_, token in vocabulary.tokens.items()
    }
    return Vocabulary(tokens, roles)


def test_renamed_special_tokens_pair_by_id_and_role(qwen: Vocabulary) -> None:
    """Check DeepSeek-R1-Distill-Qwen: Qwen with the first special tokens renamed, and an additional bos."""
    base = renamed(qwen, {151646: "<|object_ref_start|>"}, eos=151643, pad=151643)
    chat = Vocabulary(base.tokens, {"eos": 151645, "pad": 151643})
    distilled = renamed(qwen, R1_NAMES, bos=151646, eos=151643, pad=151643)
    for its in (base, chat):
        for output, model in ((distilled, its), (its, distilled)):
            match = found(match_vocabularies(output, model))
            assert match[151643] == (151643, MatchReason.SPECIAL_RENAMED)
            assert match[151646] == (151646, MatchReason.SPECIAL_RENAMED)
    paired = pairs(distilled, base)
    assert (paired["<｜User｜>"], paired["<|EOT|>"]) == (None, None), "no role, so the id alone says nothing"
    # With a bos of its own elsewhere, what the two tokens are for differs.
    elsewhere = Vocabulary(base.tokens, {**base.roles, "bos": 151643})
    assert pairs(distilled, elsewhere)["<｜begin▁of▁sentence｜>"] == "<|endoftext|>"
    # What the table knows to mean something else does not pair.
    assert pairs(distilled, qwen)["<｜begin▁of▁sentence｜>"] is None
    assert qwen.tokens[151646].text == "<|vision_start|>"


def test_equal_ids_mean_nothing_in_other_vocabularies(smollm2: Vocabulary) -> None:
    """Check that a different vocabulary with a special token of the same id and role matches by role."""
    shifted = {
        id_: token if token.kind is SPECIAL else smollm2.tokens[49151 - id_ + 17]._replace(id=id_)
        for id_, token in smollm2.tokens.items()
    }
    other = renamed(Vocabulary(shifted, {}), {0: "<eos>"}, eos=0)
    ours = Vocabulary(smollm2.tokens, {"eos": 0})
    assert found(match_vocabularies(other, ours))[0] == (0, MatchReason.SPECIAL_ROLE)
    assert found(match_vocabularies(renamed(ours, {0: "<eos>"}, eos=0), ours))[0] == (0, MatchReason.SPECIAL_RENAMED)


def test_control_tokens_that_one_tokenizer_merely_adds(qwen: Vocabulary) -> None:
    """Check fill-in-the-middle tokens, which are special in Tekken and only added in Qwen."""
    tekken = read_vocabulary(tt.tekken())
    assert pairs(qwen, tekken)["<|fim_middle|>"] == "[MIDDLE]"
    assert pairs(tekken, qwen)["[MIDDLE]"] == "<|fim_middle|>"


def test_html_that_gemma_adds_is_text(gemma3: Vocabulary) -> None:
    """Check ``</s>``, which is an HTML tag in Gemma's vocabulary and the end of text in Mistral's."""
    mistral = read_vocabulary(tt.mistral(1))
    assert pairs(gemma3, mistral)["</s>"] is None
    assert pairs(mistral, gemma3)["</s>"] == "<eos>"


@pytest.mark.parametrize("name", ["smollm2", "gemma3", "qwen"])
def test_a_vocabulary_matches_itself_row_by_row(name: str, request: pytest.FixtureRequest) -> None:
    own = request.getfixturevalue(name)
    assert torch.equal(match_vocabularies(own, own).rows, torch.arange(own.size))


@pytest.mark.parametrize("build", [tt.llama3, tt.tekken, lambda: tt.mistral(3), tt.unigram, tt.word_piece])
def test_more_vocabularies_match_themselves(build: object) -> None:
    own = read_vocabulary(build())
    assert torch.equal(match_vocabularies(own, own).rows, torch.arange(own.size))


def test_same_string_then_ordinary_then_byte_token() -> None:
    model = vocabulary(("<0x41>", b"A", BYTE), ("a2", b"A", ORDINARY), ("A", b"A", ORDINARY), ("<0x42>", b"B", BYTE))
    output = vocabulary(
        ("A", b"A", ORDINARY),
        ("<0x41>", b"A", BYTE),
        ("x", b"A", ORDINARY),
        ("B", b"B", ORDINARY),
        ("C", b"C", ORDINARY),
    )
    assert found(match_vocabularies(output, model)) == [
        (2, MatchReason.SAME_STRING),
        (0, MatchReason.SAME_STRING),
        (1, MatchReason.SAME_BYTES),
        (3, MatchReason.BYTE_TOKEN),
        (-1, MatchReason.MISSING),
    ]


def test_the_same_string_for_other_bytes_is_another_token() -> None:
    """Check ``Ġ``, which is a space in byte-level vocabularies and a letter in SentencePiece ones."""
    output = vocabulary(("Ġ", b" ", ORDINARY))
    model = vocabulary(("Ġ", "Ġ".encode(), ORDINARY), ("▁", b" ", ORDINARY))
    assert found(match_vocabularies(output, model)) == [(1, MatchReason.SAME_BYTES)]


def test_one_atom_for_each_row_of_the_model() -> None:
    """Check that the best match of tokens with one row is the atom, and that special and unused tokens are none."""
    output = vocabulary(
        ("<0x41>", b"A", BYTE),
        ("<unused1>", b"<unused1>", UNUSED),
        ("</s>", b"</s>", SPECIAL),
        ("y", b"A", ORDINARY),
        ("A", b"A", ORDINARY),
        ("B", b"B", ORDINARY),
    )
    model = vocabulary(
        ("A", b"A", ORDINARY), ("</s>", b"</s>", SPECIAL), ("<unused1>", b"<unused1>", UNUSED), ("B", b"B", ORDINARY)
    )
    match = match_vocabularies(output, model)
    assert match.rows.tolist() == [0, 2, 1, 0, 0, 3]
    assert match.atoms().tolist() == [4, 5]


def test_words_never_pair_with_special_tokens() -> None:
    word = vocabulary(("</s>", b"</s>", ORDINARY), ("[MASK]", b"[MASK]", ORDINARY))
    control = special("</s>", "[MASK]", eos=0)
    assert pairs(word, control) == {"</s>": None, "[MASK]": None}
    assert pairs(control, word) == {"</s>": None, "[MASK]": None}


def test_special_tokens_pair_by_content_before_role() -> None:
    """Check an instruct tokenizer whose end of turn is a token of its base model: it keeps that row."""
    instruct = special("<|endoftext|>", "<|im_end|>", eos=1, pad=0)
    base = special("<|endoftext|>", "<|im_end|>", eos=0, pad=0)
    assert found(match_vocabularies(instruct, base)) == [
        (0, MatchReason.SPECIAL_CONTENT),
        (1, MatchReason.SPECIAL_CONTENT),
    ]


def test_special_tokens_pair_by_role_before_the_table() -> None:
    output = special("<|im_end|>", "<|other|>", eos=0)
    model = special("<end_of_turn>", "<eos>", eos=1)
    assert found(match_vocabularies(output, model)) == [
        (1, MatchReason.SPECIAL_ROLE),
        (-1, MatchReason.MISSING_SPECIAL),
    ]


def test_unknown_and_padding_tokens_pair_last() -> None:
    """Check that a separator that is also the unknown token matches the model's separator."""
    output = special("<|endoftext|>", unk=0)
    assert found(match_vocabularies(output, special("<unk>", "</s>", unk=0))) == [(1, MatchReason.SPECIAL_EQUIVALENT)]
    assert found(match_vocabularies(output, special("<nothing>", unk=0))) == [(0, MatchReason.SPECIAL_ROLE)]


def test_an_end_of_text_used_as_padding_is_not_padding() -> None:
    output = special("<|stop|>", eos=0, pad=0)
    assert found(match_vocabularies(output, special("[PAD]", pad=0))) == [(-1, MatchReason.MISSING_SPECIAL)]
    assert found(match_vocabularies(output, special("[PAD]", "x", pad=0, eos=1))) == [(1, MatchReason.SPECIAL_ROLE)]


def test_several_special_tokens_may_share_a_row() -> None:
    output = special("<pad>", "<eos>", eos=1, pad=0)
    model = special("<|endoftext|>", eos=0, pad=0)
    assert match_vocabularies(output, model).rows.tolist() == [0, 0]


def test_gaps_truncation_and_counts() -> None:
    output = Vocabulary({1: Token(1, "a", b"a", ORDINARY), 3: Token(3, "b", b"b", ORDINARY)}, {})
    model = vocabulary(("a", b"a", ORDINARY), ("b", b"b", ORDINARY))
    assert match_vocabularies(output, model).rows.tolist() == [-1, 0, -1, 1]
    match = match_vocabularies(output, model.truncated(1))
    assert match.rows.tolist() == [-1, 0, -1, -1]
    assert match.counts() == {MatchReason.NO_TOKEN: 2, MatchReason.SAME_STRING: 1, MatchReason.MISSING: 1}
    assert (match.rows.dtype, match.reasons.dtype) == (torch.int64, torch.int8)
    assert match_vocabularies(output.truncated(0), model).rows.shape == (0,)


def test_table_of_equivalents_is_sound() -> None:
    """Check that every string is in one list, and that none is an unused token."""
    assert meaning_of("<|im_end|>") == meaning_of("<|eot_id|>") == "end_of_turn"
    assert "<|im_end|>" in equivalents_of("<end_of_turn>")
    assert equivalents_of("word") == ()
    texts = [text for listed in table()["equivalents"].values() for text in listed]
    assert len(texts) == len(set(texts))
    assert not any(map(is_unused_text, texts))
    assert set(table()["html"]) <= set(texts)


@pytest.mark.parametrize(
    ("text", "unused"),
    [
        ("<unused12>", True),
        ("[unused0]", True),
        ("<|reserved_special_token_5|>", True),
        ("<|vision_reserved_special_token_7|>", True),
        ("<SPECIAL_99>", True),
        ("[control_555]", True),
        ("<unused>", False),
        ("an <unused12>", False),
        ("<extra_id_0>", False),  # T5's sentinels are trained
        ("", False),
    ],
)
def test_reserved_strings(text: str, unused: bool) -> None:
    assert is_unused_text(text) is unused


KINDS = st.sampled_from(list(TokenKind))


@st.composite
def vocabularies(draw: st.DrawFn) -> Vocabulary:
    """Generate vocabularies with unique strings, few different bytes, and gaps between ids."""
    texts = draw(st.lists(st.text("abĠ▁<|>", max_size=3), max_size=12, unique=True))
    ids = draw(st.lists(st.integers(0, 30), min_size=len(texts), max_size=len(texts), unique=True))
    tokens = {}
    for id_, text in zip(ids, texts, strict=True):
        kind = draw(KINDS)
        data = draw(st.binary(max_size=1)) if kind in (ORDINARY, BYTE) else text.encode()
        tokens[id_] = Token(id_, text, data, kind, draw(st.booleans()))
    controls = [id_ for id_, token in tokens.items() if token.kind is SPECIAL]
    roles = {role: draw(st.sampled_from(controls)) for role in ROLES if controls and draw(st.booleans())}
    return Vocabulary(tokens, roles)


@given(vocabularies())
def test_any_vocabulary_matches_itself(own: Vocabulary) -> None:
    expected = [id_ if id_ in own.tokens else -1 for id_ in range(own.size)]
    assert match_vocabularies(own, own).rows.tolist() == expected


@given(vocabularies(), vocabularies())
def test_matches_are_sound_and_complete(output: Vocabulary, model: Vocabulary) -> None:
    """Check that anchors have equal bytes, text matches text, and no text of the model is missing."""
    match = match_vocabularies(output, model)
    has = {token.data for token in model.tokens.values() if token.kind in (ORDINARY, BYTE)}
    for id_, (row, reason) in enumerate(found(match)):
        assert (reason is MatchReason.NO_TOKEN) == (id_ not in output.tokens)
        if reason in TEXT_REASONS:
            assert output.tokens[id_].data == model.tokens[row].data
            assert {output.tokens[id_].kind, model.tokens[row].kind} <= {ORDINARY, BYTE}
        elif row >= 0 and reason is not MatchReason.UNUSED:
            assert model.tokens[row].kind is SPECIAL
        elif id_ in output.tokens and output.tokens[id_].kind in (ORDINARY, BYTE):
            assert output.tokens[id_].data not in has
    atoms = match.atoms()
    assert len(set(match.rows[atoms].tolist())) == len(atoms)
    assert set(match.rows[atoms].tolist()) == {row for row, reason in found(match) if reason in TEXT_REASONS}


@given(vocabularies(), vocabularies(), st.randoms())
def test_the_order_of_ids_does_not_matter(output: Vocabulary, model: Vocabulary, shuffler: random.Random) -> None:
    """Check that renumbering vocabularies renumbers the matched bytes, kinds and reasons, and changes nothing else."""

    def renumbered(own: Vocabulary) -> tuple[Vocabulary, dict[int, int]]:
        ids = list(own.tokens)
        new = dict(zip(ids, shuffler.sample(ids, len(ids)), strict=True))
        tokens = {
            new[id_]: Token(new[id_], token.text, token.data, token.kind, token.added)
            for id_, token in own.tokens.items()
        }
        return Vocabulary(tokens, {role: new[id_] for role, id_ in own.roles.items()}), new

    def match_of(match: VocabularyMatch, model: Vocabulary, id_: int) -> tuple:
        row, reason = found(match)[id_]
        return (reason, row >= 0 and (model.tokens[row].data, model.tokens[row].kind))

    other_output, new = renumbered(output)
    other_model, _ = renumbered(model)
    before, after = match_vocabularies(output, model), match_vocabularies(other_output, other_model)
    # Of several rows with the same bytes the smallest is taken, so that how many atoms there are may differ.
    written = [
        {own.tokens[id_].data for id_ in match.atoms().tolist()}
        for own, match in ((output, before), (other_output, after))
    ]
    assert written[0] == written[1]
    assert all(match_of(before, model, id_) == match_of(after, other_model, new[id_]) for id_ in output.tokens)
