"""The seam into mergekit, and the only file that knows its internals.

Four things of mergekit 0.1.5 are connected to: the recipe's data model, the registry of merge methods, the planner,
and ``run_merge``. Recipes whose ``merge_method`` is not ours go through the wrapped functions unchanged.
"""

import inspect
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType, SimpleNamespace
from typing import Any

import wrapt

from mergekit_omp.errors import OmpError
from mergekit_omp.names import is_ours
from mergekit_omp.plugin.import_hooks import when_imported

LOG = logging.getLogger("mergekit_omp")

SUPPORTED = ">=0.1.5,<0.2"
_CONNECTED = "_mergekit_omp_connected"

Wrapped = Callable[..., Any]


def connect_config(config: ModuleType) -> None:
    """Have the mistakes in the text of a recipe of ours told in sentences."""
    _wrap_once(config, {"MergeConfiguration.model_validate": _validate_recipe})


def connect_methods(merge_methods: ModuleType) -> None:
    """Register ``omp`` and an ``omp_<method>`` for every method that is registered."""
    if not hasattr(merge_methods, "registered_methods"):
        return  # before 0.1.5; a recipe of ours is refused when it runs
    import mergekit_omp.plugin.merge_methods  # noqa: F401, it may be what imports mergekit, and so be half imported itself

    def register(methods: ModuleType) -> None:
        for method in methods.realigned_methods(merge_methods.registered_methods()):
            merge_methods.register(method)

    when_imported("mergekit_omp.plugin.merge_methods", register)


def connect_planner(plan: ModuleType) -> None:
    """Have the planner put our tasks in front of our methods."""
    wrappers = {"__init__": _init_planner, "_plan": _plan, "plan_to_disk": _plan_to_disk}
    _wrap_once(plan, {f"MergePlanner.{name}": wrapper for name, wrapper in wrappers.items()})


def connect_run(merge: ModuleType) -> None:
    """Have ``run_merge`` check a recipe of ours first, and publish its output only when it is whole."""
    wrappers = {
        "run_merge": _run_merge,
        "get_architecture_info": _get_architecture,
        "_model_out_config": _model_out_config,
    }
    _wrap_once(merge, wrappers)


def _wrap_once(module: ModuleType, wrappers: dict[str, Wrapped]) -> None:
    if hasattr(module, _CONNECTED):
        return
    setattr(module, _CONNECTED, True)
    for name, wrapper in wrappers.items():
        wrapt.wrap_function_wrapper(module, name, wrapper)


def require_supported() -> None:
    """Raise an OmpError unless everything that this file uses is where it expects it."""
    from mergekit import merge_methods
    from mergekit import plan as plan_module

    planner = getattr(plan_module, "MergePlanner", None)
    if hasattr(merge_methods, "registered_methods") and all(
        hasattr(planner, name) for name in ("_plan", "plan_to_disk", "plan_tensor", "normalize_config")
    ):
        return
    from importlib.metadata import version

    raise OmpError(
        f"merge_method: omp works with mergekit{SUPPORTED}, but mergekit {version('mergekit')} is installed; "
        f"run `pip install 'mergekit{SUPPORTED}'`."
    )


def _is_for_us(config: Any) -> bool:
    """Whether a configuration, of whatever version of mergekit, asks for a method of ours."""
    return is_ours(getattr(config, "merge_method", None))


def _validate_recipe(wrapped: Wrapped, _class: Any, args: tuple, kwargs: dict) -> Any:
    recipe = args[0] if args else kwargs.get("obj")
    method = recipe.get("merge_method") if isinstance(recipe, dict) else None
    if not is_ours(method):
        return wrapped(*args, **kwargs)
    from mergekit_omp.recipe.keys import check_keys, explain

    check_keys(recipe)
    try:
        return wrapped(*args, **kwargs)
    except (ValueError, RuntimeError) as error:
        raise explain(recipe, error) from error


def _init_planner(wrapped: Wrapped, planner: Any, args: tuple, kwargs: dict) -> Any:
    with suppress(Exception):  # recipes of ours then find no method; others are none of our business
        connect_later_methods()
    return wrapped(*args, **kwargs)


def _plan(wrapped: Wrapped, planner: Any, args: tuple, kwargs: dict) -> Any:
    if not _is_for_us(getattr(planner, "config", None)):
        return wrapped(*args, **kwargs)
    from mergekit.tokenizer import PermutedVocabulary

    from mergekit_omp.output.tied_head import is_redundant_head
    from mergekit_omp.recipe.checks import check_recipe
    from mergekit_omp.tasks.plan import plan_realignment

    output = check_recipe(planner.config, planner.options)
    result = wrapped(*args, **kwargs)
    planner._tokenizer_task = output
    weights = [weight for weight, _ in planner._tensors]
    planner._tensors = [
        (weight, task.model_copy(update={"gather_tensors": plan_realignment(task, output, planner.options)}))
        if isinstance(task.gather_tensors, PermutedVocabulary)
        else (weight, task)
        for weight, task in planner._tensors
        if not is_redundant_head(weight, weights, task.model_order, planner.options.trust_remote_code)
    ]
    return result


def _plan_to_disk(wrapped: Wrapped, planner: Any, args: tuple, kwargs: dict) -> Any:
    tasks = wrapped(*args, **kwargs)
    if not _is_for_us(getattr(planner, "config", None)):
        return tasks
    from mergekit_omp.tasks.tasks import RealignVocabulary, SummarizeTransplant

    realigned = [task.gather_tensors for _, task in planner._tensors]
    realigned = tuple(task for task in realigned if isinstance(task, RealignVocabulary))
    out_path = inspect.signature(wrapped).bind(*args, **kwargs).arguments["out_path"]
    return [*tasks, SummarizeTransplant(realigned=realigned, out_path=out_path)]


def connect_later_methods() -> None:
    """Register an ``omp_<method>`` for methods that were registered since."""
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
    if not _is_for_us(inspect.signature(wrapped).bind(*args, **kwargs).arguments.get("config")):
        return settings
    from mergekit_omp.output.config import without_ids_of_base

    return without_ids_of_base(settings)


def chat_template_of(config: Any) -> str | None:
    """The text of the chat template that a recipe asks for; None where the tokenizer keeps its own."""
    if not config.chat_template:
        return None
    from mergekit.merge import _set_chat_template

    holder = SimpleNamespace(chat_template=None)
    _set_chat_template(holder, config)
    return holder.chat_template


def _run_merge(wrapped: Wrapped, _instance: Any, args: tuple, kwargs: dict) -> Any:
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    if not _is_for_us(call.arguments.get("merge_config")):
        return wrapped(*args, **kwargs)
    require_supported()
    config, options = call.arguments["merge_config"], call.arguments["options"]
    from mergekit_omp.checkpoints import tokenizers as vocabularies
    from mergekit_omp.failures import told
    from mergekit_omp.output.config import finish_output
    from mergekit_omp.output.staging import staged
    from mergekit_omp.recipe.checks import check_inputs, check_recipe
    from mergekit_omp.report.record import complete_record

    started = time.perf_counter()
    connect_later_methods()
    vocabularies.forget()
    with _log_level(logging.ERROR if options.quiet else logging.INFO):
        output = check_recipe(config, options)
        check_inputs(config, output, options)
        out_path = call.arguments["out_path"]
        with told(out_path), staged(out_path) as folder:
            call.arguments["out_path"] = str(folder)
            result = wrapped(*call.args, **call.kwargs)
            finish_output(folder, config, output, options)
            complete_record(folder, config, output, options, time.perf_counter() - started)
    return result


@contextmanager
def _log_level(level: int) -> Iterator[None]:
    """Our lines are shown unless the run is quiet, whatever the level that mergekit's ``-v`` sets for its own."""
    before = LOG.level
    LOG.setLevel(level)
    try:
        yield
    finally:
        LOG.setLevel(before)
