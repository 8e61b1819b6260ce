"""The parts of the audit, against loops and on tokenizers with faults that were put in."""

import json

import numpy as np
import pytest
import torch
from helpers.checkpoints import ENGLISH, PYTHON, byte_level_tokenizer, make_model, sentencepiece_tokenizer
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from tokenizers import AddedToken, Tokenizer, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from mergekit_omp.audit import pieces as pieces_module
from mergekit_omp.audit.audit import check_rows_of
from mergekit_omp.audit.bounds import ByteBounds, excess_over_bounds
from mergekit_omp.audit.head import FEWEST, likely_everywhere
from mergekit_omp.audit.pieces import FEWEST as FEWEST_NEW
from mergekit_omp.audit.pieces import RIDGE, SPREADS, PieceCheck
from mergekit_omp.audit.scripts import SCRIPTS
from mergekit_omp.audit.states import States, last_states, logits_of, with_head
from mergekit_omp.audit.tokens import check_tokens
from mergekit_omp.errors import OmpError
from mergekit_omp.initializers.regression import pieces_of_anchors
from mergekit_omp.vocabulary.alignment import Alignment
from mergekit_omp.vocabulary.matching import match_vocabularies
from mergekit_omp.vocabulary.segmentation import pieces
from mergekit_omp.vocabulary.tokens import TokenKind, read_vocabulary


def test_bounds_are_sums_over_the_tokens_that_agree() -> None:
    """Reference: for each token, a loop over all of the base's."""
    base = read_vocabulary(sentencepiece_tokenizer(ENGLISH, 420))
    other = read_vocabulary(byte_level_tokenizer(PYTHON, 400))
    data = [token.data for token in other.tokens.values()] + [None, b"\xff", b" the quick brown fox jumps"]
    probabilities = torch.rand(3, base.size, generator=torch.Generator().manual_seed(0)).double()
    found = ByteBounds(base, data)(probabilities)
    text = [token for token in base.tokens.values() if token.kind in (TokenKind.ORDINARY, TokenKind.BYTE)]
    for index, one in enumerate(data):
        agreeing = [
            token.id
            for token in text
            if one is not None and (token.data.startswith(one) or one.startswith(token.data))
        ]
        assert found[:, index].tolist() == pytest.approx(probabilities[:, agreeing].sum(dim=1).tolist(), abs=1e-9)


def test_excess_counts_states_over_ten_times_the_bound() -> None:
    base = read_vocabulary(byte_level_tokenizer(ENGLISH, 300))
    probabilities = torch.full((4, base.size), 1e-4).double()
    letter = next(token.id for token in base.tokens.values() if token.data == b"q")
    probabilities[:, letter] = torch.tensor([1e-3, 1e-2, 0.1, 1e-9]).double()
    probabilities[:, 0] += 1 - probabilities.sum(dim=1)
    wanted = torch.tensor([[0.02], [0.02], [0.02], [1e-6]]).double()
    excess = excess_over_bounds(ByteBounds(base, [b"q"]), probabilities.log(), wanted.log())
    assert excess.share.tolist() == [0.25]
    assert excess.ratio.item() == pytest.approx(20)
    assert excess.probability.item() == pytest.approx(0.02)


@pytest.fixture(scope="module")
def states() -> States:
    tokenizer = byte_level_tokenizer(ENGLISH, 420)
    return last_states(make_model(tokenizer).eval(), tokenizer, ENGLISH, progress=False)


@torch.inference_mode()
def test_states_are_what_the_head_reads(states: States) -> None:
    model = make_model(byte_level_tokenizer(ENGLISH, 420)).eval()
    assert states.hidden.shape[1] == 32
    assert torch.allclose(model.lm_head(states.hidden), states.logits, atol=1e-5)
    assert torch.allclose(logits_of(model, states.hidden), states.logits, atol=1e-5)


def test_states_of_another_width(states: States) -> None:
    wider = make_model(byte_level_tokenizer(ENGLISH, 420), hidden=64)
    with pytest.raises(OmpError, match="--base: it is 32 wide, and the model 64"):
        logits_of(wider, states.hidden)


@torch.inference_mode()
def test_other_rows_for_a_head(states: States) -> None:
    """A head of fewer rows and a bias computes their logits, and a tied input embedding stays."""
    model = make_model(byte_level_tokenizer(ENGLISH, 420), tied=True).eval()
    embedding = model.get_input_embeddings().weight.clone()
    model.lm_head.bias = torch.nn.Parameter(torch.arange(len(embedding)).float())
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    found = logits_of(with_head(model, rows), states.hidden)
    torch.testing.assert_close(found, states.hidden @ rows.T + (len(embedding) - 1) / 2, atol=1e-4, rtol=1e-5)
    assert torch.equal(model.get_input_embeddings().weight, embedding)


def test_rows_that_are_likely_everywhere_by_the_head_alone() -> None:
    """Rows that say how frequent tokens are; new ones of rare tokens, and five that are those of frequent tokens."""
    random = torch.Generator().manual_seed(0)
    anchors, new, width = 20_000, 4_000, 96
    direction = torch.nn.functional.normalize(torch.randn(width, generator=random), dim=0)
    frequency = torch.cat([-torch.log1p(torch.arange(anchors).float()), torch.full((new,), -9.0)])
    rows = 0.5 * frequency[:, None] * direction + 0.5 * torch.randn(anchors + new, width, generator=random)
    planted = torch.arange(5) + anchors + 100
    rows[planted] = 1.05 * rows[torch.arange(5)]
    ids = torch.arange(anchors, anchors + new)
    found = likely_everywhere(rows.bfloat16(), torch.arange(anchors), ids)
    assert found is not None
    assert set(planted.tolist()) <= set(found.tolist())
    assert len(found) - len(planted) <= 0.005 * new
    assert likely_everywhere(rows, torch.arange(FEWEST - 1), ids) is None


def test_distances_from_pieces() -> None:
    """Reference: scikit-learn's ridge regression on the mean rows of the pieces, and its first principal direction."""
    random = torch.Generator().manual_seed(0)
    tokenizer, other = sentencepiece_tokenizer(ENGLISH), byte_level_tokenizer(PYTHON)
    own, output = read_vocabulary(tokenizer), read_vocabulary(other)
    match = match_vocabularies(output, own)
    alignment, ids = Alignment("base", tokenizer, own, match, match), match.is_new().nonzero().flatten()
    base, new = torch.randn(own.size, 16, generator=random), torch.randn(len(ids), 16, generator=random)
    new[3] *= 5
    check = PieceCheck(alignment, output, ids)
    kept = base[match.rows[check.anchors]]
    found = check.distances(base, kept, new)

    anchors = pieces_of_anchors([output.tokens[id_].data for id_ in check.anchors.tolist()], own.ids_by_bytes)
    x, z = (
        torch.stack([base[rows].mean(dim=0) for rows in split]).double().numpy()
        for split in (anchors, pieces(output, tokenizer, ids.tolist(), own))
    )
    ridge = Ridge(alpha=RIDGE * ((x - x.mean(axis=0)) ** 2).sum() / 16).fit(x, kept.double().numpy())
    left = (new.double() - torch.from_numpy(ridge.predict(z))).numpy()
    axis = PCA(1).fit(kept.numpy()).components_[0]
    sizes = torch.from_numpy(left - np.outer(left @ axis, axis)).norm(dim=1)
    median, upper = sizes.quantile(torch.tensor([0.5, 0.84]).double())
    assert found is not None
    torch.testing.assert_close(found[ids].double(), sizes / (median + SPREADS * (upper - median)), rtol=1e-4, atol=0)
    assert (found > 1).nonzero().flatten().tolist() == [ids[3]]
    assert PieceCheck(alignment, output, ids[: FEWEST_NEW - 1]).distances(base, kept, new) is None


def test_a_part_of_the_rows_without_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base without byte fallback has no pieces for many tokens of other scripts, one after the other."""
    monkeypatch.setattr(pieces_module, "_ROWS_AT_A_TIME", 8)
    words = [f"{letter}{n}" for n in range(30) for letter in "ab"]
    known = [*"ab0123456789", *words[:40]]
    base, donor = (
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({token: id_ for id_, token in enumerate(tokens)}, [])))
        for tokens in (known, [*known, *words[40:], *(chr(ord("\u4e00") + n) for n in range(20))])
    )
    own, output = read_vocabulary(base), read_vocabulary(donor)
    match = match_vocabularies(output, own)
    ids = match.is_new().nonzero().flatten()
    random = torch.Generator().manual_seed(0)
    rows, new = torch.randn(own.size, 16, generator=random), torch.randn(len(ids), 16, generator=random)
    check = PieceCheck(Alignment("base", base, own, match, match), output, ids)
    found = check.distances(rows, rows[match.rows[check.anchors]], new)
    assert found is not None
    assert (found[ids[:20]] > 0).all()
    assert not found[ids[20:]].any()


def test_what_all_rows_moved_by_is_nobodys_doing(states: States) -> None:
    """A model whose logits are all one higher is judged as if they were not."""
    base, output = (read_vocabulary(byte_level_tokenizer(corpus, 420)) for corpus in (ENGLISH, PYTHON))
    match = match_vocabularies(output, base)
    logits = torch.randn(len(states.logits) + 1, output.size, generator=torch.Generator().manual_seed(0))
    kept = (match.rows >= 0).nonzero().flatten()
    logits[:-1, kept] = states.logits[:, match.rows[kept]]
    found, changed = check_rows_of(logits, states, output, match, base)
    moved, moved_changed = check_rows_of(logits + 1, states, output, match, base)
    assert [check.id for check in found] == [check.id for check in moved]
    assert [check.ratio for check in found] == pytest.approx([check.ratio for check in moved], rel=1e-4)
    assert (changed, moved_changed) == (0, len(kept))
    assert {check.id for check in found} == set((match.rows < 0).nonzero().flatten().tolist())


def with_vocabulary(tokenizer: PreTrainedTokenizerFast, **added: int) -> PreTrainedTokenizerFast:
    """The tokenizer with tokens that no merge makes."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["model"]["vocab"] |= added
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)))


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer(ENGLISH), sentencepiece_tokenizer(ENGLISH)])
def test_tokens_of_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert not check_tokens(tokenizer, read_vocabulary(tokenizer)).unreachable
    size = len(tokenizer)
    changed = with_vocabulary(tokenizer, xqzj=size, ÿþ=size + 1)
    found = check_tokens(changed, read_vocabulary(changed)).unreachable
    assert [token.id for token in found] == [size, size + 1]


def test_words_of_the_vocabulary_that_need_no_merges() -> None:
    """Tokenizers like Llama 3's write a word of the vocabulary as it is; a part of a character is no word."""
    tokenizer = byte_level_tokenizer(ENGLISH)
    size = len(tokenizer)
    changed = with_vocabulary(tokenizer, xqzj=size, ÿþ=size + 1)
    changed.backend_tokenizer.model.ignore_merges = True
    found = check_tokens(changed, read_vocabulary(changed)).unreachable
    assert [token.id for token in found] == [size + 1]
    assert changed.backend_tokenizer.model.ignore_merges


def test_added_tokens_with_control_strings() -> None:
    tokenizer = byte_level_tokenizer(ENGLISH, special=("<|im_end|>",))
    assert not check_tokens(tokenizer, read_vocabulary(tokenizer)).control
    tokenizer.add_tokens(["<|im_start|>", "Hello<|im_end|>", "<my_tag>", "[INST] go"])
    tokenizer.add_tokens([AddedToken("x<|eot_id|>", special=True), AddedToken("<|fine|>", special=True)])
    found = check_tokens(tokenizer, read_vocabulary(tokenizer)).control
    assert [token.text for token in found] == ["<|im_start|>", "Hello<|im_end|>", "[INST] go", "x<|eot_id|>"]


def test_scripts_that_are_not_given_back() -> None:
    tokenizer = byte_level_tokenizer(ENGLISH)
    assert not check_tokens(tokenizer, read_vocabulary(tokenizer)).changed_scripts
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    cased = {name for name, text in SCRIPTS.items() if text != text.lower()}
    assert set(check_tokens(tokenizer, read_vocabulary(tokenizer)).changed_scripts) == cased
    assert {"Latin", "Greek", "Cyrillic", "Armenian"} <= cased
    assert len(SCRIPTS) >= 20
