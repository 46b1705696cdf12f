"""On what a model's output for a token depends beside that token and earlier ones: the worst of all its parts.

A router claims something about its own plan. Who executes the plan may drop rows of it, and so may the exchange
between devices; which rows, may depend on later tokens or on other sequences. A run therefore says what holds for the
model as a whole, in training and in evaluation:

| | |
|---|---|
| safe | on nothing else: it can be sampled token by token, and its held-out loss is what it has in use |
| batch | on other sequences of the batch |
| leak | on later tokens of its own sequence, and perhaps on other sequences too |

Losses do not count here: a balance loss over a batch changes no output.
"""

import jax
import jax.numpy as jnp

from frugalmoe import experts
from frugalmoe.experts import exchange
from frugalmoe.model import depths, pattern
from frugalmoe.routing import strategies
from frugalmoe.routing.contract import Inputs, Plan, arrays
from frugalmoe.schema import Model
from frugalmoe.sharding import platform

LEVELS = ("safe", "batch", "leak")  # from best to worst


def causality(config: Model, train: bool, expert_devices: int = 1) -> str:
    """The worst of `parts`: safe, batch or leak."""
    return max(parts(config, train, expert_devices).values(), key=LEVELS.index, default="safe")


def leaking(config: Model, train: bool, expert_devices: int = 1) -> str:
    """The parts that leak, as fields and values of the config; empty where none does."""
    found = parts(config, train, expert_devices)
    return " and ".join(part for part, level in found.items() if level == "leak")


def parts(config: Model, train: bool, expert_devices: int = 1) -> dict[str, str]:
    """What each part claims, under its field and value. `expert_devices`: the size of the mesh's expert axis."""
    moe, found = config.moe, {}
    if pattern.has_experts(config):
        router = strategies.get(moe.router)
        found[f"model.moe.router={router.name!r}"] = router.causality(moe, train)
        executor = experts.pick(moe, platform())
        if executor.drops:
            fields = " and ".join(f"model.moe.{field}={getattr(moe, field)!r}" for field in executor.drops.fields)
            name = f"model.moe.executor={executor.name!r} with {fields}"
            found[name] = executor.drops.causality(_plan(config, train), moe)
        elif moe.exchange_room and expert_devices > 1:
            found[f"model.moe.exchange_room={moe.exchange_room}"] = exchange.causality(
                _plan(config, train), moe, expert_devices
            )
    if pattern.wrapped_layers(config):
        about, name = depths.ABOUT, f"model.mixture_of_depths.capacity={config.mixture_of_depths.capacity}"
        found[name] = about.causal if train else about.causal_in_evaluation
    return found


def _plan(config: Model, train: bool) -> Plan:
    """The shapes of a layer's plan: its form, and the slots of a token, which are not always K."""
    moe, time = config.moe, 8
    router = strategies.get(moe.router)
    batch = moe.load_balance_group if moe.load_balance_scope == "micro_batch" else 1
    ids_BT = jnp.ones((batch, time), jnp.int32)

    def plan(key: jax.Array) -> Plan:
        params = arrays(
            {**router.new_params(key, config.dim, moe), **router.new_params(key, config.dim, moe, shared=True)}
        )
        inputs = Inputs(
            jnp.ones((batch, time, config.dim)),
            ids_BT,
            ids_BT,
            ids_BT,
            jax.random.split(key, batch),
            jnp.int32(0),
            jnp.int32(0),
            train,
            router.init_carry(moe, batch, time),
            run_experts=lambda plan, x_RD: x_RD,
        )
        return router.route(params, router.init_state(config.dim, moe), inputs, moe).plan

    return jax.eval_shape(plan, jax.random.key(0))
