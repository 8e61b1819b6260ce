"""Make approximated rows that the audit flags again without the donor's rows, for ``unsafe_tokens``."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from mergekit.graph import Task
from mergekit.io.tasks import LoadTensor

from mergekit_omp.audit.unsafe import find_unsafe
from mergekit_omp.checkpoints.architecture import VocabularyRole
from mergekit_omp.evaluation.bits_per_byte import builtin_texts
from mergekit_omp.initializers.base import NewTokens, RowFunction
from mergekit_omp.initializers.registry import INITIALIZERS
from mergekit_omp.parameters import Approximation, OmpParameters, UnsafeTokens
from mergekit_omp.realign.rows import check_rows
from mergekit_omp.recipe.transplant import RecipeModel, Transplant
from mergekit_omp.tasks.hidden_states import check_runs, load_complete
from mergekit_omp.tasks.placement import on_the_cpu
from mergekit_omp.tasks.resolved import Resolved
from mergekit_omp.tasks.tasks import NewRows, PrepareRows, SafeRows, split_new_tokens


class ReplaceUnsafe(Task[SafeRows]):
    """Check the rows that an input gets, on states of the complete input, and prepare others for flagged ones.

    The rows of both matrices are replaced where that of one is flagged.
    """

    transplant: Resolved[Transplant]
    model: Resolved[RecipeModel]
    matrices: tuple[tuple[VocabularyRole, LoadTensor, int, tuple[PrepareRows, ...]], ...]  # one if they are tied
    unsafe_tokens: UnsafeTokens

    def arguments(self) -> dict[str, Task]:
        """Return the tasks of the matrices, with their axes, and of the rows that are made for them."""
        needed: dict[str, Task] = {}
        for role, load, _, new_rows in self.matrices:
            needed[role.name] = load
            needed |= {f"{role.name}_{index}": rows for index, rows in enumerate(new_rows)}
            needed[f"{role.name}_split"] = split_new_tokens(self.transplant, self.model, new_rows)
        return needed

    def uses_accelerator(self) -> bool:
        """Run the model on mergekit's device."""
        return True

    @on_the_cpu
    def execute(self, **needed: Any) -> SafeRows:
        """Run the model, and check the rows of all donors."""
        started = time.perf_counter()
        made, problems = {}, []
        for role, load, axis, prepared in self.matrices:
            weight = needed[role.name].movedim(axis, 0)
            check_rows(weight, self.model.match.rows, f"{load.tensor} of {self.model}")
            new_rows: list[NewRows] = [needed[f"{role.name}_{index}"] for index in range(len(prepared))]
            problems += [new.problem for new in new_rows]
            made[role] = (
                needed[f"{role.name}_split"],
                torch.cat([weight[:0], *(new.make(weight, role is VocabularyRole.HEAD) for new in new_rows)]),
            )
        model = load_complete(self.model, f"unsafe_tokens: {self.unsafe_tokens.value}")
        found = find_unsafe(
            model.to(weight.device),
            self.model.alignment,
            self.transplant.vocabulary,
            made,
            [*builtin_texts("tuning").values(), *builtin_texts().values()],
            progress=not self.transplant.options.quiet,
        )
        if not found.flagged:
            return SafeRows(found, None)
        ids = torch.tensor([check.id for check in found.flagged])
        problem = replace(problems[0], target_ids=ids, target_rows=torch.full_like(ids, -1))
        new = NewTokens(
            self.model.alignment,
            problem,
            self.transplant.vocabulary,
            self.transplant.tokenizer,
            OmpParameters(approximation=Approximation.SUBWORD),
        )
        make = _mean(new) if self.unsafe_tokens is UnsafeTokens.MEAN else INITIALIZERS[Approximation.SUBWORD].rows(new)
        return SafeRows(found, NewRows(problem, make, None, time.perf_counter() - started))


def replace_unsafe(
    transplant: Transplant,
    model: RecipeModel,
    matrices: Sequence[tuple[VocabularyRole, LoadTensor, int, tuple[PrepareRows, ...]]],
    unsafe_tokens: UnsafeTokens,
) -> ReplaceUnsafe | None:
    """Return the task for one input; None if it has no approximated rows.

    Raises:
        OmpError: if it is not a causal language model.
    """
    if not any(new_rows for *_, new_rows in matrices):
        return None
    check_runs(model, f"unsafe_tokens: {unsafe_tokens.value}")
    return ReplaceUnsafe(
        transplant=transplant,
        model=model,
        matrices=tuple(matrices),
        unsafe_tokens=unsafe_tokens,
    )


def _mean(new: NewTokens) -> RowFunction:
    return lambda weight, _is_head: new.mean_row(weight).expand(len(new.problem.target_ids), *weight.shape[1:])
