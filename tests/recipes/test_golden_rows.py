"""The rows of the default recipe on a fixed pair, against stored numbers: a change of them is noticed, and explained.

The pair depends on nothing that other versions do differently: tokens and merges are listed, and numpy's RandomState
has a stream that never changes. Float32 sums differ in their last digits between CPUs, and a hash of the rows would
hold on one machine only: three inner products of each new row are stored, rounded, and compared with a tolerance.

Write new numbers with ``python tests/recipes/test_golden_rows.py``, and say in the changelog why they changed.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]

from helpers.checkpoints import make_model, run, save
from helpers.commands import recipe

from mergekit_omp.solver import memory

GOLDEN = Path(__file__).with_suffix(".json")
TOLERANCE = 1e-4
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"

COMMON = [
    "the",
    "and",
    "with",
    "from",
    "river",
    "forest",
    "mountain",
    "language",
    "vocabulary",
    "number",
    "sentence",
    "between",
]
OF_BASE = ["matrix", "vector", "harbour", "lantern"]
OF_DONOR = [
    "riverside",
    "forestry",
    "mountaineer",
    "bilingual",
    "numbering",
    "wonderful",
    "carpet",
    "understood",
    "betweenness",
    "2024",
]


def tokenizer_of(words: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose tokens are the bytes and all beginnings of some words."""
    letters = sorted(bytes_to_unicode().values())
    beginnings = [word[:end] for word in words for end in range(2, len(word) + 1)]
    merges = list(dict.fromkeys((part[:-1], part[-1]) for part in beginnings))
    tokens = ["<|end|>", *letters, *("".join(merge) for merge in merges)]
    backend = Tokenizer(models.BPE(vocab={token: id_ for id_, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", bos_token="<|end|>")


def write_pair(folder: Path) -> tuple[Path, Path]:
    """Write a base and a donor whose rows of a token have a part in common."""
    random = np.random.RandomState(7)
    tokenizers = [tokenizer_of(COMMON + words) for words in (OF_BASE, OF_DONOR)]
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    meaning = {text: random.standard_normal(24) for text in sorted(set().union(*vocabularies))}
    written = []
    for name, tokenizer, vocabulary, width in zip(("base", "donor"), tokenizers, vocabularies, (48, 96), strict=True):
        model = make_model(tokenizer, hidden=width)
        for matrix in (model.get_input_embeddings(), model.get_output_embeddings()):
            of_tokens = np.stack([meaning[text] for text in sorted(vocabulary, key=vocabulary.__getitem__)])
            rows = of_tokens @ random.standard_normal((24, width)) / 24 + 0.1 * random.standard_normal((1, width))
            rows += 0.05 * random.standard_normal(rows.shape)
            matrix.weight.data = torch.from_numpy(rows).float()
        written.append(save(folder / name, model, tokenizer))
    return written[0], written[1]


def rows_of(folder: Path, out: str, **parameters: str) -> dict[str, torch.Tensor]:
    """Run a recipe, by default the default one, and return the output's two matrices."""
    written = run(recipe(folder / "base", folder / "donor", parameters=parameters), folder / out)
    return {name: written[name].double() for name in (EMBED, HEAD)}


def new_tokens() -> dict[str, int]:
    base, donor = (tokenizer_of(COMMON + words).get_vocab() for words in (OF_BASE, OF_DONOR))
    return {text: id_ for text, id_ in donor.items() if text not in base}


def digest(rows: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Three inner products of each new row of each matrix, with vectors of length 1."""
    directions = torch.from_numpy(np.random.RandomState(8).standard_normal((48, 3)))
    directions /= directions.norm(dim=0)
    numbers = torch.cat([rows[name] @ directions for name in (EMBED, HEAD)], dim=1)
    return {text: [round(number, 4) for number in numbers[id_].tolist()] for text, id_ in sorted(new_tokens().items())}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    write_pair(folder)
    return folder


def test_rows_are_those_of_the_last_version(pair: Path) -> None:
    golden, found = json.loads(GOLDEN.read_text()), digest(rows_of(pair, "out"))
    assert found.keys() == golden.keys()
    changed = {
        text: (found[text], golden[text])
        for text in golden
        if found[text] != pytest.approx(golden[text], abs=TOLERANCE, rel=0)
    }
    assert not changed, f"{__doc__}\n{len(changed)} of {len(golden)} rows changed: {changed}"


@pytest.mark.parametrize("reconstruction", ["combination", "regression"])
def test_threads_and_chunks_do_not_matter(pair: Path, reconstruction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are equal to a millionth of their length, however many are solved at a time, and by how many threads."""
    before, found = torch.get_num_threads(), []
    try:
        for threads, chunk in [(1, 1000), (1, 7), (2, 1), (2, 1000)]:
            torch.set_num_threads(threads)
            monkeypatch.setattr(memory, "scan_chunk", lambda *_, chunk=chunk: chunk)
            found.append(rows_of(pair, f"{reconstruction}{threads}{chunk}", reconstruction=reconstruction))
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        for name in (EMBED, HEAD):
            differences = (one[name] - found[0][name]).norm(dim=1) / found[0][name].norm(dim=1)
            assert differences.max() <= 1e-6


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write_pair(Path(folder))
        lines = [f"{json.dumps(text)}: {numbers}" for text, numbers in digest(rows_of(Path(folder), "out")).items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
