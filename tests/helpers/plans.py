"""Print the tasks that mergekit plans for recipes of all of its methods, as JSON; run by test_environment."""

import itertools
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

import mergekit.merge
from mergekit import merge_methods
from mergekit.architecture import get_architecture_info
from mergekit.common import ImmutableMap
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import _model_out_config
from mergekit.merge_methods.base import MergeMethod
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from pydantic import BaseModel


def described(value: Any) -> Any:
    """Return a task with all its fields, without addresses of objects."""
    if isinstance(value, MergeMethod):
        return f"method {value.spec.name}"
    if isinstance(value, BaseModel):
        fields = {name: described(member) for name, member in value}
        if "referenced_models" in fields:
            fields["referenced_models"].sort(key=str)  # mergekit lists a set
        return [type(value).__qualname__, fields]
    if isinstance(value, ImmutableMap | Mapping):
        return sorted([str(described(key)), described(member)] for key, member in value.items())
    if isinstance(value, list | tuple):
        return [described(member) for member in value]
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def plan(recipe: dict[str, Any]) -> str:
    options = MergeOptions()
    try:
        config = MergeConfiguration.model_validate(recipe)
        architecture = get_architecture_info(config, options)
        LoaderCache().setup(options=options)
        planner = MergePlanner(config, architecture, options, _model_out_config(config, architecture))
        return f"tasks {json.dumps(described(planner.plan_to_disk(out_path='out')))}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def recipes(models: list[str]) -> dict[str, dict[str, Any]]:
    found = {}
    for method in merge_methods.registered_methods():
        name = method.spec.name
        if name.startswith("omp"):
            continue
        parameters = {p.name: 0.5 for p in method.spec.parameters if p.required}
        for count, tokenizer in itertools.product((1, 2, 3), (None, "base", "union")):
            recipe = {
                "merge_method": name,
                "base_model": models[0],
                "models": [{"model": model} for model in models[:count]],
                "parameters": parameters,
                "unknown_key": "ignored",
            }
            if tokenizer:
                recipe["tokenizer"] = {"source": tokenizer}
            found[f"{name}, {count} models, tokenizer {tokenizer}"] = recipe
            found[f"{name}, {count} models, tokenizer {tokenizer}, no base"] = {**recipe, "base_model": None}
    return found


if __name__ == "__main__":
    plans = {name: plan(recipe) for name, recipe in recipes(sys.argv[1:]).items()}
    plans["connected"] = hasattr(mergekit.merge.run_merge, "__wrapped__")
    print(f"PLANS {json.dumps(plans)}")
