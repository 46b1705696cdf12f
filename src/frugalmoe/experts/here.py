"""What one device computes of its experts: `execute_here` runs the executor of a config, a file of `executors/`.

Letters: N tokens, D model, E experts, F expert hidden; 2 = (gate, up).
"""

from jax import Array

from frugalmoe.errors import UserError
from frugalmoe.experts.contract import Biases, Call, Stack
from frugalmoe.experts.executors import pick
from frugalmoe.routing.contract import Plan
from frugalmoe.schema import MoE
from frugalmoe.sharding import AXES, axis_size, platform


def execute_here(
    plan: Plan,
    x_ND: Array,
    gate_up_ED2F: Array,
    down_EFD: Array,
    config: MoE,
    num_sequences: int,
    *,
    room: int | None = None,
    biases: Biases | None = None,
) -> tuple[Array, Array]:
    """What the executor of the config makes of a plan with the experts that this device holds.

    -> (y[N, D] in x's dtype, int32 [] dropped rows). Weights are float32 or of x's dtype, in which they are multiplied.

    room: the most rows of a token-major plan that the executor holds.
    """
    executor, here = pick(config, platform()), platform()
    if executor.platforms and here not in executor.platforms:
        rule = f"runs on {', '.join(executor.platforms)}, and this is {here}; model.moe.executor=auto runs anywhere"
        raise UserError(f"model.moe.executor={config.executor!r}: {rule}")
    if not executor.casts:
        gate_up_ED2F, down_EFD = (w.astype(x_ND.dtype) for w in (gate_up_ED2F, down_EFD))
    return executor.run(plan, x_ND, gate_up_ED2F, down_EFD, Call(config, num_sequences, room, biases))


def takes_stacks(config: MoE) -> bool:
    """Whether `execute_in_stack` is possible, and better: where one CPU has all experts."""
    return platform() == "cpu" and axis_size(*AXES) == 1 and pick(config, "cpu").in_stack is not None


def execute_in_stack(
    plan: Plan, x_BTD: Array, stack: Stack, config: MoE, biases: Biases | None = None
) -> tuple[Array, Array, tuple[Array, Array]]:
    """As `exchange.execute`, of weights of all layers -> (y[B, T, D], int32 [] dropped rows, `stack.sums`)."""
    in_stack, call = pick(config, "cpu").in_stack, Call(config, x_BTD.shape[0], None, biases)
    y_ND, dropped, sums = in_stack(plan, x_BTD.reshape(-1, x_BTD.shape[-1]), stack, call)
    return y_ND.reshape(x_BTD.shape), dropped, sums
