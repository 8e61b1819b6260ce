"""Plan the tasks of a resolved recipe: the solves that each vocabulary tensor of the output needs."""

from collections.abc import Iterable, Sequence

from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.io.tasks import GatherTensors, LoadTensor
from mergekit.tokenizer.config import TokenEmbeddingConfig

from mergekit_omp.checkpoints.architecture import VocabularyRole, vocabulary_role
from mergekit_omp.checkpoints.weights import vocabulary_matrix
from mergekit_omp.compat import ExecuteMergeMethodTask, PermutedVocabulary
from mergekit_omp.initializers.registry import initializer_of, needs_donor
from mergekit_omp.parameters import Numerals, OmpParameters, UnsafeTokens
from mergekit_omp.recipe.copies import Copies, find_copies
from mergekit_omp.recipe.overrides import source_model
from mergekit_omp.recipe.transplant import RecipeModel, Transplant
from mergekit_omp.report.record import Record
from mergekit_omp.tasks.hidden_states import find_logit_shift
from mergekit_omp.tasks.tasks import (
    PoseProblem,
    PrepareRows,
    RealignedInput,
    RealignVocabulary,
    SolveCodes,
    split_new_tokens,
)
from mergekit_omp.tasks.undertrained import find_trained_rows
from mergekit_omp.tasks.unsafe import ReplaceUnsafe, replace_unsafe


def plan_realignment(task: ExecuteMergeMethodTask, record: Record) -> RealignVocabulary:
    """Return the task that replaces mergekit's ``PermutedVocabulary`` before the merge of one tensor.

    Raises:
        OmpError: if a required donor has no weights.
    """
    transplant = record.transplant
    permuted = task.gather_tensors
    assert isinstance(permuted, PermutedVocabulary)
    role = vocabulary_role(task.output_weight.name)
    merged = task.model_order
    inputs = []
    for reference in merged:
        model = transplant.model(reference)
        parameters = OmpParameters.from_bound(dict(task.input_parameters[reference].items()))
        copies = find_copies(model, role, parameters, merged, transplant)
        if task.output_weight.name.endswith(".bias"):  # only the matrix of an unmerged donor is known
            copies = copies.among([transplant.model(input_reference) for input_reference in merged])
        new_rows = _plan_rows(model, role, parameters, copies, transplant)
        is_checked = parameters.unsafe_tokens is UnsafeTokens.KEEP and needs_donor(parameters)
        inputs.append(
            RealignedInput(
                model=model,
                new_rows=new_rows,
                split=split_new_tokens(transplant, model, new_rows) if is_checked else None,
                safe_rows=_plan_safe_rows(model, parameters, merged, transplant),
                copies=copies,
                copied_weights=tuple(
                    (other, *vocabulary_matrix(other.reference, role, transplant.options, other.key))
                    for other in copies.models
                    if other.reference not in merged
                ),
                parameters=parameters,
            )
        )
    overrides = permuted.tokens or {}
    return RealignVocabulary(
        transplant=transplant,
        gather_tensors=_with_sources(permuted.gather_tensors, overrides.values(), task.output_weight),
        inputs=tuple(inputs),
        overrides=tuple(overrides.items()),
        vocabulary_axis=permuted.vocabulary_axis,
        name=task.output_weight.name,
        record=record,
    )


def _with_sources(
    gather: GatherTensors, overrides: Iterable[TokenEmbeddingConfig], weight: WeightInfo
) -> GatherTensors:
    """Load the tensor of overrides' sources, too: one slice's models are merged, and a source may be in another."""
    sources = [source for override in overrides if (source := source_model(override)) is not None]
    weights = dict.fromkeys(sources, weight) | dict(gather.weight_info.items())
    return gather.model_copy(update={"weight_info": ImmutableMap(data=weights)})


def _plan_rows(
    model: RecipeModel, role: VocabularyRole, parameters: OmpParameters, copies: Copies, transplant: Transplant
) -> tuple[PrepareRows, ...]:
    """Return one task per donor of new tokens that are not copied and that no earlier donor has."""
    initializer, options = initializer_of(parameters), transplant.options
    solves = initializer.solves
    base_trained = find_trained_rows(model, options) if parameters.magikarp else None
    model_weights = (
        tuple(vocabulary_matrix(model.reference, side, options, model.key) for side in VocabularyRole)
        if initializer.reads_both
        else ()
    )
    logit_shift = find_logit_shift(model) if parameters.numerals is Numerals.DIGITS else None
    copied = copies.ids(model.match)
    planned = []
    for posed in transplant.problems[model.alignment]:
        # Under-trained tokens are known once the tensors are loaded; a model is never its own donor for them.
        if not len(posed.problem.without(copied).target_ids) and (not parameters.magikarp or posed.donor is model):
            continue
        initializer.check(parameters, "parameters")
        pose = PoseProblem(
            posed=posed,
            copies=copies,
            base_trained=base_trained,
            donor_trained=find_trained_rows(posed.donor, options) if parameters.magikarp else None,
        )
        weight, axis = None, 0
        if needs_donor(parameters):
            weight, axis = vocabulary_matrix(posed.donor.reference, role, options, posed.donor.key)
        planned.append(
            PrepareRows(
                transplant=transplant,
                pose=pose,
                parameters=parameters,
                solve=_plan_solve(pose, weight, axis, parameters, transplant) if solves and weight else None,
                donor_weight=weight if initializer.reads_donor(parameters) else None,
                vocabulary_axis=axis,
                logit_shift=logit_shift,
                model_weights=model_weights,
                model=model if initializer.reads_configs else None,
            )
        )
    return tuple(planned)


def _plan_safe_rows(
    model: RecipeModel, parameters: OmpParameters, merged: Sequence[ModelReference], transplant: Transplant
) -> ReplaceUnsafe | None:
    """Return the task that replaces flagged rows; the same for both sides, if these have the same parameters."""
    if parameters.unsafe_tokens is UnsafeTokens.KEEP:
        return None
    matrices = {}
    for role in VocabularyRole:  # a tied head gets the rows of the input embedding
        load, axis = vocabulary_matrix(model.reference, role, transplant.options, model.key)
        if load not in matrices:
            copies = find_copies(model, role, parameters, merged, transplant)
            matrices[load] = (role, load, axis, _plan_rows(model, role, parameters, copies, transplant))
    return replace_unsafe(transplant, model, list(matrices.values()), parameters.unsafe_tokens)


def _plan_solve(
    pose: PoseProblem, weight: LoadTensor, axis: int, parameters: OmpParameters, transplant: Transplant
) -> SolveCodes:
    return SolveCodes(
        pose=pose,
        donor_weight=weight,
        vocabulary_axis=axis,
        k=parameters.k,
        normalize_atoms=parameters.normalize_atoms,
        memory_budget=parameters.memory_budget,
        all_devices=transplant.options.multi_gpu,
        quiet=transplant.options.quiet,
    )
