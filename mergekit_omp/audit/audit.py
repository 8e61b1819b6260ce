"""The audit of a transplanted model: which of its new rows say what their tokens' bytes and pieces do not."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_omp.audit.bounds import ByteBounds, excess_over_bounds
from mergekit_omp.audit.pieces import FAR, ROW_NAMES, PieceCheck, matrices_of
from mergekit_omp.audit.scripts import SCRIPTS
from mergekit_omp.audit.states import States, last_states, logits_of
from mergekit_omp.audit.tokens import TokenChecks, check_tokens
from mergekit_omp.checkpoints.architecture import VocabularyRole
from mergekit_omp.checkpoints.models import load_model, tokenizer_of
from mergekit_omp.report.samples import readable
from mergekit_omp.vocabulary.alignment import Alignment
from mergekit_omp.vocabulary.duplicates import without_duplicates
from mergekit_omp.vocabulary.matching import VocabularyMatch, match_vocabularies
from mergekit_omp.vocabulary.tokens import TokenKind, Vocabulary, read_vocabulary

SHARE = 0.01
"""A row whose token is above its bound at more than this share of the states is flagged."""

LISTED = 10
"""Rows that are not flagged and are listed all the same, worst first."""

_FEWEST_OF_A_KIND = 20


@dataclass(frozen=True)
class RowCheck:
    """A row that the base does not have.

    Attributes:
        id: the row.
        token: its token's text, readable; "-" where no token has this row.
        share: of the states, in [0, 1], where the token is likelier than its bytes allow.
        ratio: the largest probability, divided by its bound.
        probability: the largest.
        mean_logit: its logit on the mean state.
        highest_kept: the highest logit of a kept row of its kind there.
        distances: by the name of its row in each matrix, how large the donor's part is; it is suspicious above 1.
    """

    id: int
    token: str
    share: float
    ratio: float
    probability: float
    mean_logit: float
    highest_kept: float
    distances: Mapping[str, float]

    @property
    def reasons(self) -> list[str]:
        """Why it is flagged; [] if it is not."""
        reasons = ["likelier than its bytes allow"] if self.share > SHARE else []
        reasons += ["high on the mean state"] if self.mean_logit > self.highest_kept else []
        return reasons + [FAR.format(row) for row, distance in self.distances.items() if distance > 1]

    @property
    def distance(self) -> float:
        """The largest of its distances; 0 if it has none."""
        return max(self.distances.values(), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {**vars(self), "reasons": self.reasons}


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        model: the folder.
        base: what its rows were compared with.
        states: of the base, on which they were compared.
        kept: rows of the output's tokens that the base has.
        changed: of these, those whose logits are not the base's: the model was merged or trained.
        checked: all other rows.
        flagged: of these, the suspicious ones, worst first.
        worst: the worst of the others.
        tokens: the checks of the tokenizer.
        free_rows: rows that no token has.
    """

    model: str
    base: str
    states: int
    kept: int
    changed: int
    checked: int
    flagged: tuple[RowCheck, ...]
    worst: tuple[RowCheck, ...]
    tokens: TokenChecks
    free_rows: int

    def as_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "model": self.model,
            "base": self.base,
            "states": self.states,
            "rows": {"kept": self.kept, "changed": self.changed, "checked": self.checked, "free": self.free_rows},
            "flagged": [row.as_dict() for row in self.flagged],
            "worst": [row.as_dict() for row in self.worst],
            "unreachable": [{"id": token.id, "token": readable(token)} for token in self.tokens.unreachable],
            "control_strings": [{"id": token.id, "token": readable(token)} for token in self.tokens.control],
            "round_trip": {name: name not in self.tokens.changed_scripts for name in SCRIPTS},
        }


def audit_model(
    model: str | Path,
    base: str | Path,
    texts: Iterable[str],
    *,
    device: str = "cpu",
    progress: bool = True,
    trust_remote_code: bool = False,
) -> Audit:
    """Audit a model that has another tokenizer than its base.

    Args:
        model: folder or hub id of a transplanted model.
        base: the model that it was made from.
        texts: what the base reads, for its states.
        device: where the models run, one at a time.
        progress: show a progress bar.
        trust_remote_code: let models run code of their own.

    Raises:
        OmpError: a model cannot be loaded, or the two do not belong together.
    """
    load = partial(load_model, device=device, dtype=torch.float32, trust_remote_code=trust_remote_code)
    tokenizer = tokenizer_of(model, trust_remote_code)
    vocabulary = read_vocabulary(tokenizer)
    base_tokenizer = tokenizer_of(base, trust_remote_code, key="--base")
    loaded = load(base, key="--base")
    states, of_base = last_states(loaded, base_tokenizer, texts, progress=progress), matrices_of(loaded)
    del loaded
    base_vocabulary = read_vocabulary(base_tokenizer).truncated(states.logits.shape[1])
    match = without_duplicates(match_vocabularies(vocabulary, base_vocabulary), vocabulary, tokenizer)

    loaded = load(model)
    logits = logits_of(loaded, torch.cat([states.hidden, states.hidden.mean(dim=0, keepdim=True)]))
    match = VocabularyMatch(match.rows[: logits.shape[1]], match.reasons[: logits.shape[1]])
    alignment = Alignment(str(base), base_tokenizer, base_vocabulary, match, match)
    pieces = PieceCheck(alignment, vocabulary, match.is_new().nonzero().flatten())
    distances = {
        role: pieces.distances(
            of_base.get(role, of_base[VocabularyRole.INPUT]), rows[pieces.anchors], rows[pieces.ids]
        )
        for role, rows in matrices_of(loaded).items()
    }
    del loaded
    checks, changed = check_rows_of(logits, states, vocabulary, match, base_vocabulary, distances)
    flagged = [check for check in checks if check.reasons]
    others = [check for check in checks if not check.reasons and check.ratio > 1]
    return Audit(
        model=str(model),
        base=str(base),
        states=len(states.hidden),
        kept=int((match.rows >= 0).sum()),
        changed=changed,
        checked=len(checks),
        flagged=tuple(flagged),
        worst=tuple(others[:LISTED]),
        tokens=check_tokens(tokenizer, vocabulary),
        free_rows=logits.shape[1] - len(vocabulary.tokens),
    )


def check_rows_of(
    logits: Tensor,
    states: States,
    vocabulary: Vocabulary,
    match: VocabularyMatch,
    base: Vocabulary,
    distances: Mapping[VocabularyRole, Tensor | None] | None = None,
) -> tuple[list[RowCheck], int]:
    """Check every row that the base does not have.

    Args:
        logits: (S + 1, R) of the model, on the S states of the base and on their mean.
        states: of the base.
        vocabulary: of the model.
        match: of this vocabulary with the base's.
        base: the base's vocabulary.
        distances: float32 (V,) by matrix, how large the donor's part of each row is.

    Returns:
        The checks, worst first, and how many rows that the base has are not the base's any more.
    """
    size = logits.shape[1]
    rows = torch.cat([match.rows[:size], torch.full((max(0, size - len(match.rows)),), -1)])
    kept, others = (rows >= 0).nonzero().flatten(), (rows < 0).nonzero().flatten()
    of_base = states.logits[:, rows[kept]]
    # Training and merging move all rows; what they move in common is none of a single row's doing.
    shift = (of_base - logits[:-1, kept]).median(dim=1, keepdim=True).values if len(kept) else torch.zeros(1)
    changed = int(((of_base - logits[:-1, kept]).abs().amax(dim=0) > _tolerance(of_base)).sum()) if len(kept) else 0
    tokens = [vocabulary.tokens.get(id_) for id_ in others.tolist()]
    is_text = [token is not None and token.is_text for token in tokens]
    data = [token.data if token and known else None for token, known in zip(tokens, is_text, strict=True)]
    excess = excess_over_bounds(ByteBounds(base, data), states.logits, logits[:-1, others] + shift)
    mean = logits[-1]
    limits = _highest_kept(mean, kept, vocabulary)
    by_name = {ROW_NAMES[role]: values for role, values in (distances or {}).items() if values is not None}
    checks = [
        RowCheck(
            id=id_,
            token="-" if token is None else readable(token),
            share=float(excess.share[n]),
            ratio=float(excess.ratio[n]),
            probability=float(excess.probability[n]),
            mean_logit=float(mean[id_]),
            highest_kept=limits.get(token.kind if token else None, limits[None]),
            distances={name: float(values[id_]) for name, values in by_name.items() if id_ < len(values)},
        )
        for n, (id_, token) in enumerate(zip(others.tolist(), tokens, strict=True))
    ]
    return sorted(checks, key=lambda check: (-check.share, -max(1.0, check.distance), -check.ratio, check.id)), changed


def _tolerance(logits: Tensor) -> float:
    """How much equal rows may differ in their logits, for the order of a matrix product."""
    return 1e-4 * float(logits.abs().max())


def _highest_kept(mean: Tensor, kept: Tensor, vocabulary: Vocabulary) -> dict[TokenKind | None, float]:
    """Return the highest logit of kept rows by kind; under None of all. Kinds of few kept rows are left out."""
    by_kind: dict[TokenKind | None, list[float]] = {None: []}
    for id_, logit in zip(kept.tolist(), mean[kept].tolist(), strict=True):
        by_kind.setdefault(vocabulary.tokens[id_].kind, []).append(logit)
        by_kind[None].append(logit)
    highest = {kind: max(logits) for kind, logits in by_kind.items() if len(logits) >= _FEWEST_OF_A_KIND}
    return {None: max(by_kind[None], default=float("inf")), **highest}
