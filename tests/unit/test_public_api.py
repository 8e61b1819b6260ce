"""What can be done with the public names alone, and that importing them costs nothing before they are used."""

import doctest
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mergekit_omp
from mergekit_omp import OmpError, SparseCodes, match_vocabularies, read_vocabulary, solve_omp

SHARED = "abcdefgh"


def byte_level_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the letters of ``SHARED`` and some words, which no merge makes: they only have to have rows."""
    vocab = {text: id_ for id_, text in enumerate([*SHARED, *words])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_rows_of_new_tokens_by_public_names_alone() -> None:
    """Where the base's rows are a linear map of the donor's, and k is as large as d, the new rows are that map's."""
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


def test_mistakes_are_told() -> None:
    with pytest.raises(OmpError, match="k is 0, but OMP needs at least one atom per token: write k: 1 or more"):
        solve_omp(torch.ones(1, 2), torch.ones(3, 2), k=0)
    with pytest.raises(OmpError, match="has no tokens"):
        read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={}, merges=[]))))


def test_every_public_name_is_there() -> None:
    assert dir(mergekit_omp) == sorted(mergekit_omp.__all__)
    assert all(hasattr(mergekit_omp, name) for name in mergekit_omp.__all__)
    with pytest.raises(AttributeError, match="module 'mergekit_omp' has no attribute 'solve'"):
        mergekit_omp.solve  # noqa: B018


@pytest.mark.parametrize("name", [name for name in mergekit_omp.__all__ if name != "__version__"])
def test_examples_of_the_documentation(name: str) -> None:
    value = getattr(mergekit_omp, name)
    module = import_module(value.__module__)
    [example] = doctest.DocTestFinder(recurse=False).find(value, name, module, module.__dict__.copy())
    results = doctest.DocTestRunner().run(example)
    assert results.attempted > 0
    assert results.failed == 0


def test_importing_the_package_imports_none_of_its_modules() -> None:
    code = "import sys, mergekit_omp; print([name for name in sys.modules if name.startswith('mergekit_omp.')])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
