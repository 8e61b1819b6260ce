"""What a recipe would do, found out before anything is computed: it needs tokenizers and configs, and no weights."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_omp.checkpoints.architecture import hidden_size, vocabulary_size
from mergekit_omp.checkpoints.tokenizers import (
    OutputTokenizer,
    match_of,
    output_vocabulary,
    tokenizer_of,
    vocabulary_of,
)
from mergekit_omp.parameters import Approximation, OmpParameters
from mergekit_omp.realign.rows import lacking, pose_problem
from mergekit_omp.recipe.checks import check_recipe, settings_of
from mergekit_omp.report.record import match_counts
from mergekit_omp.report.samples import readable
from mergekit_omp.report.warnings import advice
from mergekit_omp.solver import solve_omp
from mergekit_omp.solver.dispatch import SolvePlan, plan_solve
from mergekit_omp.solver.memory import ProblemShape
from mergekit_omp.vocabulary.matching import MatchReason
from mergekit_omp.vocabulary.numerals import numeral_scheme
from mergekit_omp.vocabulary.tokens import TokenKind

EXAMPLES = 24
_PROBE_TARGETS = 128
_PROBE_NUMBERS = 2**25  # 128 MB of float32
_AT_REST = 900 * 10**6  # bytes that Python, torch, transformers and two tokenizers hold


@dataclass(frozen=True)
class Solve:
    """One solve that a recipe needs.

    Attributes:
        donor: the model whose rows are approximated.
        base: the first model of the recipe with the vocabulary that is realigned.
        matrices: how many matrices of the donor are solved for: two where input embedding and LM head differ.
        targets: tokens to approximate.
        atoms: anchors to approximate them with.
        dim: width of the donor.
        k: sparsity.
        memory_budget: bytes that the solver may take, the least that a tensor asks for; None for its default.
        seconds: an estimate for all of its matrices on this machine; None where it was not asked for.
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


def inspect_recipe(config: MergeConfiguration, options: MergeOptions, *, measure: bool = True) -> dict[str, Any]:
    """Describe what a recipe would do.

    Args:
        config: a recipe of ours.
        options: mergekit's; ``device`` and ``trust_remote_code`` matter here.
        measure: estimate seconds, by solving a small random problem of the same shape.

    Returns:
        What ``mergekit-omp inspect --json`` prints.

    Raises:
        OmpError: for whatever would stop the recipe before it starts.
    """
    output = check_recipe(config, options)
    approximations = list(dict.fromkeys(Approximation(each).value for each in settings_of(config, "approximation")))
    needed = _solves(config, output) if Approximation.OMP.value in approximations else ()
    solves = [_timed(solve, options.device) if measure else solve for solve in needed]
    return {
        "merge_method": config.merge_method,
        "tokenizer_source": str(output.tokenizer_source),
        "tokens": len(output_vocabulary(output).tokens),
        "device": str(options.device),
        "approximations": approximations,
        "vocabularies": [_describe_vocabulary(model, output) for model in _all_models(output)],
        "inputs": [_describe_input(model, output) for model in output.referenced_models],
        "solves": [asdict(solve) for solve in solves],
        "estimate": {
            "solve_seconds": sum(solve.seconds or 0 for solve in solves) if measure else None,
            "peak_memory_bytes": _peak_memory(config, output, options, solves),
            "output_bytes": _output_bytes(config, output),
        },
    }


def describe(found: dict[str, Any]) -> str:
    """What ``mergekit-omp inspect`` prints."""
    lines = [f"{found['merge_method']}, with the tokenizer of {found['tokenizer_source']}", "", "Vocabularies"]
    for each in found["vocabularies"]:
        lines.append(f"  {each['name']}: {each['tokens']:,} tokens; numbers as {each['numerals']}")
    for each in found["inputs"]:
        lines += ["", *_describe_input_lines(each, found["tokens"])]
    lines += ["", "Solves"]
    for solve in found["solves"]:
        seconds = "" if solve["seconds"] is None else f", about {_duration(solve['seconds'])}"
        twice = " for the input embedding and again for the LM head" if solve["matrices"] == 2 else ""
        lines.append(
            f"  {solve['targets']:,} tokens of {solve['donor']} from {solve['atoms']:,} anchors, "
            f"k = {solve['k']}{twice}{seconds}"
        )
    others = [name for name in found["approximations"] if name != Approximation.OMP.value]
    if others:
        lines.append(f"  none where the rows of new tokens are made by {' or '.join(others)}")
    elif not found["solves"]:
        lines.append("  none: nothing is lacking")
    estimate = found["estimate"]
    lines += ["", f"Estimates for {found['device']}"]
    if estimate["solve_seconds"] is not None:
        lines.append(f"  time to solve   {_duration(estimate['solve_seconds'])}")
    lines.append(f"  peak memory     {_size(estimate['peak_memory_bytes'])}")
    lines.append(f"  disk            {_size(estimate['output_bytes'])}")
    return "\n".join(lines)


def _describe_input_lines(each: dict[str, Any], tokens: int) -> list[str]:
    lines = [
        each["name"],
        f"  {each['kept']:,} of {tokens:,} tokens keep a row of this model, {each['lacking']:,} are lacking",
        *(f"  {count:>9,}  {reason}" for reason, count in each["match"].items()),
    ]
    if each["special_pairs"]:
        lines.append("  special tokens that pair (output: model)")
        lines += [f"    {pair['output']}: {pair['model']}  ({pair['reason']})" for pair in each["special_pairs"]]
    if each["special_without_partner"]:
        lines.append(f"  special tokens without a partner: {' '.join(each['special_without_partner'])}")
    if each["examples"]:
        lines.append(f"  to be approximated, for example: {'  '.join(each['examples'])}")
    return [*lines, *(f"  Note: {sentence}" for sentence in each["advice"])]


def _all_models(output: OutputTokenizer) -> list[ModelReference]:
    return list(dict.fromkeys((*output.referenced_models, *output.donors())))


def _describe_vocabulary(model: ModelReference, output: OutputTokenizer) -> dict[str, Any]:
    vocabulary = vocabulary_of(model, output.trust_remote_code)
    kinds = [token.kind for token in vocabulary.tokens.values()]
    return {
        "name": str(model),
        "tokens": len(vocabulary.tokens),
        "kinds": {kind.value: kinds.count(kind) for kind in TokenKind if kind in kinds},
        "numerals": numeral_scheme(tokenizer_of(model, output.trust_remote_code), vocabulary).value,
    }


def _describe_input(model: ModelReference, output: OutputTokenizer) -> dict[str, Any]:
    match = match_of(output, model)
    ours, its = output_vocabulary(output), vocabulary_of(model, output.trust_remote_code)
    missing = (match.reasons == MatchReason.MISSING).nonzero().squeeze(1).tolist()
    reasons = [MatchReason(reason) for reason in match.reasons.tolist()]
    return {
        "name": str(model),
        "kept": int((match.rows >= 0).sum()),
        "lacking": int(lacking(match).sum()),
        "anchors": len(match.atoms()),
        "match": match_counts(match),
        "special_pairs": [
            {
                "output": ours.tokens[id_].text,
                "model": its.tokens[int(match.rows[id_])].text,
                "reason": reason.name.lower().replace("_", " "),
            }
            for id_, reason in enumerate(reasons)
            if reason in (MatchReason.SPECIAL_ROLE, MatchReason.SPECIAL_EQUIVALENT)
        ],
        "special_without_partner": [
            ours.tokens[id_].text for id_, reason in enumerate(reasons) if reason is MatchReason.MISSING_SPECIAL
        ],
        "examples": [readable(ours.tokens[id_]) for id_ in missing[:: max(1, len(missing) // EXAMPLES)][:EXAMPLES]],
        "advice": advice(output, model),
    }


def _solves(config: MergeConfiguration, output: OutputTokenizer) -> Iterator[Solve]:
    """One for every vocabulary that is realigned and every donor that has what it lacks, as in planning."""
    trust = output.trust_remote_code
    seen = set()
    for model in output.referenced_models:
        vocabulary = vocabulary_of(model, trust)
        if vocabulary in seen:
            continue
        seen.add(vocabulary)
        earlier = []
        for donor in output.donors():
            match = match_of(output, donor)
            problem = pose_problem(match_of(output, model), match, earlier)
            earlier.append(match)
            if not len(problem.target_ids):
                continue
            donor_config = donor.config(trust_remote_code=trust)
            yield Solve(
                donor=str(donor),
                base=str(model),
                matrices=1 if _tied(donor_config) or _tied(output.base().config(trust_remote_code=trust)) else 2,
                targets=len(problem.target_ids),
                atoms=len(problem.atom_ids),
                dim=hidden_size(donor_config) or 0,
                k=min(max(settings_of(config, "k")), len(problem.atom_ids)),
                memory_budget=min(map(_bytes, filter(None, settings_of(config, "memory_budget"))), default=None),
            )


def _bytes(memory_budget: int | str) -> int:
    return OmpParameters(memory_budget=memory_budget).memory_budget


def _tied(config: PretrainedConfig) -> bool:
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def _timed(solve: Solve, device: str | None) -> Solve:
    """Measure a few random targets against as many random atoms as is quick, and scale up."""
    if not solve.dim:
        return solve
    atoms = max(solve.k, min(solve.atoms, _PROBE_NUMBERS // solve.dim))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(atoms + _PROBE_TARGETS, solve.dim, generator=generator).to(device)

    def seconds(targets: int) -> float:
        begun = time.perf_counter()
        solve_omp(rows[atoms : atoms + targets], rows[:atoms], solve.k)
        return time.perf_counter() - begun

    seconds(1)  # to warm up
    alone, together = seconds(1), seconds(_PROBE_TARGETS)  # to set up takes as long for one as for many
    each = max(0.0, together - alone) / (_PROBE_TARGETS - 1)
    # The probe is too small for a Gram matrix.
    scale = solve.matrices * solve.atoms / atoms / _plan(solve, rows.device).speedup
    return Solve(**asdict(solve) | {"seconds": (alone + each * solve.targets) * scale})


def _plan(solve: Solve, device: torch.device) -> SolvePlan:
    shape = ProblemShape(solve.targets, solve.atoms, solve.dim, solve.k)
    return plan_solve(device, shape, memory_budget=solve.memory_budget)


def _peak_memory(
    config: MergeConfiguration, output: OutputTokenizer, options: MergeOptions, solves: list[Solve]
) -> int:
    """Bytes: the donor's rows once as stored, and its anchors and targets as the solver holds them; or the output."""
    needs = [0]
    for solve in solves:
        donor = next(model for model in output.donors() if str(model) == solve.donor)
        stored = _itemsize(donor.config(trust_remote_code=options.trust_remote_code))
        matrix = vocabulary_size(donor, options.trust_remote_code) * solve.dim * stored
        gathered = (solve.atoms + solve.targets) * solve.dim * stored
        matrices = _plan(solve, torch.device(options.device or "cpu")).matrix_bytes
        solver = matrices + solve.targets * solve.k * 12
        needs.append(matrix + gathered + solver)
    vocabulary = max(
        (vocabulary_size(model, options.trust_remote_code) + len(output_vocabulary(output).tokens))
        * (hidden_size(model.config(trust_remote_code=options.trust_remote_code)) or 0)
        * 4
        for model in output.referenced_models
    )
    shard = min(_output_bytes(config, output) or 0, options.out_shard_size)
    return _AT_REST + max(needs) + len(output.referenced_models) * vocabulary + shard


def _output_bytes(config: MergeConfiguration, output: OutputTokenizer) -> int | None:
    """Bytes of the output's weights, from the base's config alone; None where transformers cannot build it."""
    base = output.base().config(trust_remote_code=output.trust_remote_code)
    dtype = dtype_from_name(config.out_dtype or config.dtype)
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(base, trust_remote_code=output.trust_remote_code)
    except Exception:  # whatever a model's constructor raises
        return None
    old, width = model.get_input_embeddings().weight.shape
    matrices = 1 if _tied(base) else 2
    numbers = model.num_parameters() + matrices * width * (output_vocabulary(output).size - old)
    return numbers * (dtype.itemsize if dtype else _itemsize(base))


def _itemsize(config: PretrainedConfig) -> int:
    dtype = getattr(config, "dtype", None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 4


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
