"""Rotary positions in config.json, of today (`rope_parameters`) and of before (`rope_theta` and `rope_scaling`)."""

from collections.abc import Mapping
from typing import Any

from frugalmoe.convert.keys import Keys
from frugalmoe.schema import Model, RopeScaling

_KINDS = {"default": "none", "linear": "linear", "yarn": "yarn", "llama3": "llama3"}
# Key of theirs -> field of ours, by kind.
_FIELDS = {
    "none": {},
    "linear": {"factor": "factor"},
    "yarn": {
        "factor": "factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    },
    "llama3": {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
}
_LENGTH, _LONGEST = "original_max_position_embeddings", "max_position_embeddings"


def to_ours(keys: Keys, theta: float, fraction: float) -> dict[str, Any]:
    """Returns fields of our `model`; `theta` and `fraction` of a head are the family's where the file names none."""
    new, old = keys.section("rope_parameters"), keys.section("rope_scaling")
    fraction = keys.get("partial_rotary_factor", fraction)
    theta = keys.get("rope_theta", theta)
    has_new = "rope_parameters" in keys
    scaling = new if has_new else old
    if has_new and "rope_scaling" in keys:
        raise keys.refused("rope_scaling", keys.get("rope_scaling"), "stands beside rope_parameters; remove one")
    kind = scaling.get("rope_type", "default", also=("type",))
    if kind not in tuple(_KINDS):  # it may be anything that JSON has
        raise keys.refused("rope_type", kind, f"is not implemented; valid: {', '.join(_KINDS)}")
    fields = {
        "rope_theta": float(_number(scaling, "rope_theta", theta)),
        "rope_fraction": float(_number(scaling, "partial_rotary_factor", fraction)),
        "rope_scaling.kind": _KINDS[kind],
    }
    for name, field in _FIELDS[_KINDS[kind]].items():
        default = getattr(RopeScaling(), field)
        value = scaling.get(name, default)
        fields[f"rope_scaling.{field}"] = value if type(default) is bool else float(_number(scaling, name, default))
    if kind in ("yarn", "llama3"):
        length = scaling.integer(_LENGTH) if _LENGTH in scaling else keys.integer(_LONGEST)
        fields["rope_scaling.original_length"] = length
        if "factor" not in scaling and length:
            fields["rope_scaling.factor"] = keys.integer(_LONGEST) / length
    scaling.check_all_asked()
    return fields


def _number(keys: Keys, name: str, default: Any) -> float:
    value = keys.get(name, default)
    if type(value) not in (int, float):
        raise keys.refused(name, value, "must be a number")
    return value


def to_theirs(model: Model) -> dict[str, Mapping[str, Any]]:
    """Returns `rope_parameters`."""
    scaling, kind = model.rope_scaling, model.rope_scaling.kind
    found = {"rope_type": next(name for name, own in _KINDS.items() if own == kind), "rope_theta": model.rope_theta}
    found["partial_rotary_factor"] = model.rope_fraction
    for name, field in _FIELDS[kind].items():
        value, default = getattr(scaling, field), getattr(RopeScaling(), field)
        if value != default or name == "factor" or kind == "llama3":
            found[name] = value
    if kind in ("yarn", "llama3"):
        found[_LENGTH] = scaling.original_length
    return {"rope_parameters": found}
