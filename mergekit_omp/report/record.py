"""Record a transplant in ``omp_record.json`` and in a section of the model card.

The record is machine-readable; ``mergekit-omp report`` renders it as a page. Results of solves are added while their
codes are in memory. Everything is written once, after the model.
"""

import base64
import datetime
import functools
import json
import logging
import platform
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergekit_omp.checkpoints.architecture import vocabulary_role
from mergekit_omp.checkpoints.files import find_file
from mergekit_omp.errors import OmpError, cannot_write
from mergekit_omp.evaluation.bits_per_byte import builtin_texts
from mergekit_omp.parameters import OmpParameters
from mergekit_omp.realign.problem import Problem, Solution
from mergekit_omp.recipe.transplant import DonorProblem, RecipeModel, Transplant
from mergekit_omp.report.audit_text import NAMED, unsafe_sentence
from mergekit_omp.report.fingerprints import file_sha256, fingerprints
from mergekit_omp.report.samples import choose_samples, readable, with_neighbours
from mergekit_omp.report.warnings import warnings_for
from mergekit_omp.vocabulary.matching import VocabularyMatch
from mergekit_omp.vocabulary.numerals import numeral_scheme
from mergekit_omp.vocabulary.tokens import Vocabulary

LOG = logging.getLogger(__name__)

RECORD_FILE = "omp_record.json"
FORMAT = 1
TOKENIZER_FILES = ("tokenizer.json", "tekken.json", "tokenizer.model")
RESIDUAL_BINS = 40
MOST_USED = 30
PACKAGES = ("mergekit-omp", "mergekit", "torch", "transformers", "tokenizers", "safetensors")


class Origin(IntEnum):
    """Where an output row is from that is none of the input's rows: what ``origins`` of a record has in its place."""

    APPROXIMATED = -1
    COPIED = -2  # from another model
    OVERRIDDEN = -3  # by tokenizer.tokens of the recipe
    FREE = -4  # no token, or one that no text needs and no donor has: the mean of other rows


def never_fatal(step: Callable[..., None]) -> Callable[..., None]:
    """Log exceptions of a step instead of raising them: a failure of the record must not cost the model.

    Where files cannot be written, the exception is raised: what was written of them is not whole.
    """

    @functools.wraps(step)
    def attempt(*args: Any, **kwargs: Any) -> None:
        try:
            step(*args, **kwargs)
        except Exception as error:
            if cannot_write(error):
                raise
            LOG.warning("The model is complete, but the record of the run is not", exc_info=True)

    return attempt


class Record:
    """Results of a run, collected while it runs.

    Attributes:
        transplant: the resolved recipe.
        solves: descriptions of the solves, in the order in which they were planned.
        other_rows: descriptions of the problems of other initializers.
        tensors: descriptions of the realigned tensors of every input, with the indices of their solves.
        uncovered: ids of new tokens of each input that neither a donor nor an override has a row for.
        copied: ids of tokens of each input whose rows are copied from other models, in every tensor.
        unsafe: of each input whose approximated rows were checked, what was flagged and what became of it.
        token_checks: what is odd about the output tokenizer; counts, and the first tokens.
        is_complete: whether all results have been added.
    """

    def __init__(self, transplant: Transplant) -> None:
        self.transplant = transplant
        self.solves: list[dict[str, Any]] = []
        self.other_rows: list[dict[str, Any]] = []
        self.tensors: list[dict[str, Any]] = []
        self.uncovered: dict[RecipeModel, list[int]] = {}
        self.copied: dict[RecipeModel, set[int]] = {}
        self.unsafe: dict[RecipeModel, dict[str, Any]] = {}
        self.token_checks: dict[str, Any] = {}
        self.is_complete = False
        self._replaced: dict[RecipeModel, set[int]] = {}
        self._warnings: dict[RecipeModel, list[str]] = {}

    def warnings(self, model: RecipeModel) -> list[str]:
        """Return the warnings about an input, which are computed once."""
        if model not in self._warnings:
            self._warnings[model] = warnings_for(model, self.transplant, self.copied.get(model, ()))
            for found in self._unsafe_rows():
                if found["model"] == str(model) and found["flagged"]:
                    self._warnings[model].append(unsafe_sentence(found))
        return self._warnings[model]

    def add_solve(self, posed: DonorProblem, solution: Solution, **settings: Any) -> int:
        """Add a solve with its settings, and return its index."""
        described = _describe_solution(solution, self.transplant.vocabulary)
        self.solves.append(_describe_problem(posed, solution.problem) | settings | described)
        return len(self.solves) - 1

    def add_other_rows(self, posed: DonorProblem, problem: Problem) -> None:
        """Add a problem whose rows were not made from sparse codes."""
        self.other_rows.append(_describe_problem(posed, problem))

    def add_tensor(
        self,
        name: str,
        model: RecipeModel,
        parameters: OmpParameters,
        solves: Sequence[int],
        problems: Sequence[Problem],
        copied: Sequence[tuple[Sequence[RecipeModel], torch.Tensor]],
    ) -> None:
        """Add a realigned tensor of an input, and update the new tokens that no problem and no copy covers."""
        self.tensors.append(
            {
                "name": name,
                "side": vocabulary_role(name).value,
                "model": str(model),
                "parameters": parameters.model_dump(mode="json"),
                "solves": list(solves),
                "copied": [{"from": [str(source) for source in rank], "tokens": len(ids)} for rank, ids in copied],
            }
        )
        copied_ids = {id_ for _, ids in copied for id_ in ids.tolist()}
        self.copied[model] = copied_ids & self.copied.get(model, copied_ids)
        replaced = self._replaced.setdefault(model, set())
        replaced |= copied_ids
        uncovered = model.match.is_new()
        for problem in problems:
            replaced |= set(problem.target_ids.tolist())
            uncovered[problem.target_ids] = False
            uncovered[problem.untrained_ids] = False
        uncovered[list(copied_ids)] = False
        tokens, overridden = self.transplant.vocabulary.tokens, self.transplant.overridden
        ids = uncovered.nonzero().squeeze(1).tolist()
        self.uncovered[model] = [id_ for id_ in ids if tokens[id_].text not in overridden]

    def add_unsafe(
        self, model: RecipeModel, parameters: OmpParameters, checked: int, flagged: Iterable[Mapping[str, Any]]
    ) -> None:
        """Add what a check of an input's approximated rows found; of a token that is flagged twice, the reasons.

        Args:
            model: the input.
            parameters: its parameters.
            checked: how many tokens there are.
            flagged: ``id``, ``token`` and ``reasons`` of suspicious rows, worst first.
        """
        how = parameters.unsafe_tokens.value
        found = self.unsafe.setdefault(model, {"model": str(model), "unsafe_tokens": how, "checked": 0, "flagged": {}})
        found["checked"] = max(found["checked"], checked)
        for row in flagged:
            known = found["flagged"].setdefault(row["id"], {**row, "reasons": []})
            known["reasons"] += [reason for reason in row["reasons"] if reason not in known["reasons"]]

    def _unsafe_rows(self) -> list[dict[str, Any]]:
        """Return what was found of each input, with the worst rows."""
        return [
            {**found, "flagged": len(found["flagged"]), "worst": [*found["flagged"].values()][:NAMED]}
            for found in self.unsafe.values()
        ]

    def origins(self, model: RecipeModel) -> torch.Tensor:
        """Return the row of an input that each output row is, int64 (V,), or an ``Origin`` where it is none."""
        kept, copied = model.match.rows, self.copied.get(model, set())
        overrides = {token: given for token, given in self.transplant.overrides.items() if given.source is not None}
        rows = torch.full((self.transplant.rows,), Origin.FREE, dtype=torch.int64)
        rows[: len(kept)] = kept.where(kept >= 0, Origin.FREE)
        rows[sorted(self._replaced.get(model, set()) - copied)] = Origin.APPROXIMATED
        rows[sorted(copied)] = Origin.COPIED
        for id_, token in self.transplant.vocabulary.tokens.items() if overrides else ():
            if token.text in overrides and (overrides[token.text].force or kept[id_] < 0):
                rows[id_] = Origin.OVERRIDDEN
        return rows

    @never_fatal
    def write(self, folder: Path, seconds: float) -> None:
        """Write a complete record, and a section of the model card if mergekit has written one.

        Args:
            folder: folder of the finished model.
            seconds: duration of the run.
        """
        if not self.is_complete:
            return  # the failure has been logged
        record = self._complete(folder, seconds)
        write_record(folder, record)
        card = folder / "README.md"
        if card.exists():
            card.write_text(card.read_text(encoding="utf-8") + "\n" + card_section(record), encoding="utf-8")

    def _complete(self, folder: Path, seconds: float) -> dict[str, Any]:
        transplant = self.transplant
        return {
            "format": FORMAT,
            "solves": self.solves,
            "other_rows": self.other_rows,
            "tensors": self.tensors,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "merge_method": transplant.config.merge_method,
            "tokenizer_source": str(transplant.source),
            "tokens": len(transplant.vocabulary.tokens),
            "rows": transplant.rows,
            "models": [_describe_model(model, self) for model in transplant.models],
            "texts": _measure_texts(transplant),
            "audit": {
                **self.token_checks,
                "free_rows": transplant.rows - len(transplant.vocabulary.tokens),
                "rows": self._unsafe_rows(),
            },
            "versions": versions(),
            "machine": {
                "device": str(transplant.options.device),
                "threads": torch.get_num_threads(),
                "system": platform.platform(),
            },
            "seconds": round(seconds, 2),
            "peak_memory_bytes": peak_memory(),
            "sha256": fingerprints(folder, [tensor["name"] for tensor in self.tensors]),
            "samples": with_neighbours(self.tensors, self.solves, folder, transplant),
        }


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write a record beside a model."""
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    (folder / RECORD_FILE).write_text(text, encoding="utf-8", errors="backslashreplace")


def read_record(folder: str | Path, *, of_merge: bool = True) -> dict[str, Any]:
    """Read the record of a model.

    Args:
        folder: the model's.
        of_merge: whether the record must describe a merge; ``heal`` writes one that does not for a model without one.

    Raises:
        OmpError: if there is no record, or it is incomplete or of another version.
    """
    path = Path(folder) / RECORD_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OmpError(
            f"{folder} has no {RECORD_FILE}; name the output folder of a merge with merge_method: omp."
        ) from error
    except ValueError as error:
        raise OmpError(f"{path} is not valid JSON ({error}); make the model again.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise OmpError(f"{path} is of another version of mergekit-omp; make the model again or use that version.")
    if "heal" in record and "models" not in record:
        if not of_merge:
            return record
        raise OmpError(
            f"{path} describes a healing and no merge, since the healed model had no record; name the output folder "
            "of a merge with merge_method: omp."
        )
    if "samples" not in record:
        raise OmpError(f"{path} is incomplete (the log of that run has the reason); make the model again.")
    return record


def base_of(record: Mapping[str, Any]) -> str:
    """Return the name of the first model that was merged, whose body and configuration the output has.

    If the record describes no merge, return the base that the model was healed against.
    """
    if "models" not in record:
        return record["heal"]["base"]
    return next(model["name"] for model in record["models"] if "input" in model["roles"])


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect the result."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}


def peak_memory() -> int | None:
    """Return the peak memory of this process in bytes; None if the system does not report it."""
    if sys.platform == "win32":
        return None
    status = Path("/proc/self/status")  # Linux, where ru_maxrss is at least that of the process that started this one
    if status.exists() and (found := re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)):
        return int(found.group(1)) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def pack_rows(rows: torch.Tensor) -> str:
    """Row numbers as a short string: 32-bit little-endian integers, compressed by zlib, in base 64."""
    return base64.b64encode(zlib.compress(rows.numpy().astype("<i4").tobytes(), 9)).decode()


def unpack_rows(packed: str) -> torch.Tensor:
    """Return the rows, int64 (V,), of :func:`pack_rows`."""
    data = np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype="<i4")
    return torch.from_numpy(data.astype(np.int64))


def match_counts(match: VocabularyMatch) -> dict[str, int]:
    """Return the number of output tokens by reason, in words."""
    return {reason.name.lower().replace("_", " "): count for reason, count in match.counts().items()}


def card_section(record: Mapping[str, Any]) -> str:
    """Return Markdown on kept and approximated rows for the end of a model card."""
    lines = ["### Tokenizer transplantation", ""]
    for model in record["models"]:
        if "input" in model["roles"]:
            lines.append(
                f"* {model['name']}: of {record['tokens']:,} tokens {model['kept']:,} keep their rows and "
                f"{model['lacking']:,} are new."
            )
    for solve in record["solves"]:
        lines.append(
            f"* {solve['targets']:,} tokens were approximated with at most {solve['k']} of {solve['atoms']:,} "
            f"anchors each, in {solve['tensor']} of {solve['donor']}; "
            f"the mean relative residual is {solve['residuals']['mean']:.3f}."
        )
    for tensor in record["tensors"]:
        approximation = tensor["parameters"]["approximation"]
        lines += [f"* {sentence}." for sentence in copied_rows(tensor)]
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
        "`mergekit-omp report <this folder>` renders them as a page.",
    ]
    return "\n".join(lines) + "\n"


def copied_rows(tensor: Mapping[str, Any]) -> list[str]:
    """Describe the copied rows of a tensor of a record."""
    return [
        f"{tensor['name']} of {tensor['model']}: {copied['tokens']:,} rows copied from {' and '.join(copied['from'])}"
        for copied in tensor.get("copied", ())
    ]


def _describe_problem(posed: DonorProblem, problem: Problem) -> dict[str, Any]:
    return {
        "donor": str(posed.donor),
        "base": posed.base.name,
        "targets": len(problem.target_ids),
        "atoms": len(problem.atom_ids),
    }


def _describe_solution(solution: Solution, vocabulary: Vocabulary) -> dict[str, Any]:
    codes, problem = solution.codes, solution.problem
    used = torch.bincount(codes.indices[codes.indices >= 0], minlength=len(problem.atom_ids))
    order = used.argsort(descending=True, stable=True)[:MOST_USED].tolist()
    tokens = [vocabulary.tokens[int(problem.atom_ids[atom])] for atom in order]
    return {
        "seconds": round(solution.seconds, 2),
        "residuals": _describe_residuals(codes.relative_residuals),
        "usage": {
            "never": int((used == 0).sum()),
            "counts": _histogram(used.sort(descending=True).values.tolist()),
            "most_used": [
                {"token": readable(token), "count": int(used[atom])} for token, atom in zip(tokens, order, strict=True)
            ],
        },
        "samples": choose_samples(solution, vocabulary),
        "tokens": [
            [id_, round(residual, 4)]
            for id_, residual in zip(problem.target_ids.tolist(), codes.relative_residuals.tolist(), strict=True)
        ],
    }


def _describe_residuals(residuals: torch.Tensor) -> dict[str, Any]:
    """Summarise relative residuals, with a histogram over [0, 1]."""
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
    """Count the anchors that are used 1, 2–3, 4–7, … times."""
    bins: dict[int, int] = {}
    for count in sorted_counts:
        if count:
            bins[count.bit_length() - 1] = bins.get(count.bit_length() - 1, 0) + 1
    return [{"from": 2**power, "to": 2 ** (power + 1) - 1, "anchors": bins[power]} for power in sorted(bins)]


def _describe_model(model: RecipeModel, record: Record) -> dict[str, Any]:
    transplant = record.transplant
    is_input, is_donor = model in transplant.inputs, model in transplant.donors
    described: dict[str, Any] = {
        "name": str(model),
        "revision": getattr(model.config, "_commit_hash", None) or model.reference.model.revision,
        "roles": [*(["input"] if is_input else []), *(["donor"] if is_donor else [])],
        "tokens": len(model.vocabulary.tokens),
        "vocabulary_sha256": model.vocabulary.fingerprint,
        "tokenizer_sha256": _tokenizer_sha256(model),
        "numerals": numeral_scheme(model.tokenizer, model.vocabulary).value,
    }
    if is_input:
        described |= {
            "kept": int((model.match.rows >= 0).sum()),
            "lacking": int(model.match.is_new().sum()),
            "anchors": len(model.match.atoms()),
            "match": match_counts(model.match),
            "advice": record.warnings(model),
            "origins": pack_rows(record.origins(model)),
        }
    return described


def _tokenizer_sha256(model: RecipeModel) -> str | None:
    """Return the SHA-256 of the file that a model's tokenizer is read from; None if it has no single file."""
    found = (find_file(model.reference, name) for name in TOKENIZER_FILES)
    path = next((path for path in found if path is not None), None)
    return None if path is None else file_sha256(path)


def _measure_texts(transplant: Transplant) -> list[dict[str, Any]]:
    """Measure tokens per byte of the built-in texts, before and after."""
    tokenizers, measured = (transplant.base.tokenizer, transplant.tokenizer), []
    for name, text in builtin_texts().items():
        size = len(text.encode())
        counts = [len(tokenizer(text, add_special_tokens=False).input_ids) for tokenizer in tokenizers]
        measured.append({"name": name, "bytes": size, "before": counts[0] / size, "after": counts[1] / size})
    return measured
