"""Test the segmentation of foreign tokens, numeral schemes, and the tokens of chat templates."""

import copy
from functools import cache
from pathlib import Path

import helpers.tokenizers_for_tests as tt
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from mergekit_omp.vocabulary.chat_template import chat_template_tokens
from mergekit_omp.vocabulary.numerals import NumeralScheme, numeral_scheme, numeral_warning
from mergekit_omp.vocabulary.segmentation import pieces
from mergekit_omp.vocabulary.tokens import TokenKind, Vocabulary, read_vocabulary

TEXT = (TokenKind.ORDINARY, TokenKind.BYTE)
read = cache(read_vocabulary)


def strings(output: Vocabulary, model_tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """Return the pieces of one output token as strings of the model."""
    id_ = next(id_ for id_, token in output.tokens.items() if token.text == text)
    model = read(model_tokenizer)
    return [model.tokens[piece].text for piece in pieces(output, model_tokenizer, [id_], model)[0]]


def unspelled(output: Vocabulary, model_tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """Return the bytes of ordinary output tokens that their pieces do not reproduce."""
    model = read(model_tokenizer)
    tokens = [token for token in output.tokens.values() if token.kind in TEXT]
    split = pieces(output, model_tokenizer, [token.id for token in tokens], model)
    return [
        token.data
        for token, ids in zip(tokens, split, strict=True)
        if b"".join(model.tokens[id_].data for id_ in ids) != token.data
    ]


def word_level(texts: list[str]) -> Vocabulary:
    """Build a vocabulary whose tokens are these texts."""
    backend = Tokenizer(models.WordLevel({text: id_ for id_, text in enumerate(texts)}, unk_token=texts[0]))
    return read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_pieces_spell_real_tokens(smollm2_dir: Path, gemma3_dir: Path) -> None:
    """Check all 305,000 tokens in both directions, except 24 with bytes for which SmolLM2 has no token."""
    smollm2, gemma3 = map(tt.load, (smollm2_dir, gemma3_dir))
    assert unspelled(read(smollm2), gemma3) == []
    missing = unspelled(read(gemma3), smollm2)
    known = {token.data for token in read(smollm2).tokens.values()}
    assert len(missing) == 24
    assert all(any(bytes([byte]) not in known for byte in data) for data in missing)


def test_pieces_of_real_tokens_in_mistral_and_llama() -> None:
    """Check that SentencePiece adds no space before pieces, and that invalid UTF-8 is written in bytes."""
    assert unspelled(read_vocabulary(tt.llama3()), tt.mistral(1)) == []
    assert unspelled(read_vocabulary(tt.mistral(1)), tt.llama3()) == []


def test_pieces_are_what_the_models_tokenizer_makes_in_a_text(gemma3_dir: Path) -> None:
    """Check that the model's merges decide, as between two other words, and not the longest match."""
    gemma3 = tt.load(gemma3_dir)
    output = word_level([" unbelievableness", "\n\n\n", " 1234", "</h1>x"])
    assert strings(output, gemma3, " unbelievableness") == gemma3.tokenize("a unbelievableness")[1:]
    assert strings(output, gemma3, "\n\n\n") == ["\n\n\n"]
    assert strings(output, gemma3, " 1234") == ["▁", "1", "2", "3", "4"]
    assert strings(output, gemma3, "</h1>x") == ["</h1>", "x"]


def test_no_space_is_added_and_none_is_lost() -> None:
    output = word_level(["word", " word", "  word", " "])
    for tokenizer in (tt.unigram(), tt.unigram(prepend_scheme="never"), tt.byte_level(add_prefix_space=True)):
        assert unspelled(output, tokenizer) == []
        assert strings(output, tokenizer, "word")[0][0] not in "▁Ġ"
        assert strings(output, tokenizer, " word")[0][0] in "▁Ġ"
    assert unspelled(output, tt.mistral(1)) == []


def test_word_piece_pieces_know_whether_a_word_begins() -> None:
    output = word_level([" words", "words", "Words"])
    assert strings(output, tt.word_piece(), " words") == ["words"]
    continued = strings(output, tt.word_piece(), "words")
    assert all(text.startswith("##") for text in continued)
    assert strings(output, tt.word_piece(), "Words") == ["words"]  # no capitals there: the text lowercased


def test_what_the_model_cannot_write_has_no_pieces() -> None:
    assert strings(word_level(["☃"]), tt.unigram(), "☃") == []


def test_special_tokens_are_not_pieces(smollm2_dir: Path) -> None:
    smollm2 = tt.load(smollm2_dir)
    split = strings(word_level(["<|im_end|>"]), smollm2, "<|im_end|>")
    assert "".join(split) == "<|im_end|>"
    assert len(split) > 1


def test_added_tokens_keep_their_ids() -> None:
    tokenizer = tt.byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<control>"]})
    tokenizer.add_tokens(["§§"])
    assert strings(word_level(["a§§"]), tokenizer, "a§§") == ["a", "§§"]


def test_the_tokenizer_is_unchanged() -> None:
    tokenizer = tt.unigram()
    before = tokenizer.backend_tokenizer.to_str()
    pieces(word_level(["word"]), tokenizer, [0])
    assert tokenizer.backend_tokenizer.to_str() == before


def test_tokens_without_a_row_are_not_pieces() -> None:
    tokenizer = tt.byte_level()
    model = read_vocabulary(tokenizer).truncated(257)
    (ids,) = pieces(word_level(["the dog"]), tokenizer, [0], model)
    assert b"".join(model.tokens[id_].data for id_ in ids) == b"the dog"


def test_a_tokenizer_without_backend_is_split_by_the_longest_tokens() -> None:
    slow = SentencePieceBackend(
        vocab_file=str(tt.package_file("mistral_common", "data/tokenizer.model.v1")), unk_token="<unk>"
    )
    output = word_level([" the🙋12"])
    assert strings(output, slow, " the🙋12") == ["▁the", "<0xF0>", "<0x9F>", "<0x99>", "<0x8B>", "1", "2"]
    assert numeral_scheme(slow, read(slow)) is NumeralScheme.SINGLE_DIGITS


def with_number_chunks(pattern: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer with all numbers of up to three digits that splits numbers by a pattern."""
    numbers = [str(n) for n in range(10)] + [f"{n:02}" for n in range(100)] + [f"{n:03}" for n in range(1000)]
    vocab = {text: id_ for id_, text in enumerate(dict.fromkeys(["<unk>", *numbers]))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_numeral_schemes_of_real_tokenizers(smollm2_dir: Path, gemma3_dir: Path) -> None:
    single, left = NumeralScheme.SINGLE_DIGITS, NumeralScheme.CHUNKS_FROM_LEFT
    for folder in (smollm2_dir, gemma3_dir):
        assert numeral_scheme(tt.load(folder), read(tt.load(folder))) is single
    schemes = {tt.qwen: single, tt.tekken: single, tt.llama3: left, tt.llama4: left}
    assert {build: numeral_scheme(build(), read(build())) for build in schemes} == schemes
    assert numeral_scheme(tt.mistral(1), read(tt.mistral(1))) is single


def test_numeral_schemes_that_no_package_has() -> None:
    whole_numbers = Tokenizer(
        models.WordLevel({str(n): n for n in range(10_000)} | {"<unk>": 10_000}, unk_token="<unk>")
    )
    whole_numbers.pre_tokenizer, whole_numbers.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    expected = {
        with_number_chunks(r"\d{1,3}(?=(\d{3})*$)"): NumeralScheme.CHUNKS_FROM_RIGHT,
        with_number_chunks(r"\d{1,3}"): NumeralScheme.CHUNKS_FROM_LEFT,
        with_number_chunks(r"\d{1,2}"): NumeralScheme.MIXED,
        tt.word_piece(): NumeralScheme.MIXED,
        PreTrainedTokenizerFast(tokenizer_object=whole_numbers): NumeralScheme.WHOLE,
    }
    assert {tokenizer: numeral_scheme(tokenizer, read(tokenizer)) for tokenizer in expected} == expected


def test_numeral_warning_names_both_schemes() -> None:
    single, left, mixed = NumeralScheme.SINGLE_DIGITS, NumeralScheme.CHUNKS_FROM_LEFT, NumeralScheme.MIXED
    assert numeral_warning(single, single) is None
    assert "three digits from the left and the model learnt them as single digits" in numeral_warning(left, single)
    assert numeral_warning(mixed, mixed) is not None  # varying chunks of two vocabularies are not the same chunks


def test_chat_template_tokens_in_source_and_rendering(smollm2_dir: Path) -> None:
    """Check also strings that the template concatenates, and tokens that it names by role."""
    tokenizer = copy.deepcopy(tt.load(smollm2_dir))
    vocabulary = read_vocabulary(tokenizer)

    def used() -> set[str]:
        return {
            vocabulary.tokens[id_].text for id_ in chat_template_tokens(tokenizer, vocabulary, tokenizer.chat_template)
        }

    assert used() == {"<|im_start|>", "<|im_end|>"}
    tokenizer.chat_template = "{% for m in messages %}{{ '<|im_' + 'start|>' + m.content }}{% endfor %}{{ eos_token }}"
    assert used() == {"<|im_start|>", "<|im_end|>"}
    tokenizer.chat_template = "{{ raise_exception('never') }}<file_sep>"
    assert used() == {"<file_sep>"}
    tokenizer.chat_template = {"default": "<file_sep>", "tool_use": "{{ '<reponame>' }}"}
    assert used() == {"<file_sep>", "<reponame>"}
    tokenizer.chat_template = None
    assert used() == set()


def test_normalized_text_is_spelled_as_it_is() -> None:
    """Check a token with a combining accent, which Qwen composes before it splits: it is written in bytes."""
    decomposed = normalizers.NFD().normalize_str("é")
    assert unspelled(word_level([decomposed]), tt.qwen()) == []
