"""Selection by score plus a balance bias that no gradient touches: DeepSeek-V3 and V4, Ling 2.0, Trinity.

Selection: the K largest of score + bias, in the best groups (see `groups.py`).
Weights (DeepSeek-V3, 2412.19437, eq. 12-16): scale * s_e / (sum over the K of s), from scores without the bias.

Models differ in details that count at the ends of float32 (docs/parity.md says who has which): `epsilon` is added to
the sum and `least_sum` is what it is at least, so that scores near 0 make small weights where without them they make
shares; `bias_on` = logit chooses by logit + bias; `softcap` = c makes c tanh(z / c) of a logit z; `group_mask` = zero
leaves experts of closed groups in the race with a score of 0.

`shared` = n: the last n experts begin with a bias of 1e6, which no step moves: each token has them, and they take part
in the sum (Inkling; num_experts and num_experts_per_token count them). Balance is that of the other experts alone; the
losses count all alike.

Bias, once per optimizer step, from the counts c of the whole batch and their mean n:

| update | b += update_rate * | from |
|---|---|---|
| sign | sign(n - c) | Wang et al., 2408.15664, algorithm 1; DeepSeek-V3 |
| zero_mean | sign(n - c) less its mean | Su, kexue.fm/archives/10815; Ling 2.0, 2510.22115 |
| proportional | (n - c) / n | shrinks as the load evens out; its mean is 0 |
| momentum | m, an exponential average of v less its mean, v = tanh(sharpness * (n - c) / n) | SMEBU, 2602.17004 |

`hash_layers` = n: in the first n MoE layers the experts are those that the token id hashes to (as in `hash`), with
their learned scores as weights (DeepSeek-V4). Nothing there can be balanced: the bias stays, losses on the load
(load_balance, sequence_balance, device_balance) are 0.

Letters: B batch, T time, E experts, K choices.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import gate, groups, losses, rules, select
from frugalmoe.routing.contract import About, Inputs, Loss, Params, Router, Routing, State, linear_init, linear_logits
from frugalmoe.routing.strategies import hash as hash_strategy
from frugalmoe.schema import MoE

BEST = {"max": 1, "top2": 2}  # how many of its largest scores a group's score sums
CLOSED = {"never": -jnp.inf, "zero": 0.0}  # the score of experts in other groups
BIASED = ("score", "logit")
OF_LOAD = ("load_balance", "sequence_balance", "device_balance")
PINNED = 1e6  # the bias of a shared expert; half of it is beyond all that steps add up to
UPDATES = ("sign", "zero_mean", "proportional", "momentum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    score: str = "sigmoid"  # sigmoid | softmax | sqrt_softplus (DeepSeek-V4)
    renormalize: bool = True  # weights of the K experts sum to `scale`
    scale: float = 1.0  # factor on all weights (2.5 in DeepSeek-V3 and Ling 2.0, 1.5 in DeepSeek-V4)
    num_groups: int = 1  # equal groups of consecutive experts
    groups_per_token: int = 1  # groups that a token may choose from
    group_score: str = "top2"  # max | top2 (sum of the two largest)
    group_mask: str = "never"  # never | zero (A.X-K2): when experts of other groups are chosen
    bias_on: str = "score"  # score | logit (Kolibri-1): what the bias is added to
    softcap: float = 0.0  # largest size of a logit (Laguna); 0: none
    epsilon: float = 0.0  # added to the sum that weights are divided by (1e-20 in DeepSeek-V3)
    least_sum: float = 0.0  # the least that weights are divided by (1e-12 in ERNIE 4.5)
    update: str = "sign"  # sign | zero_mean | proportional | momentum
    update_rate: float = 1e-3  # step of the bias; 0 freezes it
    momentum: float = 0.9  # update=momentum: how much of m is kept; like sharpness, not a value from the report
    sharpness: float = 1.0  # update=momentum: how soon v is clamped
    shared: int = 0  # experts that every token has, with weights from the same sum
    hash_layers: int = 0  # the first n MoE layers choose experts by token id


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    options: Options = config.options
    logits_BTE = linear_logits(params, inputs)
    if options.softcap:
        logits_BTE = options.softcap * jnp.tanh(logits_BTE / options.softcap)
    steered_BTE = logits_BTE if options.bias_on == "logit" else select.SCORES[options.score](logits_BTE)
    choice = choose(steered_BTE + state["bias_E"], inputs, config)
    ends = {"epsilon": options.epsilon, "least_sum": options.least_sum}
    routing = gate.by_scores(logits_BTE, choice, inputs, config, **ends)
    if not options.hash_layers:
        return routing
    hashed = inputs.layer < options.hash_layers
    terms = {name: silenced(loss, hashed) for name, loss in routing.losses.items() if name in OF_LOAD}
    count = {"hashed": routing.stats["tokens"] * hashed.astype(jnp.float32)}
    return routing._replace(losses={**routing.losses, **terms}, stats={**routing.stats, **count})


def choose(biased_BTE: Array, inputs: Inputs, config: MoE) -> select.Choice:
    """By biased score; in hash layers by token id, where nothing is compared and so nothing ties."""
    o, k = config.options, config.num_experts_per_token
    limit = (o.num_groups, o.groups_per_token, BEST[o.group_score])
    choice = groups.top_k(biased_BTE, k, *limit, closed=CLOSED[o.group_mask])
    if not o.hash_layers:
        return choice
    tickets_BTE = hash_strategy.tickets(inputs.token_ids_BT, inputs.layer, 0, config.num_experts)
    by_id = select.top_k(tickets_BTE, k)._replace(tied_BT=jnp.zeros_like(choice.tied_BT))
    return jax.tree.map(lambda a, b: jnp.where(inputs.layer < o.hash_layers, a, b), by_id, choice)


def silenced(loss: Loss, where: Array) -> Loss:
    return dataclasses.replace(loss, sum=jnp.where(where, 0.0, loss.sum))


def init_state(dim: int, config: MoE) -> State:
    is_shared_E = jnp.arange(config.num_experts) >= config.num_experts - config.options.shared
    state = {"bias_E": jnp.where(is_shared_E, jnp.float32(PINNED), 0)}
    if config.options.update == "momentum":
        state["momentum_E"] = jnp.zeros(config.num_experts, jnp.float32)
    return state


def update(state: State, batch_stats: Mapping[str, Array], config: MoE) -> State:
    counts_E = batch_stats["counts"].astype(jnp.float32)
    if config.options.shared:
        is_shared_E = state["bias_E"] > PINNED / 2
        mean = jnp.sum(counts_E, where=~is_shared_E) / jnp.maximum(jnp.sum(~is_shared_E), 1)
        moved = moved_bias(state, jnp.where(is_shared_E, mean, counts_E), config.options)  # the mean moves no bias
        moved["bias_E"] = jnp.where(is_shared_E, state["bias_E"], moved["bias_E"])
    else:
        moved = moved_bias(state, counts_E, config.options)
    if not config.options.hash_layers:
        return moved
    return jax.tree.map(lambda old, new: jnp.where(batch_stats["hashed"] > 0, old, new), state, moved)


def moved_bias(state: State, counts_E: Array, options: Options) -> State:
    """The state after one step by the chosen rule."""
    bias_E, rate = state["bias_E"], options.update_rate
    missing_E = counts_E.mean() - counts_E
    lack_E = missing_E / jnp.maximum(counts_E.mean(), 1e-9)
    if options.update == "proportional":
        return {"bias_E": bias_E + rate * lack_E}
    if options.update == "momentum":
        push_E = jnp.tanh(options.sharpness * lack_E)
        momentum_E = options.momentum * state["momentum_E"] + (1 - options.momentum) * (push_E - push_E.mean())
        return {"bias_E": bias_E + rate * momentum_E, "momentum_E": momentum_E}
    step_E = rate * jnp.sign(missing_E)
    if options.update == "zero_mean":
        step_E = step_E - step_E.mean()
    return {"bias_E": bias_E + step_E}


def weight_sum(config: MoE) -> float | str:
    """Less than the scale by as much as what is added to the sum is to it."""
    o = config.options
    if not (o.epsilon or o.least_sum):
        return gate.weight_sum(config)
    return "at_most_one" if o.renormalize and o.scale <= 1 else "free"


def check(config: MoE) -> str | None:
    o = config.options
    few = f"options.shared={o.shared}: must be less than num_experts_per_token={config.num_experts_per_token}"
    return rules.first(
        rules.one_of("score", o.score, select.SCORES),
        rules.one_of("group_score", o.group_score, BEST),
        rules.one_of("group_mask", o.group_mask, CLOSED),
        rules.one_of("bias_on", o.bias_on, BIASED),
        rules.one_of("update", o.update, UPDATES),
        rules.at_least("softcap", o.softcap, 0),
        rules.at_least("epsilon", o.epsilon, 0),
        rules.at_least("least_sum", o.least_sum, 0),
        rules.at_least("update_rate", o.update_rate, 0),
        rules.decay("momentum", o.momentum),
        rules.positive("sharpness", o.sharpness),
        rules.positive("scale", o.scale),
        rules.at_least("hash_layers", o.hash_layers, 0),
        rules.at_least("shared", o.shared, 0),
        None if o.shared < config.num_experts_per_token else few,
        rules.gradient_at_one(config, o.renormalize, "set options.renormalize=False"),
        groups.check(config),
    )


ROUTER = Router(
    about=About(
        year=2024,
        paper="DeepSeek-V3, 2412.19437, eq. 12-20; Wang et al., Auxiliary-Loss-Free Load Balancing, 2408.15664, alg. 1",
        score="sigmoid, softmax or sqrt(softplus)",
        selection="K largest of score + bias, in the best groups",
        weights="scores without the bias, normalized over the K or as they are",
        balance="bias, moved against the load",
        weight_sum=weight_sum,
        stateful=True,
        losses=losses.GATE_LOSSES,
    ),
    route=route,
    options=Options,
    init=linear_init,
    init_state=init_state,
    update=update,
    # A step adds to them: the mean of replicas adds the mean step.
    merges={"bias_E": "mean", "momentum_E": "mean"},
    check=check,
    cases=(
        (2, {"num_groups": 4, "groups_per_token": 2, "scale": 2.5, "update": "zero_mean"}),
        (1, {"renormalize": False}),
        (
            2,
            dict(
                score="softmax",
                num_groups=2,
                group_score="max",
                group_mask="zero",
                update="proportional",
                least_sum=0.9,
            ),
        ),
        (3, dict(score="sqrt_softplus", update="momentum", bias_on="logit", softcap=3.0, epsilon=0.1, shared=1)),
    ),
)
