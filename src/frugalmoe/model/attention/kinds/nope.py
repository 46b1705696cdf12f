"""Attention without positions (NoPE): grouped-query attention that rotates nothing.

Among layers that rotate, it sees far without angles that were never trained (Yang et al., 2501.18795). With a
temperature, scores grow with the position of the query, so that attention to long texts stays as sharp as to short
ones: queries are multiplied by 1 + temperature * log(1 + floor((position + 1) / floor)) (Llama 4, released code, after
Nakanishi, Scalable-Softmax, 2501.19399).

Letters: B batch, T time, H query heads, h key-value heads, d channels of a head.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from frugalmoe.model.attention.kinds import grouped
from frugalmoe.schema import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(grouped.Options):
    """Options of attention without positions."""

    temperature: float = 0.0  # how fast scores grow with the position of the query; 0: not at all
    floor: int = 8192  # tokens until they grow first


class Unrotated(grouped.GroupedAttention):
    """Grouped-query attention; `prepared` is the factor on the queries, float32 [B, T], or None."""

    def _placed(self, q_BTHd: Array, k_BThd: Array, prepared: Array | None) -> tuple[Array, Array]:
        if prepared is None:
            return q_BTHd, k_BThd
        return (q_BTHd * prepared[..., None, None]).astype(q_BTHd.dtype), k_BThd


_WITHOUT_ROTATION = {"rotated": "head", "unit": "none"}  # what model.qk_norm means here


def layer(key: Array, config: Model, options: Options, out_std: float) -> Unrotated:
    """The parameters of grouped-query attention."""
    qk_norm = _WITHOUT_ROTATION.get(config.qk_norm, config.qk_norm)
    return Unrotated(key, dataclasses.replace(config, qk_norm=qk_norm), options, out_std)


def prepare(positions_BT: Array, config: Model, options: Options) -> Array | None:
    """The factor on queries."""
    if not options.temperature:
        return None
    steps_BT = jnp.floor((positions_BT.astype(jnp.float32) + 1) / options.floor)
    return 1 + options.temperature * jnp.log1p(steps_BT)


def check(config: Model, options: Options) -> str | None:
    """Whole groups of heads, and a temperature that is one."""
    path = "model.attention_options.nope"
    if not 0 <= options.temperature < float("inf"):
        return f"{path}.temperature={options.temperature}: must be a finite number, 0 or more"
    if options.floor < 1:
        return f"{path}.floor={options.floor}: must be positive"
    return grouped.check(config, options)


ATTENTION = dataclasses.replace(
    grouped.ATTENTION,
    about="as grouped, but without positions; scores may grow with the position of the query",
    paper="Kazemnejad et al., 2305.19466; on some layers: Yang et al., 2501.18795; Meta, Llama 4",
    layer=layer,
    prepare=prepare,
    check=check,
    options=Options,
    relative=lambda config, options: not options.temperature,
    cases=({"temperature": 0.3, "floor": 4},),
)
