"""Test the bytes of tokens for every kind of tokenizer."""

from collections.abc import Callable
from pathlib import Path

import helpers.tokenizers_for_tests as tt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, PythonBackend
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from mergekit_omp.errors import OmpError
from mergekit_omp.vocabulary.byte_encoding import BYTE_ALPHABET, as_text, read_scheme
from mergekit_omp.vocabulary.matching import match_vocabularies
from mergekit_omp.vocabulary.numerals import numeral_scheme
from mergekit_omp.vocabulary.segmentation import pieces
from mergekit_omp.vocabulary.tokens import TokenKind, Vocabulary, read_vocabulary

TEXT = "  Größe 12345,\n\tif x:\n    return 'naïve' # мир 世界 🙂\x07\n"
REAL = {
    "qwen": tt.qwen,
    "llama3": tt.llama3,
    "llama4": tt.llama4,
    "tekken": tt.tekken,
    "mistral1": lambda: tt.mistral(1),
    "mistral2": lambda: tt.mistral(2),
    "mistral3": lambda: tt.mistral(3),
}


def data_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    return {token.text: token.data for token in read_vocabulary(tokenizer).tokens.values()}


def word_level(texts: list[str], **components: object) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({text: id_ for id_, text in enumerate(texts)}, unk_token=texts[0]))
    for name, component in components.items():
        setattr(backend, name, component)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def spelled(vocabulary: Vocabulary, ids: list[int]) -> bytes:
    return b"".join(vocabulary.tokens[id_].data for id_ in ids)


@pytest.mark.parametrize("name", REAL)
def test_tokens_of_a_text_spell_it(name: str) -> None:
    """Check that the tokens of a text have its bytes, in every real vocabulary."""
    tokenizer = REAL[name]()
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    decoded = spelled(read_vocabulary(tokenizer), ids)
    assert decoded in (TEXT.encode(), b" " + TEXT.encode())  # SentencePiece puts a space before a text


def test_tokens_of_a_text_spell_it_in_smollm2_and_gemma(smollm2_dir: Path, gemma3_dir: Path) -> None:
    for folder in (smollm2_dir, gemma3_dir):
        tokenizer = tt.load(folder)
        text = TEXT.replace("\x07", "")
        assert spelled(read_vocabulary(tokenizer), tokenizer.encode(text, add_special_tokens=False)) == text.encode()


@pytest.mark.parametrize("build", [tt.byte_level, tt.unigram])
def test_tokens_of_a_text_spell_it_in_trained_vocabularies(build: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = build()
    text = " ".join(tt.CORPUS[0].split())
    decoded = spelled(read_vocabulary(tokenizer), tokenizer.encode(text, add_special_tokens=False))
    assert decoded.removeprefix(b" ") == text.encode()


def test_byte_level_alphabet_is_the_librarys() -> None:
    assert set(BYTE_ALPHABET) == set(pre_tokenizers.ByteLevel.alphabet())


@given(st.binary())
def test_byte_level_round_trip(data: bytes) -> None:
    """Check that any bytes in the byte-level alphabet are read back, whether they are valid UTF-8 or not."""
    scheme = read_scheme(word_level(["a"], decoder=decoders.ByteLevel()))
    assert scheme.ordinary_bytes(as_text(data)) == data


def test_byte_level_added_tokens_are_literal_text() -> None:
    """Check ``Ġ``, a space in ordinary tokens and itself in an added one; GPT-NeoX adds runs of spaces."""
    tokenizer = word_level(["Ġa"], decoder=decoders.ByteLevel())
    tokenizer.add_tokens(["Ġb", "   "])
    assert data_of(tokenizer) == {"Ġa": b" a", "Ġb": "Ġb".encode(), "   ": b"   "}


def test_strings_outside_the_byte_alphabet_are_literal_text() -> None:
    assert data_of(word_level(["世界"], decoder=decoders.ByteLevel())) == {"世界": "世界".encode()}


def test_byte_fallback_and_spaces_of_sentencepiece(gemma3_dir: Path) -> None:
    """Check Gemma, which has the digit 0 as a token and as a byte token, and many added tokens of ordinary text."""
    vocabulary = read_vocabulary(tt.load(gemma3_dir))
    by_text = {token.text: token for token in vocabulary.tokens.values()}
    assert (by_text["0"].data, by_text["0"].kind) == (b"0", TokenKind.ORDINARY)
    assert (by_text["<0x30>"].data, by_text["<0x30>"].kind) == (b"0", TokenKind.BYTE)
    assert by_text["▁the"].data == b" the"
    assert (by_text["\n\n"].data, by_text["\n\n"].kind, by_text["\n\n"].added) == (b"\n\n", TokenKind.ORDINARY, True)
    assert by_text["</h1>"].kind is TokenKind.ORDINARY
    assert by_text["<unused5>"].kind is TokenKind.UNUSED
    assert by_text["<end_of_turn>"].kind is TokenKind.SPECIAL
    assert {role: vocabulary.tokens[id_].text for role, id_ in vocabulary.roles.items()} == {
        "bos": "<bos>",
        "eos": "<eos>",
        "unk": "<unk>",
        "pad": "<pad>",
        "mask": "<mask>",
    }


def test_hexadecimal_text_is_not_a_byte_without_byte_fallback() -> None:
    assert data_of(word_level(["<0x41>"], decoder=decoders.Metaspace())) == {"<0x41>": b"<0x41>"}
    both = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert data_of(word_level(["<0x41>"], decoder=both)) == {"<0x41>": b"A"}


def test_word_piece_opens_words_with_a_space() -> None:
    """Check that ``the`` is " the", ``##ing`` continues a word, and marks and ideographs are separate."""
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##ing": 2, ".": 3, "世": 4, "##": 5}))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    for decoder in (None, decoders.WordPiece()):
        if decoder is not None:
            backend.decoder = decoder
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
        decoded = data_of(tokenizer)
        assert decoded == {
            "[UNK]": b"[UNK]",
            "the": b" the",
            "##ing": b"ing",
            ".": b".",
            "世": "世".encode(),
            "##": b"##",
        }


def test_end_of_word_marks_are_spaces() -> None:
    backend = Tokenizer(models.BPE({"a</w>": 0, "b": 1}, [], end_of_word_suffix="</w>"))
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    assert data_of(PreTrainedTokenizerFast(tokenizer_object=backend)) == {"a</w>": b"a ", "b": b"b"}


@pytest.mark.parametrize(
    ("components", "data"),
    [
        ({"pre_tokenizer": pre_tokenizers.ByteLevel()}, "▁Ġ".encode()),  # outside the alphabet: literal
        ({"pre_tokenizer": pre_tokenizers.Metaspace()}, " Ġ".encode()),
        ({"normalizer": normalizers.Replace(" ", "▁")}, " Ġ".encode()),
        ({}, "▁Ġ".encode()),
    ],
    ids=["ByteLevel", "Metaspace", "Replace", "nothing"],
)
def test_without_a_decoder_the_kind_follows_from_how_text_is_prepared(components: dict, data: bytes) -> None:
    assert data_of(word_level(["▁Ġ"], **components))["▁Ġ"] == data


def test_roles_name_tokens_of_the_vocabulary_only() -> None:
    """Check that a role whose string is not in the vocabulary is omitted, unlike in ``bos_token_id``."""
    tokenizer = tt.byte_level()
    vocabulary = read_vocabulary(tokenizer)
    assert vocabulary.roles == {"bos": 0, "eos": 0}
    assert vocabulary.tokens[0].kind is TokenKind.SPECIAL


def test_reserved_tokens_are_unused_unless_they_have_a_role() -> None:
    tokenizer = tt.word_piece()
    kinds = {token.text: token.kind for token in read_vocabulary(tokenizer).tokens.values()}
    assert (kinds["[unused0]"], kinds["[unused1]"], kinds["[MASK]"]) == (
        TokenKind.UNUSED,
        TokenKind.UNUSED,
        TokenKind.SPECIAL,
    )
    tokenizer.pad_token = "[unused1]"
    kinds = {token.text: token.kind for token in read_vocabulary(tokenizer).tokens.values()}
    assert (kinds["[unused0]"], kinds["[unused1]"]) == (TokenKind.UNUSED, TokenKind.SPECIAL)


def test_reserved_tokens_of_llama_and_tekken() -> None:
    for tokenizer, unused in ((tt.llama3(), 246), (tt.tekken(), 980), (tt.mistral(3), 737), (tt.qwen(), 0)):
        tokens = read_vocabulary(tokenizer).tokens.values()
        assert sum(token.kind is TokenKind.UNUSED for token in tokens) == unused


def test_ids_may_have_gaps_and_truncation_drops_tokens_and_roles() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 7, "</s>": 9}, unk_token="a"))
    vocabulary = read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    assert (set(vocabulary.tokens), vocabulary.size, dict(vocabulary.roles)) == ({0, 7, 9}, 10, {"eos": 9})
    short = vocabulary.truncated(9)
    assert (set(short.tokens), short.size, dict(short.roles)) == ({0, 7}, 8, {})
    assert vocabulary.truncated(0).size == 0


def test_fingerprint_is_of_everything_that_matters() -> None:
    """Check that bytes, kinds and roles of tokens matter, and that the preparation of text does not."""
    texts = ["a", "▁b", "</s>"]
    same = [
        word_level(texts, decoder=decoders.Metaspace()),
        word_level(texts, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never")),
    ]
    other = [word_level(texts), word_level(texts[::-1], decoder=decoders.Metaspace())]
    for role in ("eos_token", "bos_token"):
        other.append(word_level(texts, decoder=decoders.Metaspace()))
        setattr(other[-1], role, "</s>")
    other.append(word_level(texts, decoder=decoders.Metaspace()))
    other[-1].add_tokens(["new"])
    assert len({read_vocabulary(tokenizer) for tokenizer in same}) == 1
    assert len({read_vocabulary(tokenizer) for tokenizer in [same[0], *other]}) == 1 + len(other)
    first, second = map(read_vocabulary, same)
    assert first.fingerprint == second.fingerprint
    assert "▁b" not in repr(first), "a vocabulary's repr must not list its tokens"


def test_slow_sentencepiece_tokenizer_reads_as_the_fast_one() -> None:
    """Check a tokenizer with a SentencePiece model and without a ``tokenizers`` backend."""
    slow = SentencePieceBackend(
        vocab_file=str(tt.package_file("mistral_common", "data/tokenizer.model.v1")),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    assert getattr(slow, "backend_tokenizer", None) is None
    fast_tokens = read_vocabulary(tt.mistral(1)).tokens
    slow_tokens = read_vocabulary(slow).tokens
    assert {id_: (token.data, token.kind) for id_, token in slow_tokens.items()} == {
        id_: (token.data, token.kind) for id_, token in fast_tokens.items()
    }


class TiktokenStyle(PythonBackend):
    """A tokenizer as in models with custom code: its vocabulary lists bytes."""

    ranks = {bytes([byte]): byte for byte in range(256)} | {b" the": 256, b"\xe4\xb8": 257}

    @property
    def vocab_size(self) -> int:
        return len(self.ranks)

    def get_vocab(self) -> dict[bytes | str, int]:
        return self.ranks | self.added_tokens_encoder

    def _tokenize(self, text: str) -> list[bytes]:
        return [bytes([byte]) for byte in text.encode()]

    def _convert_token_to_id(self, token: bytes) -> int | None:
        return self.ranks.get(token)

    def _convert_id_to_token(self, id_: int) -> bytes:
        return list(self.ranks)[id_]


def test_tiktoken_style_tokenizer_that_lists_bytes() -> None:
    tokens = read_vocabulary(TiktokenStyle(eos_token="<|endoftext|>")).tokens
    assert {id_: tokens[id_].data for id_ in range(258)} == {id_: data for data, id_ in TiktokenStyle.ranks.items()}
    assert (tokens[258].text, tokens[258].kind) == ("<|endoftext|>", TokenKind.SPECIAL)


class NoKind(PythonBackend):
    """A tokenizer that does not declare the bytes of its tokens."""

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}

    @property
    def vocab_size(self) -> int:
        return 1


def test_a_tokenizer_of_unknown_kind_is_refused() -> None:
    with pytest.raises(OmpError, match=r"'NoKind' has neither a tokenizer\.json, nor a SentencePiece model"):
        read_vocabulary(NoKind())


def test_a_decoder_that_replaces_expressions_is_refused() -> None:
    with pytest.raises(OmpError, match=r"decoder replaces the expression .*'\^x\+'"):
        read_vocabulary(word_level(["a"], decoder=decoders.Replace(Regex("^x+"), "")))


def test_a_component_in_python_is_refused() -> None:
    class Custom:
        def decode_chain(self, tokens: list[str]) -> list[str]:
            return tokens

    tokenizer = word_level(["a"])
    tokenizer.backend_tokenizer.decoder = decoders.Decoder.custom(Custom())
    with pytest.raises(OmpError, match="custom Python code"):
        read_vocabulary(tokenizer)


def test_an_empty_tokenizer_is_refused() -> None:
    with pytest.raises(OmpError, match="has no tokens"):
        read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())))


TEXTS = st.text(
    st.sampled_from("aĠ▁ #.0<x4>1世\x00/w") | st.characters(exclude_categories=["Cs"]), min_size=0, max_size=6
)
DECODERS = st.sampled_from(
    [
        decoders.ByteLevel(),
        decoders.Metaspace(),
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
        decoders.WordPiece(),
        decoders.BPEDecoder(),
        decoders.CTC(),
    ]
)
PRE_TOKENIZERS = st.sampled_from(
    [
        pre_tokenizers.ByteLevel(),
        pre_tokenizers.Metaspace(),
        pre_tokenizers.BertPreTokenizer(),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Split(" ", "merged_with_previous"),
        pre_tokenizers.UnicodeScripts(),
        pre_tokenizers.WhitespaceSplit(),
    ]
)
NORMALIZERS = st.sampled_from(
    [
        normalizers.Prepend("▁"),
        normalizers.Replace(" ", "▁"),
        normalizers.Lowercase(),
        normalizers.NFKC(),
        normalizers.Strip(),
        normalizers.BertNormalizer(),
    ]
)


@st.composite
def tokenizers(draw: st.DrawFn) -> PreTrainedTokenizerFast:
    """Generate any content of a tokenizer.json, sensible or not."""
    texts = draw(st.lists(TEXTS, min_size=1, max_size=12, unique=True))
    ids = dict(zip(texts, draw(st.permutations(range(len(texts)))), strict=True))
    backend = Tokenizer(
        draw(
            st.sampled_from(
                [
                    models.WordLevel(ids, unk_token=texts[0]),
                    models.WordPiece(ids, unk_token=texts[0]),
                    models.BPE(ids, [], byte_fallback=True),
                    models.BPE(ids, [], unk_token=texts[0], end_of_word_suffix="</w>"),
                    models.Unigram([(text, -1.0) for text in texts], unk_id=0),
                ]
            )
        )
    )
    if parts := draw(st.lists(DECODERS, max_size=3)):
        backend.decoder = decoders.Sequence(parts)
    if parts := draw(st.lists(PRE_TOKENIZERS, max_size=2)):
        backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    if parts := draw(st.lists(NORMALIZERS, max_size=2)):
        backend.normalizer = normalizers.Sequence(parts)
    added = draw(st.lists(TEXTS.filter(bool), max_size=3, unique=True))
    # The library itself panics on any text if a normalizer leaves nothing of an added token.
    backend.add_tokens([AddedToken(text, special=draw(st.booleans()), normalized=False) for text in added])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=draw(st.sampled_from([None, *added])))


@settings(max_examples=150, deadline=None)
@given(tokenizers(), tokenizers())
def test_any_tokenizer_is_read_matched_and_split_or_refused(
    output_tokenizer: PreTrainedTokenizerFast, model_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Check for any tokenizer.json that the only exception is ``OmpError``, and that a match has equal bytes."""
    try:
        output, model = read_vocabulary(output_tokenizer), read_vocabulary(model_tokenizer)
    except OmpError:
        assume(False)
    match = match_vocabularies(output, model)
    text = {TokenKind.ORDINARY, TokenKind.BYTE}
    for id_ in match.atoms().tolist():
        anchor, own = output.tokens[id_], model.tokens[int(match.rows[id_])]
        assert anchor.data == own.data
        assert {anchor.kind, own.kind} <= text
    split = pieces(output, model_tokenizer, output.tokens, model)
    assert all(set(ids) <= set(model.tokens) for ids in split)
    numeral_scheme(model_tokenizer, model)
