"""Rotary positions in config.json, of today (`rope_parameters`) and of before (`rope_theta` and `rope_scaling`)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from frugalmoe.convert.keys import Keys
from frugalmoe.schema import Model, RopeScaling

_KINDS = {"default": "none", "linear": "linear", "yarn": "yarn", "llama3": "llama3", "dynamic": "ntk"}
KINDS = ("default", "linear", "yarn", "llama3")  # those that most families read
_ALPHA = "alpha"
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
    "ntk": {_ALPHA: "factor"},
    "llama3": {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
}
_WHOLE, _WINDOWS = "full_attention", "sliding_attention"
# Released beside `alpha`; no code of Hunyuan reads them.
_BESIDE_ALPHA = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_LENGTH, _LONGEST = "original_max_position_embeddings", "max_position_embeddings"


def to_ours(
    keys: Keys, theta: float, fraction: float, by_kind: bool = False, kinds: tuple[str, ...] = KINDS
) -> dict[str, Any]:
    """Returns fields of our `model`; `theta` and `fraction` of a head are the family's where the file names none.

    kinds: the values of `rope_type` that the family reads as we do. by_kind: `rope_parameters` are an object for each
    kind of layer, and that of windows may stretch nothing.
    """
    new, old = keys.section("rope_parameters"), keys.section("rope_scaling")
    fraction = keys.get("partial_rotary_factor", fraction)
    theta = keys.get("rope_theta", theta)
    has_new = "rope_parameters" in keys
    if by_kind and has_new:
        new = _of_whole(new, theta, fraction)
    scaling = new if has_new else old
    if has_new and "rope_scaling" in keys:
        raise keys.refused("rope_scaling", keys.get("rope_scaling"), "stands beside rope_parameters; remove one")
    kind = scaling.get("rope_type", "default", also=("type",))
    if kind not in kinds:  # it may be anything that JSON has
        raise keys.refused("rope_type", kind, f"is not implemented; valid: {', '.join(kinds)}")
    if kind == "dynamic":
        if not scaling.get(_ALPHA):
            raise keys.refused("rope_type", kind, f"is not implemented but with {_ALPHA}, which makes it static")
        for name in _BESIDE_ALPHA:
            scaling.get(name)
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


def _of_whole(by_kind: Keys, theta: float, fraction: float) -> Keys:
    """The parameters of layers that see everything. Raises `UserError` where windows have others, but for scaling."""
    whole, windows = by_kind.section(_WHOLE), by_kind.section(_WINDOWS)
    by_kind.check_all_asked()
    windows.fix("rope_type", ("default",))
    for name, default in (("rope_theta", theta), ("partial_rotary_factor", fraction)):
        windows.fix(name, (whole.get(name, default),))
    windows.check_all_asked()
    return whole


def _number(keys: Keys, name: str, default: Any) -> float:
    value = keys.get(name, default)
    if type(value) not in (int, float):
        raise keys.refused(name, value, "must be a number")
    return value


def to_theirs_by_kind(model: Model) -> dict[str, Mapping[str, Any]]:
    """Returns `rope_parameters` with an object for each kind of layer; see `to_ours`."""
    plain = dataclasses.replace(model, rope_scaling=RopeScaling())
    both = {_WHOLE: to_theirs(model), _WINDOWS: to_theirs(plain)}
    return {"rope_parameters": {kind: found["rope_parameters"] for kind, found in both.items()}}


def to_theirs(model: Model) -> dict[str, Mapping[str, Any]]:
    """Returns `rope_parameters`."""
    scaling, kind = model.rope_scaling, model.rope_scaling.kind
    found = {"rope_type": next(name for name, own in _KINDS.items() if own == kind), "rope_theta": model.rope_theta}
    found["partial_rotary_factor"] = model.rope_fraction
    for name, field in _FIELDS[kind].items():
        value, default = getattr(scaling, field), getattr(RopeScaling(), field)
        if value != default or name in ("factor", _ALPHA) or kind == "llama3":
            found[name] = value
    if kind == "ntk":
        found["factor"] = 1.0  # which `transformers` asks for and does not read
    if kind in ("yarn", "llama3"):
        found[_LENGTH] = scaling.original_length
    return {"rope_parameters": found}
