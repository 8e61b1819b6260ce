"""What a run did, in a few log lines."""

import logging

from mergekit_omp.recipe.transplant import RecipeModel
from mergekit_omp.report.record import Record

LOG = logging.getLogger(__name__)

NAMED = 20
"""Tokens without a row that are named."""


def log_summary(record: Record) -> None:
    """Log one line an input, what its user should know, and one line for the solves."""
    for model in record.transplant.inputs:
        LOG.info("%s", _describe_match(model))
        _warn_of_uncovered(model, record)
        for sentence in record.warnings(model):
            LOG.warning("%s", sentence)
    if record.solves or not record.other_rows:
        LOG.info("%d solves: %s", len(record.solves), _describe_solves(record))


def _describe_match(model: RecipeModel) -> str:
    match = model.match
    counts = ", ".join(f"{count} {reason.name.lower().replace('_', ' ')}" for reason, count in match.counts().items())
    return f"{model}: {int((match.rows >= 0).sum())} tokens kept, {int(match.is_new().sum())} lacking ({counts})"


def _warn_of_uncovered(model: RecipeModel, record: Record) -> None:
    ids = record.uncovered.get(model, [])
    if not ids:
        return
    names = [record.transplant.vocabulary.tokens[id_].text for id_ in ids]
    LOG.warning(
        "%s has no row for %d tokens and neither has a donor; they get the mean of the kept rows: %s%s",
        model,
        len(names),
        " ".join(map(repr, names[:NAMED])),
        " …" if len(names) > NAMED else "",
    )


def _describe_solves(record: Record) -> str:
    targets = sum(solve["targets"] for solve in record.solves)
    if not targets:
        return "nothing to approximate"
    mean = sum(solve["targets"] * solve["residuals"]["mean"] for solve in record.solves) / targets
    seconds = sum(solve["seconds"] for solve in record.solves)
    return f"{targets} approximated with a mean relative residual of {mean:.3f}; {seconds:.1f} s"
