"""Wrap functions of mergekit.

Four parts of mergekit 0.1.5 are wrapped: the data model of recipes, the planner, the model card, and ``run_merge``
with functions that it calls. For recipes with a ``merge_method`` of mergekit the wrapped functions behave as before.
"""

import inspect
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from mergekit_omp.parameters import is_ours
from mergekit_omp.plugin.import_hooks import when_imported

if TYPE_CHECKING:
    from mergekit_omp.report.record import Record

LOG = logging.getLogger("mergekit_omp")

_CONNECTED = "_mergekit_omp_connected"

Wrapped = Callable[..., Any]

_current_record: ContextVar["Record | None"] = ContextVar("_current_record", default=None)


def connect_config(config: ModuleType) -> None:
    """Report recipe errors as OmpError, and list the models of a recipe in order."""
    wrappers = {"model_validate": _validate_recipe, "referenced_models": _referenced_models}
    _wrap_once(config, {f"MergeConfiguration.{name}": wrapper for name, wrapper in wrappers.items()})


def connect_methods(merge_methods: ModuleType) -> None:
    """Register ``omp``, and ``omp_<method>`` for every registered method."""
    if not hasattr(merge_methods, "registered_methods"):
        return  # before 0.1.5; running a recipe then raises an OmpError
    import mergekit_omp.plugin.merge_methods  # noqa: F401  # may be partially imported now

    def register(methods: ModuleType) -> None:
        for method in methods.realigned_methods(merge_methods.registered_methods()):
            merge_methods.register(method)

    when_imported("mergekit_omp.plugin.merge_methods", register)


def connect_planner(plan: ModuleType) -> None:
    """Wrap the planner to add realignment tasks before merges."""
    wrappers = {"__init__": _init_planner, "_plan": _plan, "plan_to_disk": _plan_to_disk}
    _wrap_once(plan, {f"MergePlanner.{name}": wrapper for name, wrapper in wrappers.items()})


def connect_run(merge: ModuleType) -> None:
    """Wrap ``run_merge`` to check recipes first, and to publish only complete output."""
    wrappers = {
        "run_merge": _run_merge,
        "get_architecture_info": _get_architecture,
        "_model_out_config": _model_out_config,
        "generate_card": _generate_card,
    }
    _wrap_once(merge, wrappers)


def is_connected() -> bool:
    """Tell whether mergekit's ``run_merge`` is wrapped."""
    from mergekit.merge import run_merge

    return hasattr(run_merge, "__wrapped__")


def connect_card(card: ModuleType) -> None:
    """Wrap the model card so that it treats existing folders as local models, without requests to the hub."""
    _wrap_once(card, {"is_hf": _is_on_the_hub})


def _wrap_once(module: ModuleType, wrappers: dict[str, Wrapped]) -> None:
    if hasattr(module, _CONNECTED):
        return
    setattr(module, _CONNECTED, True)
    for name, wrapper in wrappers.items():
        wrapt.wrap_function_wrapper(module, name, wrapper)


def _is_for_us(config: Any) -> bool:
    """Tell whether a configuration, of any version of mergekit, uses a method of this package."""
    return is_ours(getattr(config, "merge_method", None))


def _validate_recipe(wrapped: Wrapped, _class: Any, args: tuple, kwargs: dict) -> Any:
    recipe = args[0] if args else kwargs.get("obj")
    if not isinstance(recipe, dict) or not is_ours(recipe.get("merge_method")):
        return wrapped(*args, **kwargs)
    from mergekit_omp.recipe.keys import check_keys, explain

    check_keys(recipe)
    try:
        return wrapped(*args, **kwargs)
    except (ValueError, RuntimeError) as error:
        raise explain(recipe, error) from error


def _referenced_models(wrapped: Wrapped, config: Any, args: tuple, kwargs: dict) -> Any:
    """List the models with the base model first, else in order of appearance.

    mergekit lists a set, in another order in each process, and takes config.json, further files and a chat template
    from the first model.
    """
    if not _is_for_us(config):
        return wrapped(*args, **kwargs)
    from mergekit_omp.recipe.blocks import models_in_order

    return list(models_in_order(config))


def _init_planner(wrapped: Wrapped, planner: Any, args: tuple, kwargs: dict) -> Any:
    with suppress(Exception):  # recipes of this package then report an unknown method; others are unaffected
        connect_later_methods()
    return wrapped(*args, **kwargs)


def _plan(wrapped: Wrapped, planner: Any, args: tuple, kwargs: dict) -> Any:
    if not _is_for_us(getattr(planner, "config", None)):
        return wrapped(*args, **kwargs)
    from mergekit_omp.compat import PermutedVocabulary
    from mergekit_omp.errors import OmpError
    from mergekit_omp.output.tied_head import is_redundant_head
    from mergekit_omp.tasks.plan import plan_realignment
    from mergekit_omp.tasks.tasks import OutputTokenizer

    record = planner._omp_record = _record_of(planner)
    result = wrapped(*args, **kwargs)
    planner._tokenizer_task = OutputTokenizer(transplant=record.transplant)
    if not any(isinstance(task.gather_tensors, PermutedVocabulary) for _, task in planner._tensors):
        base = record.transplant.base
        raise OmpError(  # mergekit would write the matrices as they are, beside a tokenizer that they do not fit
            f"{base.key}: mergekit finds no vocabulary matrix in {base}, because it has no data on its architecture "
            "and transformers cannot build the model from its config.json; download the model again."
        )
    weights = [weight for weight, _ in planner._tensors]
    planner._tensors = [
        (weight, task.model_copy(update={"gather_tensors": plan_realignment(task, record)}))
        if isinstance(task.gather_tensors, PermutedVocabulary)
        else (weight, task)
        for weight, task in planner._tensors
        if not is_redundant_head(weight, weights, task.model_order, planner.options.trust_remote_code)
    ]
    return result


def _record_of(planner: Any) -> "Record":
    """Return the record of the run; a new one if the planner was created outside ``run_merge``."""
    record = _current_record.get()
    if record is None:
        from mergekit_omp.recipe.resolve import resolve
        from mergekit_omp.report.record import Record

        record = Record(resolve(planner.config, planner.options))
    return record


def _plan_to_disk(wrapped: Wrapped, planner: Any, args: tuple, kwargs: dict) -> Any:
    tasks = wrapped(*args, **kwargs)
    if not _is_for_us(getattr(planner, "config", None)):
        return tasks
    from mergekit_omp.tasks.tasks import RealignVocabulary, RecordTransplant

    gathered = [task.gather_tensors for _, task in planner._tensors]
    realigned = tuple(task for task in gathered if isinstance(task, RealignVocabulary))
    return [*tasks, RecordTransplant(realigned=realigned, record=planner._omp_record)]


def connect_later_methods() -> None:
    """Register ``omp_<method>`` for methods that were registered in the meantime."""
    from mergekit import merge_methods

    connect_methods(merge_methods)


def _get_architecture(wrapped: Wrapped, _instance: Any, args: tuple, kwargs: dict) -> Any:
    known = wrapped(*args, **kwargs)
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    if not _is_for_us(call.arguments.get("config")):
        return known
    config, options = call.arguments["config"], call.arguments["options"]
    from mergekit.io.tasks import LoaderCache

    from mergekit_omp.checkpoints.architecture import fitting_architecture

    LoaderCache().setup(options)
    return fitting_architecture(known, config.referenced_models(), config.base_model, options)


def _model_out_config(wrapped: Wrapped, _instance: Any, args: tuple, kwargs: dict) -> Any:
    settings = wrapped(*args, **kwargs)
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    if not _is_for_us(call.arguments.get("config")):
        return settings
    from mergekit_omp.output.config import without_ids_of_base
    from mergekit_omp.output.layers import with_layers_of_slices

    config = call.arguments["config"]
    original = config.referenced_models()[0].config(call.arguments.get("trust_remote_code", False))
    with_layers_of_slices(settings, original, config)
    return without_ids_of_base(settings)


def _generate_card(wrapped: Wrapped, _instance: Any, args: tuple, kwargs: dict) -> Any:
    """Reduce a failure of the model card to a warning, so that it does not cost the written weights."""
    try:
        return wrapped(*args, **kwargs)
    except Exception as error:
        call = inspect.signature(wrapped).bind(*args, **kwargs)
        if not _is_for_us(call.arguments.get("config")):
            raise
        LOG.warning(
            "mergekit cannot create the model card (%s: %s); README.md contains only the recipe",
            type(error).__name__,
            error,
        )
        call.apply_defaults()
        return f"# {call.arguments['name']}\n\n```yaml\n{call.arguments['config_yaml']}\n```\n"


def _is_on_the_hub(wrapped: Wrapped, _instance: Any, args: tuple, kwargs: dict) -> Any:
    path = inspect.signature(wrapped).bind(*args, **kwargs).arguments["path"]
    if _current_record.get() is not None and os.path.exists(path):
        return False
    return wrapped(*args, **kwargs)


def _run_merge(wrapped: Wrapped, _instance: Any, args: tuple, kwargs: dict) -> Any:
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    if not _is_for_us(call.arguments.get("merge_config")):
        return wrapped(*args, **kwargs)
    from mergekit_omp.collection import old_objects_kept

    with old_objects_kept():
        return _run_recipe(wrapped, call)


def _run_recipe(wrapped: Wrapped, call: inspect.BoundArguments) -> Any:
    from mergekit_omp.compat import require_supported

    require_supported()
    config, options = call.arguments["merge_config"], call.arguments["options"]
    from mergekit_omp.checkpoints.input_folders import InputFolders
    from mergekit_omp.collection import collection_paused
    from mergekit_omp.errors import explained
    from mergekit_omp.output.config import finish_output
    from mergekit_omp.output.staging import staged
    from mergekit_omp.recipe.blocks import named_models
    from mergekit_omp.recipe.model_checks import check_checkpoints
    from mergekit_omp.recipe.resolve import resolve
    from mergekit_omp.report.record import Record
    from mergekit_omp.report.run_log import log_start, log_summary, run_lines

    started = time.perf_counter()
    connect_later_methods()
    with run_lines(quiet=options.quiet):
        inputs = InputFolders(model.model.path for model in named_models(config))
        with inputs.unchanged():
            transplant = resolve(config, options)
            check_checkpoints(transplant)
        record = Record(transplant)
        out_path = call.arguments["out_path"]
        with explained(out_path), staged(out_path) as folder, inputs.unchanged():
            call.arguments["out_path"] = str(folder)
            log_start(transplant)
            with _recording(record):
                result = wrapped(*call.args, **call.kwargs)
            with collection_paused():
                finish_output(folder, transplant)
                seconds = time.perf_counter() - started
                record.write(folder, seconds)
        log_summary(record, out_path, seconds)
    return result


@contextmanager
def _recording(record: "Record") -> Iterator[None]:
    """Make the resolved recipe and record available to the planner of this run."""
    token = _current_record.set(record)
    try:
        yield
    finally:
        _current_record.reset(token)
