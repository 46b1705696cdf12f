"""Rotary positions (Su et al., arXiv 2104.09864), and how their angles are stretched for longer sequences.

Letters: B batch, T time, H heads, d channels of a head.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from frugalmoe.schema import RopeScaling


class Rotary(NamedTuple):
    """Sine and cosine of the rotary angles of every token, float32, over half of the rotated channels."""

    sin_BTd: Array
    cos_BTd: Array


def rotary(positions_BT: Array, channels: int, theta: float, scaling: RopeScaling) -> Rotary:
    """Angle position * frequency of every pair of `channels` (an even number), stretched as `scaling` says."""
    angle_BTd = positions_BT[..., None].astype(jnp.float32) * frequencies(channels, theta, scaling)
    sin_BTd, cos_BTd = jnp.sin(angle_BTd), jnp.cos(angle_BTd)
    size = attention_factor(scaling)
    return Rotary(sin_BTd, cos_BTd) if size == 1 else Rotary(sin_BTd * size, cos_BTd * size)


def frequencies(channels: int, theta: float, scaling: RopeScaling) -> Array:
    """Radians per token of each pair of channels, float32: theta^(-2 i / channels), stretched."""
    frequency_d = theta ** (-jnp.arange(0, channels, 2, dtype=jnp.float32) / channels)
    return _STRETCHED[scaling.kind](frequency_d, channels, theta, scaling)


def rotate(x_BTHd: Array, angles: Rotary) -> Array:
    """Rotates the first channels of each head, half against half: channel i with channel i + size / 2.

    Weights of models that rotate channel 2 i with 2 i + 1 compute the same after a permutation of these channels.
    """
    sin, cos = (a_BTd[:, :, None] for a_BTd in angles)
    size = 2 * sin.shape[-1]
    rotated, rest = x_BTHd[..., :size].astype(jnp.float32), x_BTHd[..., size:]
    a, b = jnp.split(rotated, 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x_BTHd.dtype), rest], axis=-1)


def attention_factor(scaling: RopeScaling) -> float:
    """What YaRN multiplies sine and cosine with, so that scores grow by its square (2309.00071, section 3.4)."""
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling, scaling.mscale) / _mscale(scaling, scaling.mscale_all_dim)
    return _mscale(scaling, 1.0)


def score_factor(scaling: RopeScaling) -> float:
    """What DeepSeek multiplies all scores with, those of channels that are not rotated too: mscale_all_dim's square."""
    return _mscale(scaling, scaling.mscale_all_dim) ** 2 if scaling.kind == "yarn" and scaling.mscale_all_dim else 1.0


def _mscale(scaling: RopeScaling, weight: float) -> float:
    return 0.1 * weight * math.log(scaling.factor) + 1.0


def _plain(frequency_d: Array, channels: int, theta: float, scaling: RopeScaling) -> Array:
    return frequency_d


def _linear(frequency_d: Array, channels: int, theta: float, scaling: RopeScaling) -> Array:
    """Positions divided by the factor (Chen et al., arXiv 2306.15595)."""
    return frequency_d / scaling.factor


def _yarn(frequency_d: Array, channels: int, theta: float, scaling: RopeScaling) -> Array:
    """Fast channels as they are, slow ones divided by the factor, a ramp between (Peng et al., 2309.00071, eq. 17-23).

    A channel is fast if it turns more than `beta_fast` times in `original_length` tokens, slow if fewer than
    `beta_slow` times.
    """
    turning = lambda turns: channels * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
    low, high = turning(scaling.beta_fast), turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    high = high + 0.001 if low == high else high
    slow_d = jnp.clip((jnp.arange(channels // 2, dtype=jnp.float32) - low) / (high - low), 0, 1)
    return frequency_d / scaling.factor * slow_d + frequency_d * (1 - slow_d)


def _llama3(frequency_d: Array, channels: int, theta: float, scaling: RopeScaling) -> Array:
    """As YaRN by the number of turns in `original_length` tokens, linear in that number (Llama 3.1, released code)."""
    turns_d = scaling.original_length * frequency_d / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    fast_d = jnp.clip((turns_d - low) / (high - low), 0, 1)
    return frequency_d / scaling.factor * (1 - fast_d) + frequency_d * fast_d


def _ntk(frequency_d: Array, channels: int, theta: float, scaling: RopeScaling) -> Array:
    """The slowest channel divided by the factor, the fastest as it is: theta times factor^(d / (d - 2)).

    NTK-aware scaling, of no paper; as in Hunyuan's released code, whose factor is `alpha`.
    """
    share_d = jnp.arange(0, channels, 2, dtype=jnp.float32) / max(channels - 2, 1)
    return frequency_d * scaling.factor**-share_d


_STRETCHED = {"none": _plain, "linear": _linear, "ntk": _ntk, "yarn": _yarn, "llama3": _llama3}
KINDS = tuple(_STRETCHED)
