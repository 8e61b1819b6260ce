"""The tasks that stand between loading the inputs of a vocabulary tensor and merging them.

Each is a frozen mergekit ``Task``, so that the graph's own equality removes repeated work: input embedding and LM head
of a donor with tied embeddings share one solve, and so do all inputs of one vocabulary.
"""

import logging
import time
from pathlib import Path
from typing import Any

import torch
import tqdm
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors
from mergekit.tokenizer.config import TokenEmbeddingConfig
from pydantic import BaseModel

from mergekit_omp.advice import advice
from mergekit_omp.architecture import vocabulary_role
from mergekit_omp.cache import solve_with_cache
from mergekit_omp.overrides import override_row
from mergekit_omp.parameters import OmpParameters, Reconstruction
from mergekit_omp.realign import Problem, Solution, TrainedRows, check_rows, lacking, pose_problem, realign
from mergekit_omp.reconstruction import Evidence, reconstruct, split_tokens
from mergekit_omp.record import begin_record
from mergekit_omp.undertrained import FindTrainedRows
from mergekit_omp.vocabularies import OutputTokenizer, match_of, output_vocabulary, tokenizer_of, vocabulary_of
from mergekit_omp.vocabulary.canonical import Vocabulary
from mergekit_omp.vocabulary.matching import VocabularyMatch

LOG = logging.getLogger(__name__)


class MatchVocabulary(Task[VocabularyMatch]):
    """Find the row of ``model`` that each token of the output vocabulary has."""

    output: OutputTokenizer
    model: ModelReference

    def arguments(self) -> dict[str, Task]:
        """No task: tokenizers are read while planning, and cached."""
        return {}

    def execute(self, **_kwargs: Any) -> VocabularyMatch:
        """The match."""
        return match_of(self.output, self.model)


class SolveCodes(Task[Solution]):
    """Write the rows of a donor's tokens that a model lacks as sparse combinations of rows of shared tokens.

    It depends on the donor's tensor and on vocabularies alone, not on the model's weights: ``base`` names the first
    model of the recipe that has the model's vocabulary.
    """

    donor_weight: Task
    vocabulary_axis: int
    base: MatchVocabulary
    donors: tuple[MatchVocabulary, ...]  # in order of precedence; this solve is for the last of them
    base_trained: FindTrainedRows | None  # for magikarp; of the model that is realigned, so that nothing is shared
    donor_trained: FindTrainedRows | None
    k: int
    normalize_atoms: bool
    memory_budget: int | None
    all_devices: bool  # split the targets over every accelerator, as --multi-gpu asks
    quiet: bool

    def arguments(self) -> dict[str, Task]:
        """The donor's tensor, and which rows are well trained where that is asked for."""
        trained = {"base_trained": self.base_trained, "donor_trained": self.donor_trained}
        return {"weight": self.donor_weight, **{name: task for name, task in trained.items() if task is not None}}

    def uses_accelerator(self) -> bool:
        """The solve runs where mergekit does its arithmetic."""
        return True

    def problem(self, trained: TrainedRows | None = None) -> Problem:
        """The targets and atoms, as far as they are known without the rows that are well trained."""
        *earlier, donor = (match.execute() for match in self.donors)
        return pose_problem(self.base.execute(), donor, earlier, trained)

    def name(self) -> str:
        """What log lines and errors call the donor's tensor."""
        return f"{self.donor_weight.tensor} of {self.donor_weight.model}"

    def execute(
        self,
        weight: torch.Tensor,
        base_trained: torch.Tensor | None = None,
        donor_trained: torch.Tensor | None = None,
    ) -> Solution:
        """Solve, with a progress bar in tokens."""
        if base_trained is None or donor_trained is None:
            problem = self.problem()
        else:
            problem = self.problem(TrainedRows(base_trained.cpu(), donor_trained.cpu()))
        rows = weight.movedim(self.vocabulary_axis, 0).flatten(start_dim=1)
        check_rows(rows, torch.cat([problem.target_rows, problem.atom_rows]), self.name())
        started = time.perf_counter()
        with tqdm.tqdm(
            total=len(problem.target_ids), desc="Approximating tokens", unit="token", disable=self.quiet
        ) as bar:
            codes = solve_with_cache(
                rows[problem.target_rows.to(rows.device)],
                rows[problem.atom_rows.to(rows.device)],
                self.k,
                normalize_atoms=self.normalize_atoms,
                memory_budget=self.memory_budget,
                devices=_all_like(rows.device) if self.all_devices else None,
                progress=bar.update,
                name=self.name(),
            )
        return Solution(problem, codes, time.perf_counter() - started)


class FindEvidence(Task[Evidence]):
    """Put together what the rows of a solve's targets are made from."""

    solve: SolveCodes
    reconstruction: Reconstruction

    def arguments(self) -> dict[str, Task]:
        """The codes, and the donor's tensor where it is needed again."""
        donor = {"donor": self.solve.donor_weight} if self.reconstruction is Reconstruction.REGRESSION else {}
        return {"solution": self.solve, **donor}

    def execute(self, solution: Solution, donor: torch.Tensor | None = None) -> Evidence:
        """The evidence; for the regression, tokens are split as the model's own tokenizer does."""
        if donor is None:
            return Evidence(solution)
        output, model = self.solve.base.output, self.solve.base.model
        pieces = split_tokens(
            solution.problem,
            output_vocabulary(output),
            vocabulary_of(model, output.trust_remote_code),
            tokenizer_of(model, output.trust_remote_code),
        )
        return Evidence(solution, donor.movedim(self.solve.vocabulary_axis, 0), pieces)


class RealignedInput(BaseModel, frozen=True):
    """How one input of a vocabulary tensor is realigned."""

    model: ModelReference
    match: MatchVocabulary
    solves: tuple[SolveCodes, ...]
    parameters: OmpParameters

    def evidence(self) -> list[FindEvidence]:
        """The evidence of each solve."""
        return [FindEvidence(solve=each, reconstruction=self.parameters.reconstruction) for each in self.solves]


class RealignVocabulary(Task[dict[ModelReference, torch.Tensor]]):
    """Give every input of one tensor the rows of the output vocabulary; stands where mergekit would permute rows."""

    gather_tensors: GatherTensors
    output: OutputTokenizer
    inputs: tuple[RealignedInput, ...]
    overrides: tuple[tuple[str, TokenEmbeddingConfig], ...]
    pad_to_multiple_of: int | None
    vocabulary_axis: int
    name: str

    def arguments(self) -> dict[str, Task]:
        """The loaded inputs and the evidence for each."""
        found = {f"evidence_{i}_{j}": e for i, each in enumerate(self.inputs) for j, e in enumerate(each.evidence())}
        return {"tensors": self.gather_tensors, **found}

    def uses_accelerator(self) -> bool:
        """Rows are reconstructed where mergekit does its arithmetic."""
        return True

    def group_label(self) -> str | None:
        """The label of the loaded tensors, so that they are read shard by shard."""
        return self.gather_tensors.group_label()

    def execute(
        self, tensors: dict[ModelReference, torch.Tensor], **evidence: Evidence
    ) -> dict[ModelReference, torch.Tensor]:
        """Realign every input that has the tensor (optional ones may not)."""
        views = {model: tensor.movedim(self.vocabulary_axis, 0) for model, tensor in tensors.items()}
        return {
            each.model: self._realign(
                each, views, [evidence[f"evidence_{i}_{j}"] for j in range(len(each.solves))]
            ).movedim(0, self.vocabulary_axis)
            for i, each in enumerate(self.inputs)
            if each.model in views
        }

    def _realign(
        self, each: RealignedInput, views: dict[ModelReference, torch.Tensor], evidence: list[Evidence]
    ) -> torch.Tensor:
        started = time.perf_counter()
        match, solutions = each.match.execute(), [found.solution for found in evidence]
        check_rows(views[each.model], match.rows, f"{self.name} of {each.model}")
        result = realign(
            views[each.model],
            match,
            solutions,
            [reconstruct(found, views[each.model], match) for found in evidence],
            parameters=each.parameters,
            size=output_rows(output_vocabulary(self.output), self.pad_to_multiple_of),
            free_rows=vocabulary_of(each.model, self.output.trust_remote_code).free_rows(len(views[each.model])),
            overrides=self._override_rows(match, views),
        )
        LOG.info(
            "%s of %s: %d rows from %d; %d kept, %s; %.1f s",
            self.name,
            each.model,
            result.shape[0],
            views[each.model].shape[0],
            int((match.rows >= 0).sum()),
            _describe_solutions(solutions),
            time.perf_counter() - started + sum(solution.seconds for solution in solutions),
        )
        return result

    def _override_rows(
        self, match: VocabularyMatch, views: dict[ModelReference, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """The rows that ``tokenizer.tokens`` gives, for tokens that the model lacks or whose override is forced."""
        ids = {token.text: id_ for id_, token in output_vocabulary(self.output).tokens.items()}
        rows = {}
        for token, config in self.overrides:
            id_ = ids[token]
            if config.source is not None and (config.force or match.rows[id_] < 0):
                rows[id_] = override_row(id_, config, self.output, views, vocabulary_role(self.name))
        return rows


class SummarizeTransplant(Task[None]):
    """Tell what the whole transplant did, once every solve is done."""

    realigned: tuple[RealignVocabulary, ...]
    out_path: str

    def arguments(self) -> dict[str, Task]:
        """Every distinct solve."""
        solves = dict.fromkeys(s for task in self.realigned for each in task.inputs for s in each.solves)
        return {f"solution_{index}": solve for index, solve in enumerate(solves)}

    def execute(self, **solutions: Solution) -> None:
        """Log one line a model, what its user should know, and one line for the solves; begin the record."""
        begin_record(
            Path(self.out_path), self.realigned, {self.arguments()[name]: each for name, each in solutions.items()}
        )
        inputs = {each.model: each for task in self.realigned for each in task.inputs}
        for each in inputs.values():
            LOG.info("%s", describe_match(each.match))
            _warn_of_orphans(each)
            for sentence in advice(each.match.output, each.model):
                LOG.warning("%s", sentence)
        LOG.info(
            "%d solves: %s; %.1f s",
            len(solutions),
            _describe_solutions(list(solutions.values())),
            sum(solution.seconds for solution in solutions.values()),
        )


def _all_like(device: torch.device) -> list[torch.device] | None:
    """Every device of an accelerator's kind; None for the CPU, of which there is one."""
    if device.type == "cpu":
        return None
    return [torch.device(device.type, index) for index in range(torch.get_device_module(device).device_count())]


def _warn_of_orphans(each: RealignedInput) -> None:
    """Name the tokens that the model lacks and that no donor and no override gives a row."""
    orphans = lacking(each.match.execute())
    for solve in each.solves:
        orphans[solve.problem().target_ids] = False
    tokens = output_vocabulary(each.match.output).tokens
    names = [tokens[id_].text for id_ in orphans.nonzero().squeeze(1).tolist()]
    names = [name for name in names if name not in each.match.output.overridden]
    if names:
        LOG.warning(
            "%s has no row for %d tokens and neither has a donor; they get the mean of the kept rows: %s%s",
            each.model,
            len(names),
            " ".join(map(repr, names[:20])),
            " …" if len(names) > 20 else "",
        )


def output_rows(vocabulary: Vocabulary, pad_to_multiple_of: int | None) -> int:
    """Rows that the output's embedding has: one for every id up to the highest, and padding."""
    multiple = pad_to_multiple_of or 1
    return -(-vocabulary.size // multiple) * multiple


def describe_match(match: MatchVocabulary) -> str:
    """One line: how the output's tokens were matched to a model's, and how many it lacks."""
    result = match.execute()
    counts = ", ".join(f"{count} {reason.name.lower().replace('_', ' ')}" for reason, count in result.counts().items())
    return (
        f"{match.model}: {int((result.rows >= 0).sum())} tokens kept, {int(lacking(result).sum())} lacking ({counts})"
    )


def _describe_solutions(solutions: list[Solution]) -> str:
    residuals = torch.cat([torch.zeros(0), *(solution.codes.relative_residuals for solution in solutions)])
    if not len(residuals):
        return "nothing to approximate"
    return f"{len(residuals)} approximated with a mean relative residual of {residuals.mean():.3f}"
