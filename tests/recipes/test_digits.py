"""Test ``numerals: digits``: rows of numbers from the model's rows of digits, with reduced logits."""

import math
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import ENGLISH, make_model, run, save
from helpers.commands import recipe, refusal
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from mergekit_omp.evaluation.bits_per_byte import WINDOW_BYTES, builtin_texts, windows
from mergekit_omp.tasks.hidden_states import logit_shift

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NUMBERS = ["sums 123 45 " * 20, "123 and 45 and 2024 " * 20]


def tokenizer(single_digits: bool, *, with_space: bool = False) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer with tokens ``123`` and ``45`` or, as GPT-2's, `` 123``; or single digits."""
    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [] if with_space else [pre_tokenizers.Digits(individual_digits=single_digits)]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*ENGLISH, *NUMBERS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", bos_token="<|end|>")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    ours = tokenizer(single_digits=True)
    return save(tmp_path_factory.mktemp("base"), make_model(ours, tied=request.param, seed=1), ours)


@pytest.fixture(scope="module", params=[False, True], ids=["123", " 123"])
def donor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    its = tokenizer(single_digits=False, with_space=request.param)
    return save(tmp_path_factory.mktemp("donor"), make_model(its, hidden=24, seed=2), its)


def states_of(folder: Path) -> torch.Tensor:
    """Compute the last hidden states (T, D) over the texts, one text at a time."""
    model, ours = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    read = []
    for text in builtin_texts("tuning").values():
        ids = torch.tensor([ours(windows(text, WINDOW_BYTES)[0]).input_ids])
        with torch.inference_mode():
            read.append(model(ids, output_hidden_states=True).hidden_states[-1][0])
    return torch.cat(read)


def test_numbers_are_their_digits_and_other_rows_are_unchanged(base: Path, donor: Path, tmp_path: Path) -> None:
    plain = run(recipe(base, donor), tmp_path / "plain")
    made = run(recipe(base, donor, parameters={"k": 5, "numerals": "digits"}), tmp_path / "digits")
    ours, its = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(donor)
    numbers = [id_ for text, id_ in its.get_vocab().items() if text.removeprefix("Ġ").isdigit() and len(text) > 1]
    number = "Ġ123" if "Ġ123" in its.get_vocab() else "123"
    assert its.convert_tokens_to_ids(number) in numbers
    others = [id_ for id_ in range(len(its)) if id_ not in numbers]
    rows = AutoModelForCausalLM.from_pretrained(base)
    tied = rows.config.tie_word_embeddings
    for name, matrix in ((EMBED, rows.get_input_embeddings()), (HEAD, rows.get_output_embeddings())):
        if name == HEAD and tied:
            continue
        assert torch.equal(plain[name][others], made[name][others])
        digits = matrix.weight[[ours.convert_tokens_to_ids(digit) for digit in number]].mean(dim=0)
        moved = made[name][its.convert_tokens_to_ids(number)] - digits
        if name == EMBED and not tied:
            torch.testing.assert_close(moved, torch.zeros_like(moved))
        else:
            lowered = states_of(base) @ moved
            assert lowered.mean().item() == pytest.approx(-2 * math.log(10), rel=1e-3)


def test_the_shift_changes_logits_equally_even_if_scaled(base: Path) -> None:
    model, ours = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    ids = [ours(text).input_ids for text in ENGLISH[:3]]
    shift = logit_shift(model, ids)
    assert shift.tied == model.config.tie_word_embeddings
    scaled = logit_shift(_Scaled(model), ids)
    torch.testing.assert_close(scaled.direction, shift.direction / 4)


class _Scaled(torch.nn.Module):
    """A model whose logits are four times the output of its head, as Cohere scales them."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.get_output_embeddings = model.get_output_embeddings
        self.get_input_embeddings = model.get_input_embeddings

    def forward(self, ids: torch.Tensor, use_cache: bool) -> object:
        out = self.model(ids, use_cache=use_cache)
        out.logits = out.logits * 4
        return out


def test_a_model_that_is_not_a_language_model_is_refused(donor: Path, tmp_path: Path) -> None:
    ours = tokenizer(single_digits=True)
    config = T5Config(vocab_size=len(ours), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    base = save(tmp_path / "t5", T5ForConditionalGeneration(config), ours)
    sentence = refusal(recipe(base, donor, parameters={"numerals": "digits"}), tmp_path / "out")
    assert sentence.startswith("numerals: digits runs the model on a text")
    assert "t5" in sentence
