"""Hash layers: a token's experts are a fixed random function of its token id.

Roller et al. (2106.04426, section 3, random hash). The K experts are those with the largest hash of (seed, layer,
token id, expert): K distinct experts, any set of K equally likely, no table and no vocabulary size. The load is
balanced over the vocabulary, not over text: a frequent token loads its experts.
Left out: the paper's balanced hash, which needs the corpus' token frequencies, and its bigram hash, which needs the
previous token: decoding routes one token at a time and does not have it.
Weights: `unit`, 1/K each, as in the paper for K = 1; `learned`, the softmax of a linear gate over the K hashed experts,
a learned weight at hashed experts as in the first layers of DeepSeek-V4.

Letters: B batch, T time, E experts, K choices.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import rules, select, stats
from frugalmoe.routing.contract import About, Inputs, Params, Router, Routing, State, linear_init, linear_logits
from frugalmoe.schema import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    gate: str = "unit"  # unit | learned
    seed: int = 0  # of the hash: another seed deals tokens to experts anew


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    ticket_BTE = tickets(inputs.token_ids_BT, inputs.layer, config.options.seed, config.num_experts)
    expert_BTK = select.top_k(ticket_BTE, config.num_experts_per_token).expert_BTK
    if config.options.gate == "learned":
        weight_BTK = jax.nn.softmax(select.at(linear_logits(params, inputs), expert_BTK), axis=-1)
    else:
        weight_BTK = jnp.full(expert_BTK.shape, 1 / config.num_experts_per_token)
    plan = select.token_plan(expert_BTK, weight_BTK, inputs, config.num_experts)
    return Routing(plan, {}, stats.of_layer(stats.load(plan, inputs, config.num_experts), inputs))


def tickets(ids: Array, layer: Array, seed: int, num_experts: int) -> Array:
    """A pseudo-random float32 in [0, 1) for each token id and expert [..., E]."""
    h = _mix(jnp.uint32(seed & 0xFFFFFFFF) ^ _mix(layer.astype(jnp.uint32)))
    h = _mix(h ^ ids.astype(jnp.uint32))[..., None]
    h = _mix(h ^ _mix(jnp.arange(num_experts, dtype=jnp.uint32)))
    return (h >> 8).astype(jnp.float32) * 2.0**-24


def _mix(h: Array) -> Array:
    """A bijection of 32-bit words in which each input bit moves each output bit (finaliser of MurmurHash3)."""
    h = h + jnp.uint32(0x9E3779B9)  # 0 is a fixed point of the steps below
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def init(key: Array, dim: int, config: MoE) -> Params:
    return linear_init(key, dim, config) if config.options.gate == "learned" else {}


def check(config: MoE) -> str | None:
    gate = config.options.gate
    return rules.first(
        rules.one_of("gate", gate, ("unit", "learned")),
        rules.gradient_at_one(config, gate == "learned", "set options.gate='unit'"),
    )


ROUTER = Router(
    about=About(
        year=2021,
        paper="Roller et al., Hash Layers For Large Sparse Models, 2106.04426, section 3",
        score="none",
        selection="fixed random function of the token id",
        weights="1/K, or a learned softmax over the K",
        balance="over the vocabulary, by construction",
        weight_sum=1.0,
        learned=lambda config: config.options.gate == "learned",
    ),
    route=route,
    options=Options,
    init=init,
    check=check,
    cases=((2, {"gate": "learned"}),),
)
