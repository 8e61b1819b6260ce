"""An account of a transplant beside the model that it made: ``omp_record.json``, and a section of the model card.

The record is for machines; ``mergekit-omp report`` makes a page of it. It is begun when the solves are done, while
their codes are at hand, and completed when the model is written.
"""

import datetime
import functools
import json
import logging
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from transformers import AutoTokenizer

from mergekit_omp.checkpoints.architecture import vocabulary_role
from mergekit_omp.checkpoints.files import is_tokenizer_alone
from mergekit_omp.checkpoints.tokenizers import (
    OutputTokenizer,
    match_of,
    output_vocabulary,
    tokenizer_of,
    vocabulary_of,
)
from mergekit_omp.errors import OmpError
from mergekit_omp.evaluation.bits_per_byte import builtin_texts
from mergekit_omp.realign.rows import Problem, Solution, lacking
from mergekit_omp.report.samples import choose_samples, readable, with_neighbours
from mergekit_omp.report.warnings import advice
from mergekit_omp.vocabulary.matching import VocabularyMatch
from mergekit_omp.vocabulary.numerals import numeral_scheme

if TYPE_CHECKING:
    from mergekit_omp.tasks.tasks import PoseProblem, RealignVocabulary, SolveCodes

LOG = logging.getLogger(__name__)

RECORD_FILE = "omp_record.json"
FORMAT = 1
RESIDUAL_BINS = 40
MOST_USED = 30
PACKAGES = ("mergekit-omp", "mergekit", "torch", "transformers", "tokenizers", "safetensors")


def never_fatal(step: Callable[..., None]) -> Callable[..., None]:
    """Log what goes wrong in a step, and no more: an account of a model must not cost the model."""

    @functools.wraps(step)
    def attempt(*args: Any, **kwargs: Any) -> None:
        try:
            step(*args, **kwargs)
        except Exception:
            LOG.warning("The model is not affected, but the record of how it was made is incomplete", exc_info=True)

    return attempt


@never_fatal
def begin_record(
    folder: Path,
    realigned: Sequence["RealignVocabulary"],
    solutions: Mapping["SolveCodes", Solution],
    problems: Mapping["PoseProblem", Problem],
) -> None:
    """Write what the solves were and how well they went, and what other methods made rows for."""
    solves = list(solutions)
    record = {
        "format": FORMAT,
        "solves": [_describe_solve(solve, solutions[solve]) for solve in solves],
        "other_rows": [_describe_problem(pose, problem) for pose, problem in problems.items()],
        "tensors": [
            {
                "name": task.name,
                "side": vocabulary_role(task.name).value,
                "model": str(each.model),
                "parameters": each.parameters.model_dump(mode="json"),
                "solves": [solves.index(solve) for solve in each.solves],
            }
            for task in realigned
            for each in task.inputs
        ],
    }
    write_record(folder, record)


@never_fatal
def complete_record(
    folder: Path, config: MergeConfiguration, output: OutputTokenizer, options: MergeOptions, seconds: float
) -> None:
    """Add everything else to a record and, where mergekit has written one, a section to the model card."""
    record = read_record(folder)
    record |= {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "merge_method": config.merge_method,
        "tokenizer_source": str(output.tokenizer_source),
        "tokens": len(output_vocabulary(output).tokens),
        "models": [_describe_model(model, output) for model in _all_models(output)],
        "texts": _measure_texts(folder, output),
        "versions": versions(),
        "machine": {
            "device": str(options.device),
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
        },
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak_memory(),
    }
    record["samples"] = with_neighbours(record, folder, output, options)
    write_record(folder, record)
    card = folder / "README.md"
    if card.exists():
        card.write_text(card.read_text(encoding="utf-8") + "\n" + card_section(record), encoding="utf-8")


def read_record(folder: str | Path) -> dict[str, Any]:
    """The record beside a model.

    Raises:
        OmpError: where there is none, or one that this version cannot read.
    """
    path = Path(folder) / RECORD_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OmpError(
            f"{folder}: there is no {RECORD_FILE} in it; name the output folder of a merge with merge_method: omp."
        ) from error
    except ValueError as error:
        raise OmpError(f"{path} is no JSON ({error}); make the model again.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise OmpError(f"{path} is of another version of mergekit-omp; make the model again or use that version.")
    return record


def read_complete_record(folder: str | Path) -> dict[str, Any]:
    """The record beside a model, where it is complete.

    Raises:
        OmpError: as :func:`read_record` does, and where what went wrong in the run has left it incomplete.
    """
    record = read_record(folder)
    if "samples" not in record:
        raise OmpError(
            f"{Path(folder) / RECORD_FILE} is incomplete, as the log of that run tells; make the model again."
        )
    return record


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write a record into a model's folder."""
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    (folder / RECORD_FILE).write_text(text, encoding="utf-8", errors="backslashreplace")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that have a part in the result."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}


def peak_memory() -> int | None:
    """The most bytes of memory that this process held; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def match_counts(match: VocabularyMatch) -> dict[str, int]:
    """How many output tokens there are of each reason, in words."""
    return {reason.name.lower().replace("_", " "): count for reason, count in match.counts().items()}


def revision_of(model: ModelReference, trust_remote_code: bool) -> str | None:
    """The commit of a model on the hub; None for a folder."""
    if is_tokenizer_alone(model):
        return model.model.revision
    config = model.config(trust_remote_code=trust_remote_code)
    return getattr(config, "_commit_hash", None) or model.model.revision


def card_section(record: Mapping[str, Any]) -> str:
    """Markdown on what was kept, what was approximated and how well, for the end of a model card."""
    lines = ["### Tokenizer transplantation", ""]
    for model in record["models"]:
        if "input" in model["roles"]:
            lines.append(
                f"* {model['name']}: of {record['tokens']:,} tokens {model['kept']:,} kept their rows and "
                f"{model['lacking']:,} were lacking."
            )
    for solve in record["solves"]:
        lines.append(
            f"* {solve['targets']:,} tokens were approximated with at most {solve['k']} of {solve['atoms']:,} shared "
            f"ones each, in {solve['tensor']} of {solve['donor']}; "
            f"the mean relative residual is {solve['residuals']['mean']:.3f}."
        )
    for tensor in record["tensors"]:
        approximation = tensor["parameters"]["approximation"]
        if approximation != "omp":
            lines.append(f"* {tensor['name']} of {tensor['model']}: new rows by `approximation: {approximation}`.")
    lines += ["", "| text | tokens/byte before | after |", "|---|---|---|"]
    lines += [f"| {text['name']} | {text['before']:.3f} | {text['after']:.3f} |" for text in record["texts"]]
    advised = [sentence for model in record["models"] for sentence in model.get("advice", ())]
    if advised:
        lines += ["", *(f"> {sentence}" for sentence in advised)]
    lines += [
        "",
        f"Made with mergekit-omp {record['versions']['mergekit-omp']}; `{RECORD_FILE}` has the details, and "
        "`mergekit-omp report <this folder>` makes a page of them.",
    ]
    return "\n".join(lines) + "\n"


def _describe_solve(solve: "SolveCodes", solution: Solution) -> dict[str, Any]:
    codes, problem = solution.codes, solution.problem
    vocabulary = output_vocabulary(solve.pose.base.output)
    tokens = vocabulary.tokens
    used = torch.bincount(codes.indices[codes.indices >= 0], minlength=len(problem.atom_ids))
    order = used.argsort(descending=True, stable=True)[:MOST_USED].tolist()
    return {
        **_describe_problem(solve.pose, problem),
        "tensor": solve.donor_weight.tensor,
        "vocabulary_axis": solve.vocabulary_axis,
        "k": solve.k,
        "normalize_atoms": solve.normalize_atoms,
        "seconds": round(solution.seconds, 2),
        "residuals": _describe_residuals(codes.relative_residuals),
        "usage": {
            "never": int((used == 0).sum()),
            "counts": _histogram(used.sort(descending=True).values.tolist()),
            "most_used": [
                {"token": readable(tokens[int(problem.atom_ids[atom])]), "count": int(used[atom])} for atom in order
            ],
        },
        "samples": choose_samples(solution, vocabulary),
        "tokens": [
            [id_, round(residual, 4)]
            for id_, residual in zip(problem.target_ids.tolist(), codes.relative_residuals.tolist(), strict=True)
        ],
    }


def _describe_problem(pose: "PoseProblem", problem: Problem) -> dict[str, Any]:
    return {
        "donor": str(pose.donors[-1].model),
        "base": str(pose.base.model),
        "targets": len(problem.target_ids),
        "atoms": len(problem.atom_ids),
    }


def _describe_residuals(residuals: torch.Tensor) -> dict[str, Any]:
    """A histogram over [0, 1] of relative residuals, with a few numbers."""
    if not len(residuals):
        return {"mean": 0.0, "median": 0.0, "p95": 0.0, "edges": [0.0, 1.0], "counts": [0]}
    values = residuals.double()
    counts, edges = torch.histogram(values.clamp(0, 1), RESIDUAL_BINS, range=(0.0, 1.0))
    return {
        "mean": float(values.mean()),
        "median": float(values.median()),
        "p95": float(values.quantile(0.95)) if len(values) < 2**24 else float(values.max()),
        "edges": [round(edge, 4) for edge in edges.tolist()],
        "counts": [int(count) for count in counts],
    }


def _histogram(sorted_counts: list[int]) -> list[dict[str, int]]:
    """How many anchors are used 1, 2–3, 4–7, … times."""
    bins: dict[int, int] = {}
    for count in sorted_counts:
        if count:
            bins[count.bit_length() - 1] = bins.get(count.bit_length() - 1, 0) + 1
    return [{"from": 2**power, "to": 2 ** (power + 1) - 1, "anchors": bins[power]} for power in sorted(bins)]


def _all_models(output: OutputTokenizer) -> list[ModelReference]:
    return list(dict.fromkeys((*output.referenced_models, *output.donors())))


def _describe_model(model: ModelReference, output: OutputTokenizer) -> dict[str, Any]:
    trust = output.trust_remote_code
    vocabulary, match = vocabulary_of(model, trust), match_of(output, model)
    described: dict[str, Any] = {
        "name": str(model),
        "revision": revision_of(model, trust),
        "roles": [
            *(["input"] if model in output.referenced_models else []),
            *(["donor"] if model in output.donors() else []),
        ],
        "tokens": len(vocabulary.tokens),
        "vocabulary_sha256": vocabulary.fingerprint,
        "numerals": numeral_scheme(tokenizer_of(model, trust), vocabulary).value,
    }
    if model in output.referenced_models:
        described |= {
            "kept": int((match.rows >= 0).sum()),
            "lacking": int(lacking(match).sum()),
            "anchors": len(match.atoms()),
            "match": match_counts(match),
            "advice": advice(output, model),
        }
    return described


def _measure_texts(folder: Path, output: OutputTokenizer) -> list[dict[str, Any]]:
    """Tokens per byte of the built-in texts, before and after."""
    before, after = tokenizer_of(output.base(), output.trust_remote_code), AutoTokenizer.from_pretrained(folder)
    measured = []
    for name, text in builtin_texts().items():
        size = len(text.encode())
        counts = [len(tokenizer(text, add_special_tokens=False).input_ids) for tokenizer in (before, after)]
        measured.append({"name": name, "bytes": size, "before": counts[0] / size, "after": counts[1] / size})
    return measured
