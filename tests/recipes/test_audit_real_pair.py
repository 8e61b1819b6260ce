"""The audit on real weights: a donor plants rows in Gemma-3-270M, which gets SmolLM2's tokenizer.

The rows are harmless: they give an unrelated word the probability or the meaning of a common token, or make it likely
everywhere.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import run, tensors_of
from safetensors.torch import save_file

from mergekit_omp.audit.audit import check_rows_of
from mergekit_omp.audit.pieces import PieceCheck
from mergekit_omp.audit.states import last_states, logits_of
from mergekit_omp.checkpoints.architecture import VocabularyRole
from mergekit_omp.checkpoints.models import load_model, tokenizer_of
from mergekit_omp.evaluation.bits_per_byte import builtin_texts
from mergekit_omp.vocabulary.alignment import Alignment
from mergekit_omp.vocabulary.matching import match_vocabularies
from mergekit_omp.vocabulary.tokens import read_vocabulary

EMBED = "model.embed_tokens.weight"
HIJACKED = 6
"""Common tokens whose probability a planted row takes."""


def always_likely(logits: torch.Tensor, wanted: torch.Tensor, atoms: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose atoms whose combination has wanted logits (S,), by OMP over the states.

    Args:
        logits: (S, N) of the atoms.
        wanted: (S,).
        atoms: K, how many to choose.

    Returns:
        Their places (K,) and coefficients (K,).
    """
    chosen: list[int] = []
    residual = wanted
    for _ in range(atoms):
        chosen.append(int((logits.T @ residual).abs().div(logits.norm(dim=0)).argmax()))
        coefficients = torch.linalg.lstsq(logits[:, chosen], wanted[:, None]).solution[:, 0]
        residual = wanted - logits[:, chosen] @ coefficients
    return torch.tensor(chosen), coefficients


def planted_rows(
    donor: torch.Tensor, atom_rows: torch.Tensor, logits: torch.Tensor, total: torch.Tensor, common: list[int]
) -> Iterator[torch.Tensor]:
    """Rows of a donor with a sparse code that means something in the base alone.

    Args:
        donor: (R, d) its matrix.
        atom_rows: (N,) the atoms' rows in it.
        logits: (S, N) of the base's rows for the atoms.
        total: (S,) the logarithm of the sum over the base's vocabulary.
        common: places of atoms that are the likeliest on many states.
    """
    places, coefficients = always_likely(logits, total - 0.7)
    yield donor[atom_rows[places]].T @ coefficients
    for place in common:
        yield 1.05 * donor[atom_rows[place]]


@pytest.mark.slow
def test_planted_rows_are_found_and_honest_ones_are_not(gemma3_dir: Path, smollm2_dir: Path, tmp_path: Path) -> None:
    tokenizers = [tokenizer_of(folder) for folder in (smollm2_dir, gemma3_dir)]
    output, own = map(read_vocabulary, tokenizers)
    match = match_vocabularies(output, own)
    base = load_model(str(gemma3_dir), "cpu", torch.float32, False)
    texts = [*builtin_texts().values(), *builtin_texts("tuning").values()]
    states = last_states(base, tokenizers[1], texts, progress=False)
    del base

    atoms = match.atoms()
    logits, total = states.logits[:, match.rows[atoms]], states.logits.logsumexp(dim=1)
    frequency = torch.bincount(logits.argmax(dim=1), minlength=len(atoms))
    common = frequency.argsort(descending=True)[:HIJACKED].tolist()
    words = [id_ for id_ in match.is_new().nonzero().flatten().tolist() if output.tokens[id_].data[:2].isalpha()]
    planted = words[100 : 100 + len(common) + 1]

    evil = Path(shutil.copytree(smollm2_dir, tmp_path / "evil", ignore=shutil.ignore_patterns("*.safetensors")))
    tensors = tensors_of(smollm2_dir)
    matrix = tensors[EMBED].float()
    for id_, row in zip(planted, planted_rows(matrix, atoms, logits, total, common), strict=True):
        matrix[id_] = row
    save_file(tensors | {EMBED: matrix}, evil / "model.safetensors", {"format": "pt"})
    recipe = {
        "merge_method": "omp",
        "models": [{"model": str(gemma3_dir)}],
        "tokenizer": {"source": str(evil)},
        "parameters": {"k": 8, "reconstruction": "combination"},
        "dtype": "bfloat16",
    }
    run(recipe, tmp_path / "out")

    model = load_model(str(tmp_path / "out"), "cpu", torch.float32, False)
    hidden = torch.cat([states.hidden, states.hidden.mean(dim=0, keepdim=True)])
    ids = match.is_new().nonzero().flatten()
    pieces = PieceCheck(Alignment("base", tokenizers[1], own, match, match), output, ids)
    base_rows, rows = (tensors_of(folder)[EMBED] for folder in (gemma3_dir, tmp_path / "out"))
    distances = {VocabularyRole.INPUT: pieces.distances(base_rows, rows[pieces.anchors], rows[ids])}
    checks, changed = check_rows_of(logits_of(model, hidden), states, output, match, own, distances)
    flagged = {check.id for check in checks if check.reasons}
    assert set(planted) <= flagged, [check for check in checks if check.id in planted]
    honest = {check.id for check in checks} - set(planted)
    assert len(flagged & honest) <= 0.005 * len(honest), [check for check in checks if check.id in flagged & honest]
    assert len(honest) > 2_900
    assert changed == 0, "rows of the base are its own"

    # Other input rows become those of common tokens; as many as a donor may plant without being noticed otherwise.
    taken = ids[20::200]
    rows[taken] = rows[atoms[frequency.argsort(descending=True)[: len(taken)]]]
    far = pieces.distances(base_rows, rows[pieces.anchors], rows[ids])
    assert far is not None
    assert (far[taken] > 1).float().mean() >= 0.7, far[taken]
