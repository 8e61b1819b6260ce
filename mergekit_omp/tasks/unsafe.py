"""Make approximated rows that the audit flags again without the donor's rows, for ``unsafe_tokens``."""

import time
from dataclasses import replace

import torch
from mergekit.graph import Task
from mergekit.io.tasks import LoadTensor
from pydantic import InstanceOf

from mergekit_omp.audit.unsafe import find_unsafe
from mergekit_omp.evaluation.bits_per_byte import builtin_texts
from mergekit_omp.initializers.base import NewTokens, RowFunction
from mergekit_omp.initializers.registry import INITIALIZERS
from mergekit_omp.parameters import Approximation, OmpParameters, UnsafeTokens
from mergekit_omp.recipe.transplant import RecipeModel, Transplant
from mergekit_omp.tasks.hidden_states import check_runs, load_complete
from mergekit_omp.tasks.placement import on_the_cpu
from mergekit_omp.tasks.tasks import NewRows, PrepareRows, SafeRows


class ReplaceUnsafe(Task[SafeRows]):
    """Check the rows that an input's head gets, on states of the complete input, and prepare others for flagged ones.

    The rows of the input embedding are replaced where those of the head are.
    """

    transplant: InstanceOf[Transplant]
    model: InstanceOf[RecipeModel]
    new_rows: tuple[PrepareRows, ...]  # for the head
    head: LoadTensor  # the input embedding if the two are tied
    head_axis: int
    unsafe_tokens: UnsafeTokens

    def arguments(self) -> dict[str, Task]:
        """Return the tasks of the head and of the rows that are made for it."""
        return {"head": self.head, **{f"rows_{index}": rows for index, rows in enumerate(self.new_rows)}}

    def uses_accelerator(self) -> bool:
        """Run the model on mergekit's device."""
        return True

    @on_the_cpu
    def execute(self, head: torch.Tensor, **prepared: NewRows) -> SafeRows:
        """Run the model, and check the rows of all donors."""
        started = time.perf_counter()
        weight = head.movedim(self.head_axis, 0)
        new_rows = [prepared[f"rows_{index}"] for index in range(len(self.new_rows))]
        model = load_complete(self.model, f"unsafe_tokens: {self.unsafe_tokens.value}")
        found = find_unsafe(
            model.to(weight.device),  # type: ignore[arg-type]  # transformers' annotation of `to` lacks self
            self.model.alignment,
            self.transplant.vocabulary,
            torch.cat([new.problem.target_ids for new in new_rows]),
            torch.cat([new.make(weight, True) for new in new_rows]),
            [*builtin_texts("tuning").values(), *builtin_texts().values()],
            progress=not self.transplant.options.quiet,
        )
        if not found.flagged:
            return SafeRows(found, None)
        ids = torch.tensor([check.id for check in found.flagged])
        problem = replace(new_rows[0].problem, target_ids=ids, target_rows=torch.full_like(ids, -1))
        new = NewTokens.of(
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
    new_rows: tuple[PrepareRows, ...],
    head: tuple[LoadTensor, int],
    unsafe_tokens: UnsafeTokens,
) -> ReplaceUnsafe | None:
    """Return the task for one input; None if it has no approximated rows.

    Raises:
        OmpError: if it is not a causal language model.
    """
    if not new_rows:
        return None
    check_runs(model, f"unsafe_tokens: {unsafe_tokens.value}")
    weight, axis = head
    return ReplaceUnsafe(
        transplant=transplant,
        model=model,
        new_rows=new_rows,
        head=weight,
        head_axis=axis,
        unsafe_tokens=unsafe_tokens,
    )


def _mean(new: NewTokens) -> RowFunction:
    return lambda weight, _is_head: new.mean_row(weight).expand(len(new.problem.target_ids), *weight.shape[1:])
