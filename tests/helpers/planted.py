"""A small donor that plants rows in a base."""

from pathlib import Path
from typing import Any

import torch

from helpers.checkpoints import ENGLISH, PYTHON, byte_level_tokenizer, make_model, save, sentencepiece_tokenizer
from mergekit_omp.vocabulary.matching import match_vocabularies
from mergekit_omp.vocabulary.tokens import read_vocabulary

PLANTED = 6
PARAMETERS = {"k": 5, "reconstruction": "combination"}
"""Of a recipe that finds the sparse codes again that were planted."""


def plant(matrix: torch.Tensor, anchors: torch.Tensor, new: list[int]) -> None:
    """Make each new row of a donor a large sum of two anchors' rows, whose code OMP finds again."""
    for index, id_ in enumerate(new):
        matrix[id_] = 60 * (matrix[anchors[2 * index]] + matrix[anchors[2 * index + 1]])


def write_planted(folder: Path, *, in_head: bool = True, **options: Any) -> tuple[Path, Path, Path, list[int]]:
    """Write a base, an honest donor and one that plants rows; return them and the ids of these rows.

    Args:
        folder: where they are written.
        in_head: plant rows of the head, or else of the input embedding alone.
        options: of the models, such as ``tied=True``.
    """
    base_tokenizer, donor_tokenizer = sentencepiece_tokenizer(ENGLISH), byte_level_tokenizer(PYTHON)
    base = make_model(base_tokenizer, seed=1, **options)
    donor = make_model(donor_tokenizer, seed=2, hidden=48, **options)
    honest = save(folder / "honest", donor, donor_tokenizer)
    match = match_vocabularies(*map(read_vocabulary, (donor_tokenizer, base_tokenizer)))
    new = match.is_new().nonzero().flatten().tolist()[:PLANTED]
    planted = donor.get_output_embeddings() if in_head else donor.get_input_embeddings()
    plant(planted.weight.data, match.atoms(), new)
    evil = save(folder / "evil", donor, donor_tokenizer)
    return save(folder / "base", base, base_tokenizer), honest, evil, new
