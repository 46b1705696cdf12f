"""Expert choice: each expert takes the C tokens of a pool that it scores highest.

Zhou et al. (2202.09368, section 3.2), with C = capacity_factor * n * K / E, rounded up, for a pool of n valid tokens.
The load is balanced by construction. A token's place in the ranking depends on later tokens, so the training loss of a
language model reads the future: a reference for leakage studies.

| pool | training ranks |
|---|---|
| sequence | the tokens of one sequence |
| batch | those of all sequences of a micro-batch, over all devices; gradient accumulation makes the pool smaller |

A batch over d devices costs up to d times the useful work: an expert may have all its C tokens on one of them. Equal
tokens at the start of documents tie across sequences there, and rounding, hence the mesh, may decide which is chosen.

| evaluate | a token's experts in evaluation |
|---|---|
| threshold | those whose threshold its probability reaches, at most the 4 * K of largest margin: causal |
| choice | as in training: where a study wants to compare |

The threshold of an expert is the running mean of the probability of its C-th token (as in Sun et al., 2603.11535; a
batch's cut is the mean over its pools, by tokens).

Letters: B batch, T time, N tokens (B*T), E experts, K choices, C slots per expert and pool.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import dynamic, losses, rules, stats, threshold
from frugalmoe.routing.contract import (
    About,
    ExpertPlan,
    Inputs,
    Params,
    Router,
    Routing,
    State,
    linear_init,
    linear_logits,
)
from frugalmoe.schema import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    capacity_factor: float = 1.0  # experts per token, on average, over num_experts_per_token
    pool: str = "sequence"  # sequence | batch
    evaluate: str = "threshold"  # threshold | choice
    decay: float = 0.99  # of the running mean that is the threshold


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    logits_BTE = linear_logits(params, inputs)
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    if inputs.train or config.options.evaluate == "choice":
        plan, cut_E = choose(probs_BTE, inputs, config)
        extra = {"cut_sum": cut_E}
    else:
        slots = min(dynamic.FAN_OUT * config.num_experts_per_token, config.num_experts)
        active = threshold.activate(probs_BTE, probs_BTE, state["threshold_E"], slots, inputs)
        plan, extra = active.plan, {"overflow": active.overflow}
    load_BE = stats.load(plan, inputs, config.num_experts)
    return Routing(
        plan,
        {"z": losses.z(logits_BTE, inputs)},
        stats.of_layer(load_BE, inputs, logits_BTE=logits_BTE, probs_BTE=probs_BTE) | extra,
    )


def choose(probs_BTE: Array, inputs: Inputs, config: MoE) -> tuple[ExpertPlan, Array]:
    """The plan, and this device's part of the sum over pools of tokens * C-th largest probability."""
    share = config.options.capacity_factor * config.num_experts_per_token / config.num_experts
    num_tokens, num_experts = inputs.valid_BT.size, config.num_experts
    rank = _rank_batch if config.options.pool == "batch" else _rank_sequences
    token_EC, cut_E = rank(jax.lax.stop_gradient(probs_BTE), inputs, share)
    probs_EN = jnp.pad(probs_BTE.reshape(num_tokens, num_experts).T, ((0, 0), (0, 1)))
    return ExpertPlan(token_EC, jnp.take_along_axis(probs_EN, token_EC, axis=1)), cut_E


def _rank_sequences(probs_BTE: Array, inputs: Inputs, share: float) -> tuple[Array, Array]:
    batch, time, num_experts = probs_BTE.shape
    ranked = threshold.rank(probs_BTE, inputs.valid_BT, share)
    first_B11 = time * jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    token_BEC = jnp.where(ranked.full_PEC, ranked.token_PEC + first_B11, batch * time)
    return token_BEC.swapaxes(0, 1).reshape(num_experts, -1), ranked.cut_E


def _rank_batch(probs_BTE: Array, inputs: Inputs, share: float) -> tuple[Array, Array]:
    """Every device ranks the tokens of all and keeps its own."""
    num_tokens, valid_BT, axes, shard, shards = inputs.valid_BT.size, inputs.valid_BT, inputs.axis_names, 0, 1
    if axes:
        probs_BTE, valid_BT = jax.lax.all_gather((probs_BTE, valid_BT), axes, tiled=True)
        shard, shards = jax.lax.axis_index(axes), jax.lax.axis_size(axes)
    ranked = threshold.rank(probs_BTE.reshape(1, -1, probs_BTE.shape[-1]), valid_BT.reshape(1, -1), share)
    token_EC = ranked.token_PEC[0] - shard * num_tokens
    own_EC = ranked.full_PEC[0] & (token_EC >= 0) & (token_EC < num_tokens)
    token_EC = jax.lax.sort(jnp.where(own_EC, token_EC, num_tokens), dimension=1)
    return token_EC[:, :num_tokens], ranked.cut_E / shards


def init_state(dim: int, config: MoE) -> State:
    return threshold.initial(1 / config.num_experts, config.num_experts)


def update(state: State, batch_stats: Mapping[str, Array], config: MoE) -> State:
    return threshold.follow(state, batch_stats, config.options.decay)


def check(config: MoE) -> str | None:
    options: Options = config.options
    return rules.first(
        rules.positive("capacity_factor", options.capacity_factor),
        rules.one_of("pool", options.pool, ("sequence", "batch")),
        rules.one_of("evaluate", options.evaluate, ("threshold", "choice")),
        rules.decay("decay", options.decay),
    )


ROUTER = Router(
    about=About(
        year=2022,
        paper="Zhou et al., Mixture-of-Experts with Expert Choice Routing, 2202.09368, section 3.2",
        score="softmax",
        selection="each expert's C best tokens of a sequence or batch; in evaluation those above its threshold",
        weights="softmax probability as it is",
        balance="by construction",
        causal="leak",
        causal_in_evaluation=lambda config: "safe" if config.options.evaluate == "threshold" else "leak",
        form="expert",
        stateful=True,
        losses=("z",),
    ),
    route=route,
    options=Options,
    init=linear_init,
    init_state=init_state,
    update=update,
    merges=threshold.MERGES,
    check=check,
    cases=((1, {"capacity_factor": 1.3, "evaluate": "choice"}), (2, {"pool": "batch"})),
)
