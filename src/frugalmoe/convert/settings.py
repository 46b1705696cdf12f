"""A published model's config.json as our `Model`, and back, as its family's keys say."""

from collections.abc import Collection, Mapping
from typing import Any

from frugalmoe.config import default, override, resolve
from frugalmoe.convert import rope
from frugalmoe.convert.contract import REQUIRED, Family
from frugalmoe.convert.keys import INERT, Keys
from frugalmoe.fields import to_dict
from frugalmoe.model import pattern
from frugalmoe.model.attention import kinds
from frugalmoe.model.attention.kinds import latent
from frugalmoe.schema import Model

# Fields of our `model` that change no answer of a trained model in evaluation. Softmax before the choice with weights
# that are renormalised is softmax after it.
TRAINING = frozenset((
    "init_std", "compute_dtype", "remat", "moe.losses", "moe.load_balance_scope", "moe.load_balance_group",
    "moe.load_balance_devices", "moe.executor", "moe.capacity_factor", "moe.exchange", "moe.exchange_room",
    "moe.drop_order", "moe.options.softmax", "moe.options.update", "moe.options.update_rate", "moe.options.momentum",
    "moe.options.sharpness", "mixture_of_depths.predictor_loss", "mixture_of_depths.every",
    "multi_token_prediction.coefficient",
))  # fmt: skip
_THETA, _FRACTION = "rope_theta", "rope_fraction"  # among settings: where config.json names none
_QUANTIZED = "quantization_config"
_ROPE_KINDS = "rope_kinds"  # among settings: the values of `rope_type` that the family reads
_BY_KIND = "rope_by_kind"  # among settings: windows have angles of their own, which nothing stretches
LATENT = "attention_options.latent"


def to_ours(family: Family, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns {dotted field: value} of our config. Raises `UserError` for a key that cannot be followed."""
    keys = Keys(values, where)
    if _QUANTIZED in keys:
        method = keys.section(_QUANTIZED).get("quant_method")
        rule = "quantized weights are not read; load the model with transformers in bfloat16 and save it anew"
        raise keys.refused(f"{_QUANTIZED}.quant_method", method, rule)
    settings = dict(family.settings)
    theta, fraction = settings.pop(_THETA, Model().rope_theta), settings.pop(_FRACTION, 1.0)
    by_kind, rope_kinds = settings.pop(_BY_KIND, False), settings.pop(_ROPE_KINDS, rope.KINDS)
    fields = rope.to_ours(keys, theta, fraction, by_kind, rope_kinds)
    for key in family.keys:
        value = keys.require(key.theirs, key.also) if key.default is REQUIRED else keys.get(key.theirs, None, key.also)
        if value is None:
            value = key.default(keys) if callable(key.default) else key.default
        fields[key.ours] = value
    if fields["vocab_size"] == 0:  # which would mean that of the tokenizer
        raise keys.refused("vocab_size", 0, "must be positive")
    fields |= family.more_ours(keys)
    for name, allowed in family.fixed.items():
        keys.fix(name, allowed)
    keys.check_all_asked(INERT | family.inert.keys())
    return {f"model.{name}": value for name, value in (settings | fields).items()}


def to_theirs(family: Family, model: Model) -> dict[str, Any]:
    """Returns the keys of config.json that say what a model of ours is. Whether they do is for `differing` to say."""
    flat = flat_fields(to_dict(model))
    values = {key.theirs: flat.get(key.ours) for key in family.keys}
    values |= {name: allowed[0] for name, allowed in family.fixed.items() if allowed[0] is not None}
    if any("{mtp}" in row.theirs for row in family.rows):
        values["num_nextn_predict_layers"] = model.multi_token_prediction.depth
    values |= rope.to_theirs(model) | dict(family.more_theirs(model))
    named = {"architectures": [family.architecture], "model_type": pattern.short(family.name)}
    return named | {"pad_token_id": None, **values}  # the default of a family may lie beyond the vocabulary


def differing(family: Family, values: Mapping[str, Any], model: Model, where: str) -> list[str]:
    """Returns the fields of a model, of those that count in evaluation, that a config.json does not say as they are.

    A model of the family is one where there is none. Raises `UserError` where the config.json is none of the family's.
    """
    depth = {"model.multi_token_prediction.depth": model.multi_token_prediction.depth}
    return unlike(model, resolve(override(default(), to_ours(family, values, where) | depth)).model)


def unlike(model: Model, other: Model) -> list[str]:
    """Returns `model.FIELD=VALUE (OTHER there)` of the fields that count in evaluation in which two models differ."""
    here, there = _counting(model), _counting(other)
    names = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    return [f"model.{name}={here.get(name)!r} ({there.get(name)!r} there)" for name in names]


def _counting(model: Model) -> dict[str, Any]:
    """The fields of a model that count in evaluation, by dotted name."""
    flat = flat_fields(to_dict(model))
    unused = () if pattern.has_experts(model) else ("moe",)
    unused += () if pattern.has_dense(model) else ("dense_dim",)
    if set(pattern.attention_names(model.attention)) == {"latent"}:
        options = kinds.options_of(model, "latent")
        size = latent.sizes(model, options)  # of which 0 means one that follows from another, as of the epsilon
        flat = {name: value for name, value in flat.items() if not _is_below(name, (LATENT, "num_kv_heads"))}
        flat |= {f"{LATENT}.{name}": value for name, value in size._asdict().items()}
        flat[f"{LATENT}.norm_eps"] = options.norm_eps or model.norm_eps
    return {name: value for name, value in flat.items() if not _is_below(name, (*TRAINING, *unused))}


def _is_below(name: str, fields: Collection[str]) -> bool:
    """Whether a field is one of some, or of a section of theirs."""
    return name in fields or any(name.startswith(f"{field}.") for field in fields)


def flat_fields(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the fields of a section and of those in it, by dotted name."""
    found: dict[str, Any] = {}
    for name, value in section.items():
        inner = isinstance(value, Mapping)
        found |= flat_fields(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return found
