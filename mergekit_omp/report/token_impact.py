"""Rank new tokens by their impact on texts: number of uses times relative residual."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from mergekit_omp.errors import OmpError


@dataclass(frozen=True)
class Impact:
    """One new token in a text.

    Attributes:
        id: its id in the output vocabulary.
        text: its text, as the tokenizer decodes it.
        uses: number of occurrences in the texts.
        relative_residual: ‖x - x̂‖ / ‖x‖ of its row in the donor's space, in [0, 1]; the maximum over several solves.
    """

    id: int
    text: str
    uses: int
    relative_residual: float

    @property
    def impact(self) -> float:
        """The number of uses times the residual."""
        return self.uses * self.relative_residual


def rank_tokens(
    record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> tuple[list[Impact], int]:
    """Rank the approximated tokens of a model by their impact on texts.

    Args:
        record: a record, as :mod:`mergekit_omp.report.record` writes it.
        tokenizer: tokenizer of the model.
        texts: texts of the intended use.

    Returns:
        The tokens that occur in the texts, in descending order of impact, and the number of tokens of the texts.

    Raises:
        OmpError: if the texts are empty, or the record has no residuals of tokens.
    """
    residuals = _residuals(record)
    ids = [id_ for text in texts for id_ in tokenizer(text, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise OmpError("--text: the file is empty; name a file with text.")
    uses = Counter(id_ for id_ in ids if id_ in residuals)
    ranked = [Impact(id_, str(tokenizer.decode([id_])), count, residuals[id_]) for id_, count in uses.items()]
    return sorted(ranked, key=lambda token: (-token.impact, token.id)), len(ids)


def _residuals(record: Mapping[str, Any]) -> dict[int, float]:
    if record.get("other_rows") and not record["solves"]:
        raise OmpError(
            "The new rows of this model have no residuals; only rows made with approximation: omp have them."
        )
    residuals: dict[int, float] = {}
    for solve in record["solves"]:
        if "tokens" not in solve:
            raise OmpError("The record of this model has no residuals of tokens; make the model again.")
        for id_, residual in solve["tokens"]:
            residuals[id_] = max(residual, residuals.get(id_, 0.0))
    return residuals
