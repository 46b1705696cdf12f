"""Self-routing: the first E channels of the layer's input are the logits. There is no gate.

Self-Routing (2604.00421): a fixed slice of the hidden state, with nothing to learn but the state itself; no balance
loss. A control for what a gate's own parameters are worth. Weights are the softmax probabilities of the K largest,
renormalized or as they are. Costs no matrix product.

Letters: B batch, T time, D model, E experts, K choices.
"""

import dataclasses

import jax
from jax import Array

from frugalmoe.errors import UserError
from frugalmoe.routing import gate, rules, select
from frugalmoe.routing.contract import About, Inputs, Params, Router, Routing, State, clean
from frugalmoe.schema import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    renormalize: bool = True  # weights of the K experts sum to 1


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    logits_BTE = clean(inputs)[..., : config.num_experts]
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    choice = select.top_k(logits_BTE, config.num_experts_per_token)
    weight_BTK = gate.weights(logits_BTE, probs_BTE, choice.expert_BTK, config.options.renormalize)
    return gate.routing(logits_BTE, probs_BTE, choice, weight_BTK, inputs, config)._replace(losses={})


def init(key: Array, dim: int, config: MoE) -> Params:
    if config.num_experts > dim:
        raise UserError(f"model.moe.num_experts={config.num_experts}: self_routing needs at most model.dim={dim}")
    return {}


ROUTER = Router(
    about=About(
        year=2026,
        paper="Self-Routing, 2604.00421",
        score="softmax",
        selection="K largest of the input's first E channels",
        weights="softmax of those channels, renormalized or not",
        balance="none",
        weight_sum=lambda config: 1.0 if config.options.renormalize else "at_most_one",
        learned=False,
    ),
    route=route,
    options=Options,
    init=init,
    check=lambda config: rules.gradient_at_one(config, config.options.renormalize, "set options.renormalize=False"),
    cases=((1, {"renormalize": False}),),
)
