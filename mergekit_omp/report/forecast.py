"""Forecast the work and the resources of a run from tokenizers and configurations."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from mergekit.common import dtype_from_name
from mergekit.io.tasks import LoaderCache
from pydantic import ByteSize, TypeAdapter
from transformers import PretrainedConfig, PreTrainedModel

from mergekit_omp.checkpoints.architecture import VocabularyRole, hidden_size, is_tied
from mergekit_omp.checkpoints.models import empty_model
from mergekit_omp.initializers.regression import memory_of_regression
from mergekit_omp.parameters import Approximation, Numerals, OmpParameters, Reconstruction, UnsafeTokens
from mergekit_omp.recipe.blocks import settings_of
from mergekit_omp.recipe.copies import Offer, copies_of, find_offers
from mergekit_omp.recipe.transplant import RecipeModel, Transplant
from mergekit_omp.report.record import match_counts
from mergekit_omp.report.samples import readable
from mergekit_omp.report.warnings import warnings_for
from mergekit_omp.solver import solve_omp
from mergekit_omp.solver.dispatch import SolvePlan, plan_solve
from mergekit_omp.solver.memory import ProblemShape
from mergekit_omp.solver.rates import seconds_of_product
from mergekit_omp.vocabulary.matching import MatchReason
from mergekit_omp.vocabulary.numerals import numeral_scheme
from mergekit_omp.vocabulary.tokens import TokenKind

EXAMPLES = 24
_PROBE_TARGETS = 128
_PROBE_NUMBERS = 2**25  # 128 MB of float32
_PROBE_NUMBERS_ON_CPU = 2**23  # not worth more than a second
_WORTH_MEASURING = 10**9  # products of a step for all targets: a solve of about a second
_STATES = 500  # of a complete model that reads texts, with the logits of all of its rows
_AT_REST = 900 * 10**6  # bytes that Python, torch, transformers and two tokenizers hold


@dataclass(frozen=True)
class Solve:
    """One solve that a recipe needs.

    Attributes:
        donor: the model whose rows are approximated.
        base: the first model of the recipe with the vocabulary that is realigned.
        matrices: number of matrices of the donor: two if input embedding and LM head differ.
        targets: number of tokens to approximate.
        atoms: number of anchors.
        dim: hidden size of the donor.
        k: sparsity.
        memory_budget: memory limit of the solver in bytes, the lowest of all tensors; None for the default.
        seconds: estimated time for all matrices on this machine; None if not measured.
    """

    donor: str
    base: str
    matrices: int
    targets: int
    atoms: int
    dim: int
    k: int
    memory_budget: int | None = None
    seconds: float | None = None


def forecast(transplant: Transplant, *, measure: bool = True) -> dict[str, Any]:
    """Forecast a run of a recipe.

    Args:
        transplant: the resolved recipe.
        measure: whether to estimate seconds by solving a small random problem of the same shape.

    Returns:
        The forecast as ``mergekit-omp inspect --json`` prints it.
    """
    config, options = transplant.config, transplant.options
    offers = {model: _offers(model, transplant) for model in transplant.inputs}
    return {
        "merge_method": config.merge_method,
        "tokenizer_source": str(transplant.source),
        "tokens": len(transplant.vocabulary.tokens),
        "rows": transplant.rows,
        "device": str(options.device),
        "vocabularies": [_describe_vocabulary(model) for model in transplant.models],
        "inputs": [_describe_input(model, transplant, offers[model]) for model in transplant.inputs],
        **_costs(transplant, offers, 0 if measure else None),
    }


def expected_costs(transplant: Transplant) -> dict[str, Any]:
    """Return the keys ``approximations``, ``solves`` and ``estimate`` of :func:`forecast`.

    Solves that take about a second are not measured; their seconds are None, and count as none in the estimate.
    """
    offers = {model: _offers(model, transplant) for model in transplant.inputs}
    return _costs(transplant, offers, _WORTH_MEASURING)


def _costs(
    transplant: Transplant, offers: dict[RecipeModel, list[list[Offer]]], measured_from: int | None
) -> dict[str, Any]:
    """Describe the solves; those of at least so many products are measured, none where that is None."""
    found = settings_of(transplant.config, "approximation")
    approximations = list(dict.fromkeys(Approximation(name).value for name in found))
    solves = list(_solves(transplant, offers)) if Approximation.OMP.value in approximations else []
    if measured_from is not None:
        solves = [
            timed(solve, transplant.options.device)
            if solve.targets * solve.atoms * solve.dim >= measured_from
            else solve
            for solve in solves
        ]
    return {
        "approximations": approximations,
        "solves": [asdict(solve) for solve in solves],
        "estimate": {
            "solve_seconds": None if measured_from is None else sum(solve.seconds or 0 for solve in solves),
            "peak_memory_bytes": _peak_memory(transplant, solves),
            "output_bytes": _output_bytes(transplant),
        },
    }


def _describe_vocabulary(model: RecipeModel) -> dict[str, Any]:
    kinds = [token.kind for token in model.vocabulary.tokens.values()]
    return {
        "name": str(model),
        "tokens": len(model.vocabulary.tokens),
        "kinds": {kind.value: kinds.count(kind) for kind in TokenKind if kind in kinds},
        "numerals": numeral_scheme(model.tokenizer, model.vocabulary).value,
    }


def _offers(model: RecipeModel, transplant: Transplant) -> list[list[Offer]]:
    """Find rows that other models have for an input's new tokens; only local weights are compared."""
    LoaderCache().setup(transplant.options)
    settings = [
        OmpParameters(copy_rows=copy_rows, approximation=approximation)
        for copy_rows in settings_of(transplant.config, "copy_rows")
        for approximation in settings_of(transplant.config, "approximation")
    ]
    merged = [other.reference for other in transplant.inputs]
    return find_offers(model, VocabularyRole.INPUT, settings[0], merged, transplant, local_only=True)


def _describe_input(model: RecipeModel, transplant: Transplant, offers: list[list[Offer]]) -> dict[str, Any]:
    match = model.match
    output, vocabulary = transplant.vocabulary, model.vocabulary
    missing = (match.reasons == MatchReason.MISSING).nonzero().squeeze(1).tolist()
    reasons = [MatchReason(reason) for reason in match.reasons.tolist()]
    return {
        "name": str(model),
        "kept": int((match.rows >= 0).sum()),
        "lacking": int(match.is_new().sum()),
        "anchors": len(match.atoms()),
        "match": match_counts(match),
        "special_pairs": [
            {
                "output": output.tokens[id_].text,
                "model": vocabulary.tokens[int(match.rows[id_])].text,
                "reason": reason.name.lower().replace("_", " "),
            }
            for id_, reason in enumerate(reasons)
            if reason in (MatchReason.SPECIAL_RENAMED, MatchReason.SPECIAL_ROLE, MatchReason.SPECIAL_EQUIVALENT)
        ],
        "special_without_partner": [
            output.tokens[id_].text for id_, reason in enumerate(reasons) if reason is MatchReason.MISSING_SPECIAL
        ],
        "examples": [readable(output.tokens[id_]) for id_ in missing[:: max(1, len(missing) // EXAMPLES)][:EXAMPLES]],
        "copied": [
            {
                "model": str(offer.source),
                "tokens": offer.tokens,
                "similarity": offer.similarity,
                "copied": offer.copied,
            }
            for rank in offers
            for offer in rank
        ],
        "advice": warnings_for(model, transplant, set(copies_of(offers, transplant).ids(match).tolist())),
    }


def _solves(transplant: Transplant, offers: dict[RecipeModel, list[list[Offer]]]) -> Iterator[Solve]:
    """Yield a solve for every realigned vocabulary and every donor of its new tokens that are not copied."""
    config = transplant.config
    planned = {
        (posed, copies): posed.problem.without(copies.ids(model.match))
        for model in transplant.inputs
        for copies in [copies_of(offers[model], transplant)]
        for posed in transplant.problems[model.alignment]
    }
    for (posed, _), problem in planned.items():
        donor = posed.donor
        if not len(problem.target_ids) or donor.config is None:
            continue
        yield Solve(
            donor=str(donor),
            base=posed.base.name,
            matrices=1 if is_tied(donor.config) or is_tied(_config(transplant.base)) else 2,
            targets=len(problem.target_ids),
            atoms=len(problem.atom_ids),
            dim=hidden_size(donor.config) or 0,
            k=min(max(settings_of(config, "k")), len(problem.atom_ids)),
            memory_budget=min(map(_bytes, filter(None, settings_of(config, "memory_budget"))), default=None),
        )


def _bytes(memory_budget: int | str) -> int:
    return TypeAdapter(ByteSize).validate_python(memory_budget)


def timed(solve: Solve, device: str | None) -> Solve:
    """Return a solve with its estimated seconds on a device; those of an unknown width stay None.

    Times a few random targets, or with a Gram matrix one matrix product, and extrapolates.
    """
    if not solve.dim:
        return solve
    plan = _plan(solve, torch.device(device or "cpu"))
    if plan.method == "gram":
        seconds_on_all_cores = seconds_of_product(solve.dim) / torch.get_num_threads()
        return replace(solve, seconds=solve.matrices * plan.products * seconds_on_all_cores)
    numbers = _PROBE_NUMBERS_ON_CPU if torch.device(device or "cpu").type == "cpu" else _PROBE_NUMBERS
    atoms = max(solve.k, min(solve.atoms, numbers // solve.dim))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(atoms + _PROBE_TARGETS, solve.dim, generator=generator).to(device)

    def seconds(targets: int) -> float:
        started = time.perf_counter()
        solve_omp(rows[atoms : atoms + targets], rows[:atoms], solve.k)
        return time.perf_counter() - started

    with _quiet_solver():
        seconds(1)  # warm-up
        one, many = seconds(1), seconds(_PROBE_TARGETS)  # both include the same setup time
    per_target = max(0.0, many - one) / (_PROBE_TARGETS - 1)
    scale = solve.matrices * solve.atoms / atoms
    return replace(solve, seconds=(one + per_target * solve.targets) * scale)


@contextmanager
def _quiet_solver() -> Iterator[None]:
    """Leave the lines of a measurement out of the log, where they would look like those of the run."""
    log = logging.getLogger("mergekit_omp.solver")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)


def _plan(solve: Solve, device: torch.device) -> SolvePlan:
    shape = ProblemShape(solve.targets, solve.atoms, solve.dim, solve.k)
    return plan_solve(device, shape, memory_budget=solve.memory_budget)


def _peak_memory(transplant: Transplant, solves: list[Solve]) -> int:
    """Estimate peak memory in bytes: the donor's matrix, its anchors and targets in the solver, and the output.

    The rows are made after the solve. A complete model that a setting loads stands beside the donor's matrix.
    """
    complete = _complete_models(transplant)
    needs = [complete]
    regresses = Reconstruction.REGRESSION.value in settings_of(transplant.config, "reconstruction")
    width = max(hidden_size(_config(model)) or 0 for model in transplant.inputs)
    for solve in solves:
        donor = next(model for model in transplant.donors if str(model) == solve.donor)
        stored = _itemsize(_config(donor))
        matrix = _rows(donor) * solve.dim * stored
        gathered = (solve.atoms + solve.targets) * solve.dim * stored
        matrices = _plan(solve, torch.device(transplant.options.device or "cpu")).matrix_bytes
        solver = matrices + solve.targets * solve.k * 12
        regression = memory_of_regression(solve.atoms, solve.dim, width) if regresses else 0
        needs.append(matrix + max(gathered + max(solver, regression), complete))
    vocabulary = max(
        (_rows(model) + len(transplant.vocabulary.tokens)) * (hidden_size(_config(model)) or 0) * 4
        for model in transplant.inputs
    )
    shard = min(_output_bytes(transplant) or 0, transplant.options.out_shard_size)
    return _AT_REST + max(needs) + len(transplant.inputs) * vocabulary + shard


def _complete_models(transplant: Transplant) -> int:
    """Estimate the bytes of an input that a setting loads completely, and of what its head makes of texts."""
    reads = any(found != UnsafeTokens.KEEP for found in settings_of(transplant.config, "unsafe_tokens"))
    if not reads and Numerals.DIGITS not in settings_of(transplant.config, "numerals"):
        return 0
    needs = [0]
    for model in transplant.inputs:
        built = _built(model, transplant)
        weights = built.num_parameters() * _itemsize(_config(model)) if built else 0
        logits = 2 * _rows(model) + 3 * len(transplant.vocabulary.tokens) if reads else 0
        needs.append(weights + 4 * _STATES * logits)
    return max(needs)


def _output_bytes(transplant: Transplant) -> int | None:
    """Estimate the size of the output's weights from the base's config; None if transformers cannot build it."""
    base, config = _config(transplant.base), transplant.config
    dtype = dtype_from_name(config.out_dtype or config.dtype)
    model = _built(transplant.base, transplant)
    if model is None:
        return None
    old, width = model.get_input_embeddings().get_parameter("weight").shape
    matrices = 1 if is_tied(base) else 2
    numbers = model.num_parameters() + matrices * width * (transplant.rows - old)
    return numbers * (dtype.itemsize if dtype else _itemsize(base))


def _built(model: RecipeModel, transplant: Transplant) -> PreTrainedModel | None:
    """Return a model without its weights; None if transformers cannot build it."""
    try:
        return empty_model(_config(model), transplant.trust_remote_code)
    except Exception:  # arbitrary errors of a model's constructor
        return None


def _config(model: RecipeModel) -> PretrainedConfig:
    assert model.config is not None, "every input, and every donor of a solve, is a model"
    return model.config


def _rows(model: RecipeModel) -> int:
    assert model.rows is not None, "every input, and every donor of a solve, is a model"
    return model.rows


def _itemsize(config: PretrainedConfig) -> int:
    dtype = getattr(config, "dtype", None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 4
