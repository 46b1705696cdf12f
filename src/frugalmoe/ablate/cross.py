"""Train with A, evaluate with B: a run's weights under the router of another arm, where their shapes allow it."""

import dataclasses

import jax

from frugalmoe.ablate.plan import Pair, Plan
from frugalmoe.config import settle
from frugalmoe.files import write_json
from frugalmoe.train.evaluate import evaluate
from frugalmoe.train.program import compiled_eval_step
from frugalmoe.train.run import Run
from frugalmoe.train.step import abstract


def evaluate_under_others(plan: Plan, pair: Pair, run: Run) -> None:
    """Writes cross.json: the run's held-out loss under each arm whose parameters and router state have its shapes."""
    losses = {}
    for name, arm in plan.arms.items():
        config = settle(dataclasses.replace(run.config, model=arm.config.model), run.data.tokenizer.size, run.mesh.size)
        if _shapes(config) == _shapes(run.config):
            scores = evaluate(compiled_eval_step(config), run.state, run.data, config, run.mesh)
            losses[name] = scores.loss["mean"]
    write_json(run.workdir / "cross.json", losses)


def _shapes(config) -> dict[str, tuple]:
    state = abstract(config)
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.router_state))
    return {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype) for path, leaf in leaves}
