"""K distinct experts drawn uniformly for each token, with weight 1/K: the control that no router should lose to.

Drawn without replacement, as the K largest of E random numbers (Gumbel top-K with equal scores; Kool et al.,
1903.06059). The draw is a function of (sequence key, layer, segment, position), in evaluation too. Zuo et al. (THOR,
2110.04260) train with random experts.

Letters: B batch, T time, E experts, K choices.
"""

import jax
import jax.numpy as jnp

from frugalmoe.routing import select, stats
from frugalmoe.routing.contract import About, Inputs, Params, Router, Routing, State
from frugalmoe.schema import MoE


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    draw = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (config.num_experts,))))
    expert_BTK = select.top_k(draw(select.token_keys(inputs)), config.num_experts_per_token).expert_BTK
    weight_BTK = jnp.full(expert_BTK.shape, 1 / config.num_experts_per_token)
    plan = select.token_plan(expert_BTK, weight_BTK, inputs, config.num_experts)
    return Routing(plan, {}, stats.of_layer(stats.load(plan, inputs, config.num_experts), inputs))


ROUTER = Router(
    about=About(
        year=2021,
        paper="Control; without replacement as in Kool et al., 1903.06059",
        score="none",
        selection="uniformly at random, K distinct",
        weights="1/K",
        balance="by chance",
        weight_sum=1.0,
        learned=False,
        random=True,
    ),
    route=route,
)
