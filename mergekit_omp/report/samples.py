"""Select sample tokens with their anchors and their nearest neighbours before and after the transplant."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader

from mergekit_omp.checkpoints.architecture import VocabularyRole
from mergekit_omp.checkpoints.weights import open_checkpoint
from mergekit_omp.realign.problem import Solution
from mergekit_omp.recipe.transplant import Transplant
from mergekit_omp.vocabulary.tokens import Token, TokenKind, Vocabulary

SAMPLES = 12
NEIGHBOURS = 5
ANCHORS_SHOWN = 6
_ROWS_PER_BATCH = 2**10  # the system clears the memory of large blocks again for each batch
_MAX_LENGTH = 24
_VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def choose_samples(solution: Solution, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Choose tokens from the best approximated to the worst, preferably words, with their largest coefficients."""
    codes, target_ids = solution.codes, solution.problem.target_ids.tolist()
    words = [index for index, id_ in enumerate(target_ids) if _is_word(vocabulary, id_)]
    pool = words if len(words) >= SAMPLES else list(range(len(target_ids)))
    residuals = codes.relative_residuals.tolist()
    pool.sort(key=lambda index: (residuals[index], index))
    step = max(1, (len(pool) - 1) // max(1, SAMPLES - 1))
    samples = []
    for index in pool[::step][:SAMPLES]:
        largest = codes.coefficients[index].abs().argsort(descending=True)[:ANCHORS_SHOWN].tolist()
        anchors = [
            {
                "token": readable(vocabulary.tokens[int(solution.problem.atom_ids[codes.indices[index, slot]])]),
                "coefficient": round(float(codes.coefficients[index, slot]), 4),
            }
            for slot in largest
            if codes.indices[index, slot] >= 0
        ]
        samples.append(
            {
                "id": target_ids[index],
                "token": readable(vocabulary.tokens[target_ids[index]]),
                "residual": round(residuals[index], 4),
                "anchors": anchors,
            }
        )
    return samples


def with_neighbours(
    tensors: Sequence[Mapping[str, Any]], solves: Sequence[Mapping[str, Any]], folder: Path, transplant: Transplant
) -> list[dict[str, Any]]:
    """Add nearest neighbours in the donor and in the output to the samples of the first solve of an input embedding.

    Neighbours are by cosine similarity, among the output tokens that the donor has, and among all output tokens.

    Args:
        tensors: tensors of the record.
        solves: solves of the record.
        folder: folder of the finished model.
        transplant: the resolved recipe.

    Returns:
        The samples; [] without such a solve.
    """
    tensor = next((t for t in tensors if t["side"] == VocabularyRole.INPUT and t["solves"]), None)
    if tensor is None:
        return []
    solve = solves[tensor["solves"][0]]
    samples = solve["samples"]
    vocabulary = transplant.vocabulary
    ids = torch.tensor([sample["id"] for sample in samples], dtype=torch.int64)
    donor = next(model for model in transplant.donors if str(model) == solve["donor"])
    rows = donor.match.rows
    known = (rows >= 0).nonzero().squeeze(1)
    stored = open_checkpoint(donor.reference, transplant.options).get_tensor(solve["tensor"])
    before = stored.movedim(solve["vocabulary_axis"], 0)
    after = LazyTensorLoader.from_disk(str(folder)).get_tensor(tensor["name"])
    present = torch.tensor(sorted(vocabulary.tokens), dtype=torch.int64)
    in_donor = _nearest(before, rows[ids], rows[known], known)
    in_output = _nearest(after, ids, present, present)
    return [
        sample
        | {
            "donor_neighbours": _named(in_donor[index], sample["id"], vocabulary),
            "output_neighbours": _named(in_output[index], sample["id"], vocabulary),
        }
        for index, sample in enumerate(samples)
    ]


def readable(token: Token) -> str:
    """Return a token's text with visible spaces and line ends, or its bytes if they are not valid UTF-8."""
    try:
        text = token.data.decode()
    except UnicodeDecodeError:
        return f"<{token.data.hex(' ').upper()}>"
    shown = "".join(_VISIBLE.get(character, character) for character in text)
    return shown if len(shown) <= _MAX_LENGTH else f"{shown[: _MAX_LENGTH - 1]}…"


def printable(token: str) -> str:
    """Write what a terminal does not show, such as a no-break space, as Python does."""
    return token if token.isprintable() else ascii(token)[1:-1]


def _is_word(vocabulary: Vocabulary, id_: int) -> bool:
    token = vocabulary.tokens[id_]
    if token.kind is not TokenKind.ORDINARY:
        return False
    text = token.data.decode(errors="replace").strip()
    return len(text) >= 3 and text.isalpha()


def _nearest(
    matrix: torch.Tensor, query_rows: torch.Tensor, candidate_rows: torch.Tensor, candidate_ids: torch.Tensor
) -> list[list[tuple[int, float]]]:
    """Return the output ids with the most similar rows for each query, including itself, and their cosines."""
    queries = torch.nn.functional.normalize(matrix[query_rows].float())
    parts = []
    for ids in candidate_rows.split(_ROWS_PER_BATCH):
        rows = matrix[ids].float()
        parts.append(queries @ rows.T / rows.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny))
    similarity = torch.cat(parts, dim=1)
    best = similarity.topk(min(NEIGHBOURS + 1, len(candidate_rows)), dim=1)
    return [
        list(zip(candidate_ids[places].tolist(), values.tolist(), strict=True))
        for places, values in zip(best.indices, best.values, strict=True)
    ]


def _named(nearest: list[tuple[int, float]], query_id: int, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    others = [(id_, cosine) for id_, cosine in nearest if id_ != query_id][:NEIGHBOURS]
    return [{"token": readable(vocabulary.tokens[id_]), "cosine": round(cosine, 3)} for id_, cosine in others]
