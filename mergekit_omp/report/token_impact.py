"""Which new tokens matter most for a text: how often it uses them, times how badly they were approximated."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from mergekit_omp.errors import OmpError


@dataclass(frozen=True)
class Impact:
    """One new token in a text.

    Attributes:
        id: its id in the output vocabulary.
        text: what it stands for, as the tokenizer decodes it.
        uses: how often the texts have it.
        relative_residual: ‖x - x̂‖ / ‖x‖ of its row in the donor's space, in [0, 1]; the largest of several solves.
    """

    id: int
    text: str
    uses: int
    relative_residual: float

    @property
    def impact(self) -> float:
        """Uses times residual."""
        return self.uses * self.relative_residual


def rank_tokens(
    record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> tuple[list[Impact], int]:
    """Rank the approximated tokens of a model by their impact on texts.

    Args:
        record: as ``mergekit_omp.report.record`` writes it.
        tokenizer: the model's tokenizer.
        texts: what the model is meant to read.

    Returns:
        The tokens that the texts use, greatest impact first, and how many tokens the texts have in all.

    Raises:
        OmpError: there is no text, or the record is of a version that kept no residual for each token.
    """
    residuals = _residuals(record)
    ids = [id_ for text in texts for id_ in tokenizer(text, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise OmpError("--text: there is nothing to read; name a file with text.")
    uses = Counter(id_ for id_ in ids if id_ in residuals)
    ranked = [Impact(id_, tokenizer.decode([id_]), count, residuals[id_]) for id_, count in uses.items()]
    return sorted(ranked, key=lambda token: (-token.impact, token.id)), len(ids)


def _residuals(record: Mapping[str, Any]) -> dict[int, float]:
    if record.get("other_rows") and not record["solves"]:
        raise OmpError("The new rows of this model have no residuals: only those that approximation: omp makes have.")
    residuals: dict[int, float] = {}
    for solve in record["solves"]:
        if "tokens" not in solve:
            raise OmpError("The record of this model has no residual for each token; make the model again.")
        for id_, residual in solve["tokens"]:
            residuals[id_] = max(residual, residuals.get(id_, 0.0))
    return residuals


def format_impacts(ranked: Sequence[Impact], total: int, most: int) -> str:
    """A table of the ``most`` first tokens, and a line on all of them."""
    new = sum(token.uses for token in ranked)
    lines = [
        f"{new} of {total} tokens in the texts are approximated ones ({new / total:.1%}), {len(ranked)} different."
    ]
    if ranked:
        lines += ["", f"{'token':<24} {'id':>7} {'uses':>6} {'residual':>9} {'impact':>8}"]
        lines += [
            f"{token.text!r:<24} {token.id:>7} {token.uses:>6} {token.relative_residual:>9.3f} {token.impact:>8.2f}"
            for token in ranked[:most]
        ]
        lines += ["", "What is high here is worth an override: tokenizer.tokens in the recipe."]
    return "\n".join(lines)
