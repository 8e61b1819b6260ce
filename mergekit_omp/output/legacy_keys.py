"""Add the keys of transformers 4 to a config.json of transformers 5, for transformers 4 and engines that read them.

Engines that look for ``rope_theta`` and find ``rope_parameters`` silently use 10,000.
"""

from collections.abc import Mapping
from typing import Any

_RENAMED = {"dtype": "torch_dtype", "num_local_experts": "num_experts"}
"""Keys of transformers 5 and their names in transformers 4, which reads both if it knows both."""

_ROPE_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
_ROPE_BY_MODEL_TYPE = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "modernbert": {"rope_theta": "global_rope_theta", "rope_local_base_freq": "local_rope_theta"},
    "modernbert-decoder": {"rope_theta": "global_rope_theta", "rope_local_base_freq": "local_rope_theta"},
}


def add_legacy_keys(settings: dict[str, Any], original: Mapping[str, Any] | None = None) -> None:
    """Add the keys of transformers 4 to a configuration of transformers 5 and its nested parts, in place.

    Args:
        settings: the configuration that transformers 5 wrote.
        original: config.json of the base. Its RoPE settings under the older keys are copied, since the body is the
            same.
    """
    original = original or {}
    for key, value in list(settings.items()):
        settings[key] = _plain_numbers(value)
        if isinstance(value, dict) and key != "rope_parameters":
            nested = original.get(key)
            add_legacy_keys(value, nested if isinstance(nested, Mapping) else None)
    for new, old in _RENAMED.items():
        if new in settings and (old not in settings or new == "dtype"):
            settings[old] = settings[new]
    rope = settings.get("rope_parameters")
    if not isinstance(rope, Mapping) or not rope:
        return
    names = _ROPE_BY_MODEL_TYPE.get(settings.get("model_type", ""), {})
    legacy = legacy_rope(rope)
    if legacy["rope_scaling"] is not None and "original_max_position_embeddings" in settings:
        legacy["rope_scaling"].pop("original_max_position_embeddings", None)  # Phi-3 has it at the top level only
    for key, value in legacy.items():
        name = names.get(key, key)
        settings.setdefault(name, original.get(name, value))


def legacy_rope(rope_parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Convert ``rope_parameters`` to the keys of Llama and Gemma 3 in transformers 4.

    Args:
        rope_parameters: one set of parameters, or one for ``full_attention`` and one for ``sliding_attention``.

    Returns:
        ``rope_theta``, ``rope_scaling`` (None without scaling), ``partial_rotary_factor`` if it is set, and
        ``rope_local_base_freq`` of layers with a sliding window.

    Example:
        >>> from mergekit_omp.output.legacy_keys import legacy_rope
        >>> legacy_rope({"rope_theta": 500000.0, "rope_type": "default"})
        {'rope_theta': 500000.0, 'rope_scaling': None}
    """
    by_layer = {name: part for name, part in rope_parameters.items() if isinstance(part, Mapping)}
    full = by_layer.get("full_attention", {}) if by_layer else rope_parameters
    result = {key: full[key] for key in ("rope_theta", "partial_rotary_factor") if key in full}
    result["rope_scaling"] = _rope_scaling(full)
    sliding = by_layer.get("sliding_attention", {})
    if "rope_theta" in sliding:
        result["rope_local_base_freq"] = sliding["rope_theta"]
    return result


def _rope_scaling(rope_parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    scaling = {key: value for key, value in rope_parameters.items() if key not in _ROPE_KEYS}
    kind = scaling.pop("rope_type", scaling.get("type", "default"))
    scaling.pop("type", None)
    if kind == "longrope":  # the class of Phi-3 in transformers 4 requires this key
        return {"type": kind, **scaling}
    return {"rope_type": kind, **scaling} if scaling or kind != "default" else None


def _plain_numbers(value: Any) -> Any:
    """Convert mappings for infinity, which only transformers 5 reads, to numbers, which both versions read."""
    if isinstance(value, list):
        return [_plain_numbers(part) for part in value]
    return float(value["__float__"]) if isinstance(value, dict) and set(value) == {"__float__"} else value
