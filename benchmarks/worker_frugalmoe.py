"""A worker that trains a frugalmoe model with the code of `frugalmoe train`: arguments SIZE_JSON moe|dense.

`step` is a training step, `update` its optimizer part alone (clipping, AdamW, new parameters).
"""

import time
from collections.abc import Mapping

import flax
import jax
import numpy as np
import optax
import sizes
from serve import Action, serve

from frugalmoe import config, sharding
from frugalmoe.data.batches import Batch
from frugalmoe.fields import to_dict
from frugalmoe.train import optim
from frugalmoe.train.allocator import keep_freed_memory
from frugalmoe.train.objective import knobs
from frugalmoe.train.placing import put_batch
from frugalmoe.train.program import compiled_train_step
from frugalmoe.train.step import init


def training_config(size: sizes.Size, dense: bool, overrides: Mapping[str, object] = {}) -> config.Config:
    """`dense`: a model without experts and as many active FLOPs, a feed-forward of width top_k * expert_dim."""
    values = {
        "model.vocab_size": size.vocabulary,
        "model.dim": size.dim,
        "model.num_layers": size.layers,
        "model.num_dense_layers": size.layers if dense else 0,
        "model.dense_dim": size.top_k * size.expert_dim if dense else 0,
        "model.num_heads": size.heads,
        "model.num_kv_heads": size.kv_heads,
        "model.head_dim": size.head_dim,
        "model.moe.num_experts": size.experts,
        "model.moe.num_experts_per_token": size.top_k,
        "model.moe.expert_dim": size.expert_dim,
        "data.sequence_length": size.time,
        "train.batch_size": size.sequences,
        "optim.learning_rate": sizes.LEARNING_RATE,
        "optim.b1": sizes.BETAS[0],
        "optim.b2": sizes.BETAS[1],
        "optim.eps": sizes.EPS,
        "optim.weight_decay": sizes.WEIGHT_DECAY,
        "optim.clip_norm": sizes.CLIP_NORM,
    }
    return config.resolve(config.override(config.default(), values | dict(overrides)))


def random_batch(size: sizes.Size, rng: np.random.Generator) -> Batch:
    """One micro-batch [1, B, T] of unpacked random tokens."""
    tokens = rng.integers(0, size.vocabulary, (1, size.sequences, size.time + 1), dtype=np.int32)
    ones = np.ones_like(tokens[:, :, 1:])
    positions = np.broadcast_to(np.arange(size.time, dtype=np.int32), ones.shape)
    return Batch(tokens[:, :, :-1], tokens[:, :, 1:], ones, positions, ones.astype(bool), ones)


class Training:
    """The state that steps and updates replace."""

    def __init__(self, size: sizes.Size, dense: bool, mesh: jax.sharding.Mesh, overrides: Mapping[str, object] = {}):
        self.size, self.mesh, self.rng = size, mesh, np.random.default_rng(0)
        self.config = training_config(size, dense, overrides)
        self.state = init(self.config)
        self.train_step, self.knobs = compiled_train_step(self.config), knobs(self.config)
        tx = optim.optimizer(self.config)

        def update(params, opt_state, grads):
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        self.optimizer_step = jax.jit(update, donate_argnums=(0, 1))

    def batch(self) -> Batch:
        return put_batch(self.mesh, random_batch(self.size, self.rng), "ABT")

    def step(self, batch: Batch) -> dict[str, float]:
        began = time.perf_counter()
        self.state, report = self.train_step(self.state, batch, self.knobs)
        dispatch = time.perf_counter() - began  # the call returned; the devices may still compute
        jax.block_until_ready((self.state, report))
        return {"dispatch_seconds": dispatch, "loss": float(report.metrics["loss/ce"])}

    def gradients(self) -> dict:
        return jax.block_until_ready(jax.tree.map(jax.numpy.ones_like, self.state.params))

    def update(self, gradients: dict) -> dict[str, float]:
        params, opt_state = self.optimizer_step(self.state.params, self.state.opt_state, gradients)
        self.state = jax.block_until_ready(self.state._replace(params=params, opt_state=opt_state))
        return {}


def main() -> None:
    size, model = sizes.from_arguments()
    keep_freed_memory()
    layout = config.settle(training_config(size, model == "dense"), None, jax.device_count()).mesh
    mesh = sharding.make_mesh(to_dict(layout))
    with jax.set_mesh(mesh):
        training = Training(size, model == "dense", mesh)
        about = {
            "parameters": sum(a.size for a in jax.tree.leaves(training.state.params)),
            "versions": {"jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__},
        }
        step, update = Action(training.batch, training.step), Action(training.gradients, training.update)
        serve(about, {"step": step, "update": update})


if __name__ == "__main__":
    main()
