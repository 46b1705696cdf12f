"""How close do the experts come to a dense feed-forward of the same active FLOPs, and how does time grow with experts?

    python benchmarks/experts_bench.py [--rounds 7] [--dtype bfloat16] [--executors grouped capacity] [--forward]

One round runs every case once, interleaved, so that other load on the machine hits all alike. For each case: the median
over rounds of process CPU time (the steadier figure on a shared machine) and of wall time. `efficiency` is the dense
feed-forward's time over the case's: 1 means that sorting, gathering, small blocks and scattering cost nothing.
`growth` is the case's time over that of the first shape. Routing (the choice of experts) is left out, sorting is not.
Backward means gradients for the tokens, the plan's weights and all expert weights.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from frugalmoe.experts import execute_here, executors
from frugalmoe.experts.contract import swiglu
from frugalmoe.routing.contract import TokenPlan
from frugalmoe.schema import MoE

TOKENS, DIM, SEQUENCES = 4096, 256, 16
SHAPES = ((8, 2, 512), (64, 8, 128), (128, 8, 128), (128, 2, 512))  # experts, experts per token, hidden width


def moe_case(executor: str, shape: tuple[int, int, int], skew: float, forward: bool, dtype: jnp.dtype):
    """(jitted function, its arguments) of one executor; `skew` 0 is near-even load, 1 a heavy-tailed one."""
    num_experts, k, hidden = shape
    keys = jax.random.split(jax.random.key(0), 4)
    popularity_E = -skew * jnp.log(1 + jnp.arange(num_experts) * 8 / num_experts)
    logits = jax.random.normal(keys[0], (TOKENS, num_experts)) + popularity_E
    weight_NK, expert_NK = jax.lax.top_k(jax.nn.softmax(logits), k)
    x_ND = jax.random.normal(keys[1], (TOKENS, DIM)).astype(dtype)
    gate_up = (jax.random.normal(keys[2], (num_experts, DIM, 2, hidden)) * DIM**-0.5).astype(dtype)
    down = (jax.random.normal(keys[3], (num_experts, hidden, DIM)) * hidden**-0.5).astype(dtype)
    config = MoE(num_experts=num_experts, num_experts_per_token=k, expert_dim=hidden, executor=executor)

    def run(weight_NK, x_ND, gate_up, down, expert_NK):
        return execute_here(TokenPlan(expert_NK, weight_NK), x_ND, gate_up, down, config, SEQUENCES)[0]

    return compiled(run, 4, forward), (weight_NK, x_ND, gate_up, down, expert_NK)


def dense_case(hidden: int, forward: bool, dtype: jnp.dtype):
    """A dense SwiGLU whose hidden width is what one token activates."""
    keys = jax.random.split(jax.random.key(1), 3)
    x_ND = jax.random.normal(keys[0], (TOKENS, DIM)).astype(dtype)
    gate_up = (jax.random.normal(keys[1], (DIM, 2 * hidden)) * DIM**-0.5).astype(dtype)
    down = (jax.random.normal(keys[2], (hidden, DIM)) * hidden**-0.5).astype(dtype)

    def run(x_ND, gate_up, down):
        h = jnp.matmul(x_ND, gate_up, preferred_element_type=jnp.float32)
        a = swiglu(*jnp.split(h, 2, axis=-1)).astype(dtype)
        return jnp.matmul(a, down, preferred_element_type=jnp.float32).astype(dtype)

    return compiled(run, 3, forward), (x_ND, gate_up, down)


def compiled(run, num_differentiated: int, forward: bool):
    def loss(*args):
        return jnp.sum(jnp.square(run(*args).astype(jnp.float32)))

    return jax.jit(run if forward else jax.grad(loss, tuple(range(num_differentiated))))


def measure(cases: dict, rounds: int) -> dict[str, tuple[float, float]]:
    """Median (CPU ms, wall ms) of each case; the first two calls of each are not counted."""
    times = {name: [] for name in cases}
    for i in range(rounds + 2):
        for name, (run, args) in cases.items():
            cpu, wall = time.process_time(), time.perf_counter()
            jax.block_until_ready(run(*args))
            if i >= 2:
                times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {name: tuple(1e3 * statistics.median(column) for column in zip(*pairs)) for name, pairs in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    choices = (*executors.BY_PLATFORM, *executors.names())
    parser.add_argument("--executors", nargs="+", choices=choices, default=["grouped"])
    parser.add_argument("--forward", action="store_true", help="leave the backward pass out")
    args = parser.parse_args()
    common = (args.forward, jnp.dtype(args.dtype))
    active = SHAPES[0][1] * SHAPES[0][2]  # hidden width that one token activates, the same in all shapes
    cases = {"dense feed-forward": dense_case(active, *common)}
    for executor in args.executors:
        for skew in (0.0, 1.0):
            for shape in SHAPES:
                name = "{} {}/top-{}/{} {}".format(executor, *shape, "skewed" if skew else "even")
                cases[name] = moe_case(executor, shape, skew, *common)
    results = measure(cases, args.rounds)
    dense_cpu, dense_wall = results["dense feed-forward"]
    first = next(name for name in results if name != "dense feed-forward")
    passes = "forward" if args.forward else "forward + backward"
    print(f"{jax.devices()[0].device_kind}, {args.dtype}, {passes}, {TOKENS} tokens x {DIM}, {args.rounds} rounds")
    print(f"{'case':34s} {'CPU ms':>8s} {'wall ms':>8s} {'efficiency CPU / wall':>22s} {'growth CPU / wall':>18s}")
    for name, (cpu, wall) in results.items():
        growth = f"{cpu / results[first][0]:.2f} / {wall / results[first][1]:.2f}"
        print(f"{name:34s} {cpu:8.0f} {wall:8.0f} {dense_cpu / cpu:15.2f} / {dense_wall / wall:.2f} {growth:>18s}")


if __name__ == "__main__":
    main()
