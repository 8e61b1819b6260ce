"""From a recipe to tasks: which solves each vocabulary tensor of the output needs."""

from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoadTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.tokenizer import PermutedVocabulary

from mergekit_omp.checkpoints.architecture import VocabularyRole, donor_weight, vocabulary_role
from mergekit_omp.checkpoints.tokenizers import OutputTokenizer, vocabulary_of
from mergekit_omp.initializers.registry import method_of, needs_donor
from mergekit_omp.parameters import Numerals, OmpParameters
from mergekit_omp.plugin.patches import chat_template_of
from mergekit_omp.realign.rows import pose_problem
from mergekit_omp.recipe.overrides import asks_to_approximate
from mergekit_omp.tasks.hidden_states import find_logit_shift
from mergekit_omp.tasks.tasks import (
    MatchVocabulary,
    PoseProblem,
    PrepareRows,
    RealignedInput,
    RealignVocabulary,
    SolveCodes,
)
from mergekit_omp.tasks.undertrained import find_trained_rows


def blocks_of(config: MergeConfiguration) -> list[tuple[str, Any]]:
    """What lists models or slices, with the path to it: the recipe itself, and each of its modules."""
    return [("", config), *((f"modules.{name}.", module) for name, module in (config.modules or {}).items())]


def models_in_order(config: MergeConfiguration) -> tuple[ModelReference, ...]:
    """Every model that a recipe merges, the base model first, then as listed; mergekit's own list is in no order."""
    blocks = [block for _, block in blocks_of(config)]
    listed = [m.model for block in blocks for m in block.models or ()]
    sliced = [s.model for block in blocks for part in block.slices or () for s in part.sources]
    base = [config.base_model] if config.base_model else []
    return tuple(dict.fromkeys([*base, *listed, *sliced]))


def output_tokenizer(config: MergeConfiguration, options: MergeOptions) -> OutputTokenizer:
    """The task that builds the recipe's output tokenizer."""
    section = config.tokenizer
    overrides = (section and section.tokens) or {}
    return OutputTokenizer(
        base_model=config.base_model,
        referenced_models=models_in_order(config),
        tokenizer_source=section.source if section else config.tokenizer_source,
        trust_remote_code=options.trust_remote_code,
        add_tokens=tuple(overrides),
        approximated=tuple(token for token, override in overrides.items() if asks_to_approximate(override)),
        overridden=tuple(token for token, override in overrides.items() if override.source is not None),
        chat_template=chat_template_of(config),
    )


def plan_realignment(
    task: ExecuteMergeMethodTask, output: OutputTokenizer, options: MergeOptions
) -> RealignVocabulary:
    """The task that takes the place of mergekit's ``PermutedVocabulary`` in front of one merge.

    Raises:
        OmpError: where a donor that is needed has no weights.
    """
    permuted: PermutedVocabulary = task.gather_tensors
    return RealignVocabulary(
        gather_tensors=permuted.gather_tensors,
        output=output,
        inputs=tuple(_plan_input(model, task, output, options) for model in task.model_order),
        overrides=tuple((permuted.tokens or {}).items()),
        pad_to_multiple_of=permuted.pad_to_multiple_of,
        vocabulary_axis=permuted.vocabulary_axis,
        name=task.output_weight.name,
    )


def _plan_input(
    model: ModelReference, task: ExecuteMergeMethodTask, output: OutputTokenizer, options: MergeOptions
) -> RealignedInput:
    parameters = OmpParameters.from_bound(task.input_parameters[model])
    return RealignedInput(
        model=model,
        match=MatchVocabulary(output=output, model=model),
        new_rows=_plan_rows(model, vocabulary_role(task.output_weight.name), parameters, output, options),
        parameters=parameters,
    )


def _plan_rows(
    model: ModelReference,
    role: VocabularyRole,
    parameters: OmpParameters,
    output: OutputTokenizer,
    options: MergeOptions,
) -> tuple[PrepareRows, ...]:
    """One task for every donor that has tokens which neither the model nor an earlier donor has."""
    method = method_of(parameters)
    base = MatchVocabulary(output=output, model=_first_with_vocabulary_of(model, output))
    donors = [MatchVocabulary(output=output, model=donor) for donor in output.donors()]
    base_trained = find_trained_rows(model, options) if parameters.magikarp else None
    own = tuple(donor_weight(model, each, options) for each in VocabularyRole) if method.reads_both else ()
    logit_shift = find_logit_shift(model, options) if parameters.numerals is Numerals.DIGITS else None
    planned = []
    for count, donor in enumerate(output.donors(), start=1):
        *earlier, match = (each.execute() for each in donors[:count])
        lacks = len(pose_problem(base.execute(), match, earlier).target_ids) > 0
        # Which tokens are under-trained is known once the tensors are loaded; a model teaches itself nothing.
        if not lacks and (not parameters.magikarp or donor == model):
            continue
        method.check(parameters, "parameters")
        pose = PoseProblem(
            base=base,
            donors=tuple(donors[:count]),
            base_trained=base_trained,
            donor_trained=find_trained_rows(donor, options) if parameters.magikarp else None,
        )
        weight, axis = donor_weight(donor, role, options) if needs_donor(parameters) else (None, 0)
        planned.append(
            PrepareRows(
                pose=pose,
                parameters=parameters,
                solve=_plan_solve(pose, weight, axis, parameters, options) if method.solves else None,
                donor_weight=weight if method.reads_donor(parameters) else None,
                vocabulary_axis=axis,
                logit_shift=logit_shift,
                own_weights=own,
            )
        )
    return tuple(planned)


def _plan_solve(
    pose: PoseProblem, weight: LoadTensor, axis: int, parameters: OmpParameters, options: MergeOptions
) -> SolveCodes:
    return SolveCodes(
        pose=pose,
        donor_weight=weight,
        vocabulary_axis=axis,
        k=parameters.k,
        normalize_atoms=parameters.normalize_atoms,
        memory_budget=parameters.memory_budget,
        all_devices=options.multi_gpu,
        quiet=options.quiet,
    )


def _first_with_vocabulary_of(model: ModelReference, output: OutputTokenizer) -> ModelReference:
    """The first model of the recipe with the same vocabulary, so that fine-tunes of one base share their solves."""
    trust = output.trust_remote_code
    wanted = vocabulary_of(model, trust).fingerprint
    return next(m for m in (*output.referenced_models, model) if vocabulary_of(m, trust).fingerprint == wanted)
