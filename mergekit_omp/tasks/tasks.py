"""Define the tasks between loading the inputs of a vocabulary tensor and merging them.

All are frozen mergekit ``Task`` objects, and the graph executes equal tasks once: the input embedding and LM head of a
donor with tied embeddings share one solve, and so do all inputs with one vocabulary. Objects of the resolved recipe
are compared by identity.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import tqdm
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors, LoadTensor
from mergekit.tokenizer.config import TokenEmbeddingConfig
from pydantic import BaseModel

from mergekit_omp.audit.pieces import PieceCheck
from mergekit_omp.audit.tokens import check_tokens
from mergekit_omp.audit.unsafe import UnsafeRows, suspects
from mergekit_omp.checkpoints.architecture import VocabularyRole, is_tied, vocabulary_role
from mergekit_omp.compat import TokenizerInfo
from mergekit_omp.initializers.base import NewTokens, RowFunction
from mergekit_omp.initializers.digits import LogitShift, find_numbers, with_numbers
from mergekit_omp.initializers.registry import initializer_of
from mergekit_omp.parameters import OmpParameters
from mergekit_omp.realign.problem import Problem, Solution, TrainedRows, pose_problem
from mergekit_omp.realign.rows import check_rows, realign
from mergekit_omp.recipe.copies import Copies
from mergekit_omp.recipe.overrides import override_row
from mergekit_omp.recipe.transplant import DonorProblem, RecipeModel, Transplant
from mergekit_omp.report.record import Record, never_fatal
from mergekit_omp.solver.cache import solve_with_cache
from mergekit_omp.tasks.hidden_states import FindLogitShift
from mergekit_omp.tasks.placement import on_the_cpu
from mergekit_omp.tasks.resolved import Resolved
from mergekit_omp.tasks.undertrained import FindTrainedRows
from mergekit_omp.vocabulary.alignment import Alignment

LOG = logging.getLogger(__name__)


class OutputTokenizer(Task[TokenizerInfo]):
    """Return the output tokenizer for mergekit to save; replaces mergekit's task that builds one."""

    transplant: Resolved[Transplant]

    def arguments(self) -> dict[str, Task]:
        """Return no tasks: the tokenizer was built when the recipe was resolved."""
        return {}

    def execute(self, **_kwargs: Any) -> TokenizerInfo:
        """Return the tokenizer without permutations: :class:`RealignVocabulary` maps the vocabularies."""
        return TokenizerInfo(tokenizer=self.transplant.tokenizer, permutations={}, original_vocabs={})


class PoseProblem(Task[Problem]):
    """Find the new tokens of a model that a donor has, and the anchors of both."""

    posed: Resolved[DonorProblem]
    copies: Resolved[Copies]  # their tokens need no solve
    base_trained: FindTrainedRows | None  # for magikarp; specific to the realigned model, so solves are not shared
    donor_trained: FindTrainedRows | None

    def arguments(self) -> dict[str, Task]:
        """Return the tasks that find well-trained rows, if magikarp is set."""
        trained = {"base_trained": self.base_trained, "donor_trained": self.donor_trained}
        return {name: task for name, task in trained.items() if task is not None}

    @on_the_cpu
    def execute(self, base_trained: torch.Tensor | None = None, donor_trained: torch.Tensor | None = None) -> Problem:
        """Return the problem of the recipe, or pose it again without under-trained rows."""
        problem, base = self.posed.problem, self.posed.base.match
        if base_trained is not None and donor_trained is not None:
            trained = TrainedRows(base_trained.cpu(), donor_trained.cpu())
            earlier = [donor.match for donor in self.posed.earlier]
            problem = pose_problem(base, self.posed.donor.match, earlier, trained)
        return problem.without(self.copies.ids(base))


class SplitNewTokens(Task[PieceCheck]):
    """Segment new tokens for the check of their rows, once for all matrices that get rows of the same tokens."""

    transplant: Resolved[Transplant]
    base: Resolved[Alignment]
    poses: tuple[PoseProblem, ...]

    def arguments(self) -> dict[str, Task]:
        """Return the problems of all donors."""
        return {f"problem_{index}": pose for index, pose in enumerate(self.poses)}

    @on_the_cpu
    def execute(self, **problems: Problem) -> PieceCheck:
        """Segment the targets of all problems, in the order of the donors."""
        ids = [problems[f"problem_{index}"].target_ids for index in range(len(self.poses))]
        return PieceCheck(self.base, self.transplant.vocabulary, torch.cat([torch.zeros(0, dtype=torch.int64), *ids]))


class SolveCodes(Task[Solution]):
    """Approximate the donor's rows of new tokens by sparse combinations of its rows of anchors.

    Depends on the donor's tensor and the vocabularies only, not on the model's weights.
    """

    pose: PoseProblem
    donor_weight: LoadTensor
    vocabulary_axis: int
    k: int
    normalize_atoms: bool
    memory_budget: int | None
    all_devices: bool  # split the targets over all accelerators, for --multi-gpu
    quiet: bool

    def arguments(self) -> dict[str, Task]:
        """Return the tasks of the problem and the donor's tensor."""
        return {"problem": self.pose, "weight": self.donor_weight}

    def uses_accelerator(self) -> bool:
        """Run the solve on mergekit's device."""
        return True

    def name(self) -> str:
        """Return the name of the donor's tensor for log lines and errors."""
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
                memory_budget=self.memory_budget,
                devices=_all_like(rows.device) if self.all_devices else None,
                progress=bar.update,
                name=self.name(),
            )
        return Solution(problem, codes, time.perf_counter() - started)


@dataclass(frozen=True)
class NewRows:
    """The prepared initializer of a problem, which makes rows for each matrix of the model.

    Attributes:
        problem: the problem, with B targets.
        make: function that makes the rows of the targets for a matrix.
        solution: solution of OMP, for initializers that use it.
        seconds: time of preparation and solve.
    """

    problem: Problem
    make: RowFunction
    solution: Solution | None
    seconds: float


@dataclass(frozen=True)
class SafeRows:
    """The check of an input's approximated rows, and the rows that replace flagged ones; None if none is flagged."""

    found: UnsafeRows
    rows: NewRows | None


class PrepareRows(Task[NewRows]):
    """Run the part of an initializer that serves both the input embedding and the LM head of a model."""

    transplant: Resolved[Transplant]
    pose: PoseProblem
    parameters: OmpParameters
    solve: SolveCodes | None
    donor_weight: LoadTensor | None
    vocabulary_axis: int
    logit_shift: FindLogitShift | None  # for numerals: digits
    model_weights: tuple[tuple[LoadTensor, int], ...]  # embedding and head of the model, with their axes
    model: Resolved[RecipeModel] | None  # only for initializers that read configurations, so that others share rows

    def arguments(self) -> dict[str, Task]:
        """Return the tasks of the problem and of the codes and matrices that the initializer needs."""
        needed = {"problem": self.pose, "solution": self.solve, "donor": self.donor_weight}
        needed["logit_shift"] = self.logit_shift
        weights = {f"weight_{index}": task for index, (task, _) in enumerate(self.model_weights)}
        return {name: task for name, task in (needed | weights).items() if task is not None}

    def uses_accelerator(self) -> bool:
        """Run on mergekit's device, since some initializers are expensive."""
        return True

    @on_the_cpu
    def execute(
        self,
        problem: Problem,
        solution: Solution | None = None,
        donor: torch.Tensor | None = None,
        logit_shift: LogitShift | None = None,
        **weights: torch.Tensor,
    ) -> NewRows:
        """Run the initializer."""
        started = time.perf_counter()
        posed = self.pose.posed
        if self.donor_weight is not None and donor is not None:
            donor = donor.movedim(self.vocabulary_axis, 0)
            if solution is None:  # otherwise the solve has checked them
                rows = torch.cat([problem.target_rows, problem.atom_rows])
                check_rows(donor, rows, f"{self.donor_weight.tensor} of {posed.donor}")
        matrices = [weights[f"weight_{i}"].movedim(axis, 0) for i, (_, axis) in enumerate(self.model_weights)]
        for matrix, (load, _) in zip(matrices, self.model_weights, strict=True):
            check_rows(matrix, posed.base.match.rows, f"{load.tensor} of {load.model}")
        configs = None
        if self.model is not None:
            assert posed.donor.config is not None, "it has weights"
            assert self.model.config is not None, "it is an input"
            configs = posed.donor.config, self.model.config
        new = NewTokens(
            posed.base,
            problem,
            self.transplant.vocabulary,
            self.transplant.tokenizer,
            self.parameters,
            donor=donor,
            codes=solution.codes if solution else None,
            embedding_and_head=(matrices[0], matrices[1]) if matrices else None,
            configs=configs,
            trust_remote_code=self.transplant.trust_remote_code,
        )
        make = initializer_of(self.parameters).rows(new)
        if logit_shift is not None:
            make = with_numbers(make, find_numbers(new), logit_shift)
        return NewRows(problem, make, solution, time.perf_counter() - started + (solution.seconds if solution else 0))


def split_new_tokens(transplant: Transplant, model: RecipeModel, new_rows: Sequence[PrepareRows]) -> SplitNewTokens:
    """Return the task that segments the tokens whose rows are prepared for one matrix of a model."""
    return SplitNewTokens(transplant=transplant, base=model.alignment, poses=tuple(rows.pose for rows in new_rows))


class RealignedInput(BaseModel, frozen=True):
    """Plan of the realignment of one input of a vocabulary tensor."""

    model: Resolved[RecipeModel]
    new_rows: tuple[PrepareRows, ...]  # one per donor of new tokens
    split: SplitNewTokens | None  # for the check of the matrix alone; none if nothing of the donor's is in its rows
    safe_rows: Task[SafeRows] | None  # that replace some of these, for unsafe_tokens
    copies: Resolved[Copies]
    copied_weights: tuple[tuple[Resolved[RecipeModel], LoadTensor, int], ...]  # weights of models that are not merged
    parameters: OmpParameters

    @property
    def solves(self) -> tuple[SolveCodes, ...]:
        """The solves of this input."""
        return tuple(rows.solve for rows in self.new_rows if rows.solve is not None)


class RealignVocabulary(Task[dict[ModelReference, torch.Tensor]]):
    """Realign every input of one tensor to the output vocabulary; replaces mergekit's permutation of rows."""

    transplant: Resolved[Transplant]
    gather_tensors: GatherTensors
    inputs: tuple[RealignedInput, ...]
    overrides: tuple[tuple[str, TokenEmbeddingConfig], ...]
    vocabulary_axis: int
    name: str
    record: Resolved[Record]

    def arguments(self) -> dict[str, Task]:
        """Return the tasks of the loaded inputs, their new rows and the matrices that they copy rows from."""
        needed: dict[str, Task] = {"tensors": self.gather_tensors}
        for i, one in enumerate(self.inputs):
            needed |= {f"rows_{i}_{j}": rows for j, rows in enumerate(one.new_rows)}
            needed |= {} if one.split is None else {f"split_{i}": one.split}
            needed |= {} if one.safe_rows is None else {f"safe_{i}": one.safe_rows}
            needed |= {f"copied_{i}_{j}": load for j, (_, load, _) in enumerate(one.copied_weights)}
        return needed

    def uses_accelerator(self) -> bool:
        """Make rows on mergekit's device."""
        return True

    def group_label(self) -> str | None:
        """Return the label of the loaded tensors, so that they are read shard by shard."""
        return self.gather_tensors.group_label()

    @on_the_cpu
    def execute(
        self, tensors: dict[ModelReference, torch.Tensor], **needed: Any
    ) -> dict[ModelReference, torch.Tensor]:
        """Realign every input that has the tensor; optional tensors may be missing."""
        views = {model: tensor.movedim(self.vocabulary_axis, 0) for model, tensor in tensors.items()}
        realigned = {}
        for i, one in enumerate(self.inputs):
            if one.model.reference not in views:
                continue
            prepared: list[NewRows] = [needed[f"rows_{i}_{j}"] for j in range(len(one.new_rows))]
            donors: dict[RecipeModel, torch.Tensor] = {
                donor: needed[f"copied_{i}_{j}"].movedim(axis, 0)
                for j, (donor, _, axis) in enumerate(one.copied_weights)
            }
            check, safe = needed.get(f"split_{i}"), needed.get(f"safe_{i}")
            result = self._realign(one, views, prepared, check, safe, donors)
            realigned[one.model.reference] = result.movedim(0, self.vocabulary_axis)
        return realigned

    def _realign(
        self,
        one: RealignedInput,
        views: dict[ModelReference, torch.Tensor],
        prepared: list[NewRows],
        check: PieceCheck | None,
        safe: SafeRows | None,
        donors: dict[RecipeModel, torch.Tensor],
    ) -> torch.Tensor:
        started = time.perf_counter()
        model, match = one.model, one.model.match
        merged = {other: views[other.reference] for other in one.copies.models if other.reference in views}
        sources = donors | merged
        # Promote dtypes, as in mergekit, so that rows of higher precision are kept.
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in merged.values()), views[model.reference].dtype)
        weight = views[model.reference].to(dtype)
        check_rows(weight, match.rows, f"{self.name} of {model}")
        for other, tensor in donors.items():
            check_rows(tensor, other.match.rows, f"{self.name} of {other}")
        copied = one.copies.among(sources).rows(match, sources, weight)
        is_head = vocabulary_role(self.name) is VocabularyRole.HEAD
        made = [*prepared, safe.rows] if safe and safe.rows else prepared  # the last that has a token counts
        result = realign(
            weight,
            match,
            [new.problem for new in made],
            [new.make(weight, is_head) for new in made],
            parameters=one.parameters,
            size=self.transplant.rows,
            free_rows=model.vocabulary.free_rows(len(weight)),
            copied=copied,
            overrides=self._override_rows(model, views),
        )
        if check is not None and result.ndim == 2:
            self._check_rows(one, weight, result, check)
        LOG.info(
            "%s of %s: %d rows from %d; %d kept, %d copied, %s; %.1f s",
            self.name,
            model,
            result.shape[0],
            weight.shape[0],
            int((match.without(copied[0]).rows >= 0).sum()),
            len(copied[0]),
            _describe_new_rows(one, prepared),
            time.perf_counter() - started + sum(new.seconds for new in prepared),
        )
        return result

    def _check_rows(self, one: RealignedInput, weight: torch.Tensor, matrix: torch.Tensor, check: PieceCheck) -> None:
        """Record approximated rows that are suspicious, as far as the rows alone tell."""
        if not len(check.ids):
            return
        role, config = vocabulary_role(self.name), one.model.config
        flagged = suspects(
            weight,
            matrix,
            one.model.alignment,
            self.transplant.vocabulary,
            check,
            role=role,
            is_head=role is VocabularyRole.HEAD or (config is not None and is_tied(config)),
        )
        if flagged is not None:
            self.record.add_unsafe(one.model, one.parameters, len(check.ids), flagged)

    def _override_rows(self, model: RecipeModel, views: dict[ModelReference, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Return the rows of overrides, for new tokens and for tokens whose override is forced."""
        rows: dict[int, torch.Tensor] = {}
        if not self.overrides:
            return rows
        ids = {token.text: id_ for id_, token in self.transplant.vocabulary.tokens.items()}
        for token, config in self.overrides:
            id_ = ids[token]
            if config.source is not None and (config.force or model.match.rows[id_] < 0):
                rows[id_] = override_row(id_, config, self.transplant, views, vocabulary_role(self.name))
        return rows


class RecordTransplant(Task[None]):
    """Add the results of all solves and other initializers to the record of the run."""

    realigned: tuple[RealignVocabulary, ...]
    record: Resolved[Record]

    def arguments(self) -> dict[str, Task]:
        """Return every distinct solve, and every distinct problem of other initializers."""
        prepared = [rows for task in self.realigned for one in task.inputs for rows in one.new_rows]
        solves = dict.fromkeys(rows.solve for rows in prepared if rows.solve is not None)
        others = dict.fromkeys(rows.pose for rows in prepared if rows.solve is None)
        safe = dict.fromkeys(one.safe_rows for task in self.realigned for one in task.inputs if one.safe_rows)
        return {
            **{f"solution_{index}": solve for index, solve in enumerate(solves)},
            **{f"problem_{index}": pose for index, pose in enumerate(others)},
            **{f"safe_{index}": task for index, task in enumerate(safe)},
        }

    @on_the_cpu
    @never_fatal
    def execute(self, **results: Solution | Problem | SafeRows) -> None:
        """Add the results while their codes are in memory."""
        solve_indices: dict[SolveCodes, int] = {}
        problems: dict[PoseProblem, Problem] = {}
        safe: dict[Task, SafeRows] = {}
        for name, task in self.arguments().items():
            result = results[name]
            if isinstance(result, Solution):
                solve_indices[task] = self.record.add_solve(
                    task.pose.posed,
                    result,
                    tensor=task.donor_weight.tensor,
                    vocabulary_axis=task.vocabulary_axis,
                    k=task.k,
                    normalize_atoms=task.normalize_atoms,
                )
                problems[task.pose] = result.problem
            elif isinstance(result, SafeRows):
                safe[task] = result
            else:
                self.record.add_other_rows(task.posed, result)
                problems[task] = result
        for task in self.realigned:
            for one in task.inputs:
                self.record.add_tensor(
                    task.name,
                    one.model,
                    one.parameters,
                    solves=[solve_indices[solve] for solve in one.solves],
                    problems=[problems[rows.pose] for rows in one.new_rows],
                    copied=list(one.copies.shares(one.model.match)),
                )
                if one.safe_rows is not None:
                    found = safe[one.safe_rows].found
                    flagged = [check.as_dict() for check in found.flagged]
                    self.record.add_unsafe(one.model, one.parameters, found.checked, flagged)
        transplant = self.record.transplant
        self.record.token_checks = check_tokens(transplant.tokenizer, transplant.vocabulary).counts()
        self.record.is_complete = True


def _all_like(device: torch.device) -> list[torch.device] | None:
    """Return all devices of an accelerator's type; None for the CPU."""
    if device.type == "cpu":
        return None
    return [torch.device(device.type, index) for index in range(torch.get_device_module(device).device_count())]


def _describe_new_rows(one: RealignedInput, prepared: list[NewRows]) -> str:
    solutions = [new.solution for new in prepared if new.solution is not None]
    if not solutions and prepared:
        return f"{sum(len(new.problem.target_ids) for new in prepared)} made by {one.parameters.approximation.value}"
    residuals = torch.cat([torch.zeros(0), *(solution.codes.relative_residuals for solution in solutions)])
    if not len(residuals):
        return "nothing to approximate"
    return f"{len(residuals)} approximated with a mean relative residual of {residuals.mean():.3f}"
