"""Test the public names, and that importing the package imports no module before a name is used."""

import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mergekit_omp
from mergekit_omp import OmpError, SparseCodes, match_vocabularies, read_vocabulary, solve_omp

SHARED = "abcdefgh"


def byte_level_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the letters of ``SHARED`` and some words; the words have rows but no merges."""
    vocab = {text: id_ for id_, text in enumerate([*SHARED, *words])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_new_rows_with_public_names_only() -> None:
    """Check that new rows follow the linear map from the donor's to the base's rows if k equals d."""
    torch.manual_seed(0)
    donor, base = byte_level_tokenizer("ab", "Ġcd"), byte_level_tokenizer("ef")
    donor_rows, linear = torch.randn(len(donor), 4), torch.randn(4, 6)
    base_rows = torch.cat([donor_rows[: len(SHARED)] @ linear, torch.randn(1, 6)])

    match = match_vocabularies(read_vocabulary(donor), read_vocabulary(base))
    new, anchors = match.is_new().nonzero().squeeze(1), match.atoms()
    codes = solve_omp(donor_rows[new], donor_rows[anchors], k=4)

    assert donor.convert_ids_to_tokens(new.tolist()) == ["ab", "Ġcd"]
    assert anchors.tolist() == match.rows[anchors].tolist() == list(range(len(SHARED)))
    assert isinstance(codes, SparseCodes)
    assert codes.indices.shape == codes.coefficients.shape == (2, 4)
    torch.testing.assert_close(codes.apply(base_rows[match.rows[anchors]]), donor_rows[new] @ linear)


def test_invalid_arguments_raise() -> None:
    with pytest.raises(OmpError, match="k is 0, but OMP needs at least one atom per token: write k: 1 or more"):
        solve_omp(torch.ones(1, 2), torch.ones(3, 2), k=0)
    with pytest.raises(OmpError, match="has no tokens"):
        read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={}, merges=[]))))


def test_public_names_exist() -> None:
    assert dir(mergekit_omp) == sorted(mergekit_omp.__all__)
    assert all(hasattr(mergekit_omp, name) for name in mergekit_omp.__all__)
    with pytest.raises(AttributeError, match="module 'mergekit_omp' has no attribute 'solve'"):
        mergekit_omp.solve  # noqa: B018


def test_import_is_lazy() -> None:
    code = "import sys, mergekit_omp; print([name for name in sys.modules if name.startswith('mergekit_omp.')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
