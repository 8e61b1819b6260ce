"""The tasks that stand between loading the inputs of a vocabulary tensor and merging them.

Each is a frozen mergekit ``Task``, so that the graph's own equality removes repeated work: input embedding and LM head
of a donor with tied embeddings share one solve, and so do all inputs of one vocabulary.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tqdm
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors, LoadTensor
from mergekit.tokenizer.config import TokenEmbeddingConfig
from pydantic import BaseModel

from mergekit_omp.checkpoints.architecture import VocabularyRole, vocabulary_role
from mergekit_omp.checkpoints.tokenizers import (
    OutputTokenizer,
    donor_rows,
    match_of,
    output_vocabulary,
    shared_output_tokenizer,
    tokenizer_of,
    vocabulary_of,
)
from mergekit_omp.initializers.base import NewTokens, RowMaker
from mergekit_omp.initializers.digits import LogitShift, find_numbers, with_numbers
from mergekit_omp.initializers.registry import method_of
from mergekit_omp.parameters import OmpParameters
from mergekit_omp.realign.rows import Problem, Solution, TrainedRows, check_rows, lacking, pose_problem, realign
from mergekit_omp.recipe.overrides import override_row
from mergekit_omp.report.record import begin_record
from mergekit_omp.report.warnings import advice
from mergekit_omp.solver.cache import solve_with_cache
from mergekit_omp.tasks.hidden_states import FindLogitShift
from mergekit_omp.tasks.placement import on_the_cpu
from mergekit_omp.tasks.undertrained import FindTrainedRows
from mergekit_omp.vocabulary.matching import VocabularyMatch
from mergekit_omp.vocabulary.tokens import Vocabulary

LOG = logging.getLogger(__name__)


class MatchVocabulary(Task[VocabularyMatch]):
    """Find the row of ``model`` that each token of the output vocabulary has."""

    output: OutputTokenizer
    model: ModelReference

    def arguments(self) -> dict[str, Task]:
        """No task: tokenizers are read while planning, and cached."""
        return {}

    @on_the_cpu
    def execute(self, **_kwargs: Any) -> VocabularyMatch:
        """The match."""
        return match_of(self.output, self.model)


class PoseProblem(Task[Problem]):
    """Find which tokens a donor gives to a model, and the anchors that both have.

    It depends on vocabularies alone: ``base`` names the first model of the recipe that has the model's vocabulary.
    """

    base: MatchVocabulary
    donors: tuple[MatchVocabulary, ...]  # in order of precedence; the problem is the last one's
    base_trained: FindTrainedRows | None  # for magikarp; of the model that is realigned, so that nothing is shared
    donor_trained: FindTrainedRows | None

    def arguments(self) -> dict[str, Task]:
        """Which rows are well trained, where that is asked for."""
        trained = {"base_trained": self.base_trained, "donor_trained": self.donor_trained}
        return {name: task for name, task in trained.items() if task is not None}

    @on_the_cpu
    def execute(self, base_trained: torch.Tensor | None = None, donor_trained: torch.Tensor | None = None) -> Problem:
        """The targets and atoms; without the rows that are well trained, as far as they are known."""
        trained = None
        if base_trained is not None and donor_trained is not None:
            trained = TrainedRows(base_trained.cpu(), donor_trained.cpu())
        *earlier, donor = (match.execute() for match in self.donors)
        return pose_problem(self.base.execute(), donor, earlier, trained)


class SolveCodes(Task[Solution]):
    """Write the rows of a donor's tokens that a model lacks as sparse combinations of rows of shared tokens.

    It depends on the donor's tensor and on vocabularies alone, not on the model's weights.
    """

    pose: PoseProblem
    donor_weight: LoadTensor
    vocabulary_axis: int
    k: int
    normalize_atoms: bool
    scan_every: int
    memory_budget: int | None
    all_devices: bool  # split the targets over every accelerator, as --multi-gpu asks
    quiet: bool

    def arguments(self) -> dict[str, Task]:
        """The problem and the donor's tensor."""
        return {"problem": self.pose, "weight": self.donor_weight}

    def uses_accelerator(self) -> bool:
        """The solve runs where mergekit does its arithmetic."""
        return True

    def name(self) -> str:
        """What log lines and errors call the donor's tensor."""
        return f"{self.donor_weight.tensor} of {self.donor_weight.model}"

    @on_the_cpu
    def execute(self, problem: Problem, weight: torch.Tensor) -> Solution:
        """Solve, with a progress bar in tokens."""
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
                scan_every=self.scan_every,
                memory_budget=self.memory_budget,
                devices=_all_like(rows.device) if self.all_devices else None,
                progress=bar.update,
                name=self.name(),
            )
        return Solution(problem, codes, time.perf_counter() - started)


def new_tokens(base: MatchVocabulary, problem: Problem, parameters: OmpParameters, **more: Any) -> NewTokens:
    """What can be known of a problem's targets from the vocabularies; ``more`` are fields that need weights."""
    output, model, trust = base.output, base.model, base.output.trust_remote_code
    return NewTokens(
        problem=problem,
        anchor_rows=base.execute().rows[problem.atom_ids],
        output=output_vocabulary(output),
        output_tokenizer=shared_output_tokenizer(output),
        model=vocabulary_of(model, trust),
        tokenizer=tokenizer_of(model, trust),
        parameters=parameters,
        trust_remote_code=trust,
        **more,
    )


@dataclass(frozen=True)
class NewRows:
    """The rows of a problem's targets, for whatever matrix of the model is given.

    Attributes:
        problem: of B targets.
        make: the maker of their rows.
        solution: OMP's, where the rows are made from its codes.
        seconds: what it took to get here.
    """

    problem: Problem
    make: RowMaker
    solution: Solution | None
    seconds: float


class PrepareRows(Task[NewRows]):
    """Do what a method of approximation does once for the input embedding and the LM head of a model."""

    pose: PoseProblem
    parameters: OmpParameters
    solve: SolveCodes | None
    donor_weight: LoadTensor | None
    vocabulary_axis: int
    logit_shift: FindLogitShift | None  # for numerals: digits
    own_weights: tuple[tuple[LoadTensor, int], ...]  # embedding and head of the model, with their axes

    def arguments(self) -> dict[str, Task]:
        """The problem, and what the method needs of codes and matrices."""
        needed = {"problem": self.pose, "solution": self.solve, "donor": self.donor_weight}
        needed["logit_shift"] = self.logit_shift
        own = {f"own_{index}": task for index, (task, _) in enumerate(self.own_weights)}
        return {name: task for name, task in (needed | own).items() if task is not None}

    def uses_accelerator(self) -> bool:
        """Some methods compute much."""
        return True

    @on_the_cpu
    def execute(
        self,
        problem: Problem,
        solution: Solution | None = None,
        donor: torch.Tensor | None = None,
        logit_shift: LogitShift | None = None,
        **own: torch.Tensor,
    ) -> NewRows:
        """Ask the method."""
        started = time.perf_counter()
        output, model = self.pose.base.output, self.pose.base.model
        method, donor_model = method_of(self.parameters), self.pose.donors[-1].model
        if donor is not None:
            donor = donor.movedim(self.vocabulary_axis, 0)
        if donor is not None and solution is None:  # a solve has looked already
            check_rows(
                donor,
                torch.cat([problem.target_rows, problem.atom_rows]),
                f"{self.donor_weight.tensor} of {donor_model}",
            )
        axes = [axis for _, axis in self.own_weights]
        embedding_and_head = [own[f"own_{i}"].movedim(axis, 0) for i, axis in enumerate(axes)]
        trust = output.trust_remote_code
        new = new_tokens(
            self.pose.base,
            problem,
            self.parameters,
            donor=donor,
            codes=solution.codes if solution else None,
            own=tuple(embedding_and_head) if embedding_and_head else None,
            configs=(
                tuple(each.config(trust_remote_code=trust) for each in (donor_model, model))
                if method.reads_configs
                else None
            ),
        )
        make = method.rows(new)
        if logit_shift is not None:
            make = with_numbers(make, find_numbers(new), logit_shift)
        return NewRows(problem, make, solution, time.perf_counter() - started + (solution.seconds if solution else 0))


class RealignedInput(BaseModel, frozen=True):
    """How one input of a vocabulary tensor is realigned."""

    model: ModelReference
    match: MatchVocabulary
    new_rows: tuple[PrepareRows, ...]  # one for every donor of tokens that the model lacks
    parameters: OmpParameters

    @property
    def solves(self) -> tuple[SolveCodes, ...]:
        """OMP's solves."""
        return tuple(each.solve for each in self.new_rows if each.solve is not None)


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
        """The loaded inputs and the new rows for each."""
        found = {f"rows_{i}_{j}": e for i, each in enumerate(self.inputs) for j, e in enumerate(each.new_rows)}
        return {"tensors": self.gather_tensors, **found}

    def uses_accelerator(self) -> bool:
        """Rows are made where mergekit does its arithmetic."""
        return True

    def group_label(self) -> str | None:
        """The label of the loaded tensors, so that they are read shard by shard."""
        return self.gather_tensors.group_label()

    @on_the_cpu
    def execute(
        self, tensors: dict[ModelReference, torch.Tensor], **prepared: NewRows
    ) -> dict[ModelReference, torch.Tensor]:
        """Realign every input that has the tensor (optional ones may not)."""
        views = {model: tensor.movedim(self.vocabulary_axis, 0) for model, tensor in tensors.items()}
        return {
            each.model: self._realign(
                each, views, [prepared[f"rows_{i}_{j}"] for j in range(len(each.new_rows))]
            ).movedim(0, self.vocabulary_axis)
            for i, each in enumerate(self.inputs)
            if each.model in views
        }

    def _realign(
        self, each: RealignedInput, views: dict[ModelReference, torch.Tensor], prepared: list[NewRows]
    ) -> torch.Tensor:
        started = time.perf_counter()
        match = each.match.execute()
        check_rows(views[each.model], match.rows, f"{self.name} of {each.model}")
        is_head = vocabulary_role(self.name) is VocabularyRole.HEAD
        result = realign(
            views[each.model],
            match,
            [new.problem for new in prepared],
            [new.make(views[each.model], is_head) for new in prepared],
            parameters=each.parameters,
            size=output_rows(output_vocabulary(self.output), self.pad_to_multiple_of, donor_rows(self.output)),
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
            _describe_new_rows(each, prepared),
            time.perf_counter() - started + sum(new.seconds for new in prepared),
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
        """Every distinct solve, and every distinct problem of the other methods."""
        prepared = [each for task in self.realigned for one in task.inputs for each in one.new_rows]
        solves = dict.fromkeys(each.solve for each in prepared if each.solve is not None)
        others = dict.fromkeys(each.pose for each in prepared if each.solve is None)
        return {
            **{f"solution_{index}": solve for index, solve in enumerate(solves)},
            **{f"problem_{index}": pose for index, pose in enumerate(others)},
        }

    @on_the_cpu
    def execute(self, **done: Solution | Problem) -> None:
        """Log one line a model, what its user should know, and one line for the solves; begin the record."""
        by_task = {self.arguments()[name]: each for name, each in done.items()}
        solutions = {task: each for task, each in by_task.items() if isinstance(each, Solution)}
        problems = {task: each for task, each in by_task.items() if isinstance(each, Problem)}
        begin_record(Path(self.out_path), self.realigned, solutions, problems)
        inputs = {each.model: each for task in self.realigned for each in task.inputs}
        for each in inputs.values():
            LOG.info("%s", describe_match(each.match))
            _warn_of_orphans(each)
            for sentence in advice(each.match.output, each.model):
                LOG.warning("%s", sentence)
        if solutions or not problems:
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
    for new in each.new_rows:
        orphans[new.pose.execute().target_ids] = False
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


def output_rows(vocabulary: Vocabulary, pad_to_multiple_of: int | None, donor_rows: int | None) -> int:
    """Rows that the output's embedding has: one for every id up to the highest, and padding.

    A draft model must have its target's number of rows: vLLM refuses any other, llama.cpp one that differs by more
    than 128.

    Args:
        vocabulary: the output vocabulary.
        pad_to_multiple_of: the recipe's, which wins; None where it has none.
        donor_rows: the rows of the model that ``tokenizer.source`` names; None where it names none, or a tokenizer
            alone.
    """
    if pad_to_multiple_of:
        return -(-vocabulary.size // pad_to_multiple_of) * pad_to_multiple_of
    return max(vocabulary.size, donor_rows or 0)


def describe_match(match: MatchVocabulary) -> str:
    """One line: how the output's tokens were matched to a model's, and how many it lacks."""
    result = match.execute()
    counts = ", ".join(f"{count} {reason.name.lower().replace('_', ' ')}" for reason, count in result.counts().items())
    return (
        f"{match.model}: {int((result.rows >= 0).sum())} tokens kept, {int(lacking(result).sum())} lacking ({counts})"
    )


def _describe_new_rows(each: RealignedInput, prepared: list[NewRows]) -> str:
    solutions = [new.solution for new in prepared if new.solution is not None]
    if solutions or not prepared:
        return _describe_solutions(solutions)
    return f"{sum(len(new.problem.target_ids) for new in prepared)} made by {each.parameters.approximation.value}"


def _describe_solutions(solutions: list[Solution]) -> str:
    residuals = torch.cat([torch.zeros(0), *(solution.codes.relative_residuals for solution in solutions)])
    if not len(residuals):
        return "nothing to approximate"
    return f"{len(residuals)} approximated with a mean relative residual of {residuals.mean():.3f}"
