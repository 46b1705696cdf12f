"""Who moves the router, and which experts learn: norms of gradients at a checkpoint.

Each norm is the root mean square over S training batches of the norm of a batch's gradient, which is what an optimizer
step sees, its sampling noise included. Intervals are over batches.

Letters: S batches, L MoE layers, E experts, I parameters of a layer's router, U units (see `uncertainty`).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.progress import track

from frugalmoe.analysis.lab.lab import Lab
from frugalmoe.analysis.measures.uncertainty import Estimate, bootstrap
from frugalmoe.data.batches import Batch
from frugalmoe.errors import UserError
from frugalmoe.optimizers import EVERYTHING
from frugalmoe.train import checkpoint as checkpoints
from frugalmoe.train.objective import knobs
from frugalmoe.train.placing import put_batch
from frugalmoe.train.step import abstract, make_gradient


class Gradients(NamedTuple):
    """Gradients of several batches: of each the squared norms, and the product of the router's two gradients."""

    layers_L: np.ndarray  # index in the whole network
    language_SL: np.ndarray  # router, by the language-model loss
    auxiliary_SL: np.ndarray  # router, by the auxiliary losses with their coefficients
    product_SL: np.ndarray
    parameters: int  # I
    expert_SLE: np.ndarray  # an expert's weights, by the whole loss
    counts_SLE: np.ndarray  # slots that the expert got


def language_share(language_SL: np.ndarray, auxiliary_SL: np.ndarray) -> Estimate:
    """||g_LM|| / (||g_LM|| + ||g_aux||) [L] of the router's gradients: 1 where no auxiliary loss acts, 0 where language
    modelling has no say. The ratio ||g_LM|| / ||g_aux|| is s / (1 - s); NaN where nothing moves the router.
    """
    return bootstrap(_share, language_SL, auxiliary_SL)


def _share(language_L: np.ndarray, auxiliary_L: np.ndarray) -> np.ndarray:
    language_L, auxiliary_L = np.sqrt(language_L), np.sqrt(auxiliary_L)
    total_L = language_L + auxiliary_L
    return np.divide(language_L, total_L, out=np.full(np.shape(total_L), np.nan), where=total_L > 0)


def agreement(language_SL: np.ndarray, auxiliary_SL: np.ndarray, product_SL: np.ndarray) -> Estimate:
    """sum_s <g_LM, g_aux> / sqrt(sum_s ||g_LM||^2 sum_s ||g_aux||^2) [L]: below 0 the losses pull against each other.

    Chance level of directions without relation: 0 with standard deviation 1 / sqrt(I S).
    """
    return bootstrap(_cosine, language_SL, auxiliary_SL, product_SL)


def _cosine(language_L: np.ndarray, auxiliary_L: np.ndarray, product_L: np.ndarray) -> np.ndarray:
    norm_L = np.sqrt(language_L * auxiliary_L)
    return np.divide(product_L, norm_L, out=np.full(np.shape(norm_L), np.nan), where=norm_L > 0)


def expert_share(expert_SLE: np.ndarray) -> Estimate:
    """||g_e|| / sum_e' ||g_e'|| [L, E]: share of the experts' gradient norm. Chance level 1 / E.

    Compare with the share p_e of the tokens: gradients of tokens that agree grow as p_e, unrelated ones as its root.
    """
    return bootstrap(_expert_share, expert_SLE)


def _expert_share(expert_LE: np.ndarray) -> np.ndarray:
    norm_LE = np.sqrt(expert_LE)
    return norm_LE / norm_LE.sum(-1, keepdims=True)


def load_gradients(
    run: str | Path, *, checkpoint: int | None = None, batches: int = 16, progress: bool = True
) -> Gradients:
    """Gradients of a run's checkpoint, the newest by default, on the training batches that come after it.

    Raises `UserError` for a router without parameters of its own in each layer. Cost: two backward passes a batch.
    """
    if batches < 1:
        raise UserError(f"batches={batches}: must be at least 1")
    lab = Lab(Path(run), checkpoint, tokens=1)
    router = lab.weights.params["moe_blocks"]["moe"].get("router", {})
    if not router:
        raise UserError(f"{run}: router {lab.router.name!r} has no parameters in a layer, so no gradient reaches them")
    everything = dataclasses.replace(lab.config.optim, train=EVERYTHING)  # whichever the run trains
    config, own = dataclasses.replace(lab.config, optim=everything), knobs(lab.config)
    gradient, measure = jax.jit(make_gradient(config)), jax.jit(_norms)
    a, found = config.train.accumulate_steps, []
    with jax.set_mesh(lab.mesh), checkpoints.open_manager(Path(run), config.checkpoint) as manager:
        skipped = int(checkpoints.restore(manager, lab.step, abstract(config), ("step",)).position) - lab.step
        for step in track(range(lab.step, lab.step + batches), "gradients", disable=not progress):
            rows = Batch(*(x.reshape(a, x.shape[0] // a, *x.shape[1:]) for x in lab.data.batch(step + skipped)))
            inputs = (*lab.weights, put_batch(lab.mesh, rows, "ABT"), jnp.int32(step))
            whole, sums, _ = gradient(*inputs, own)
            language, _, _ = gradient(*inputs, own._replace(losses={name: np.float32(0) for name in own.losses}))
            counts_LE = sums.stats["counts"][: len(lab.layers)]  # without modules that predict further ahead
            found.append(jax.device_get((*measure(whole, language), counts_LE)))
    language, auxiliary, product, expert, counts = map(np.stack, zip(*found))
    size = sum(leaf[0].size for leaf in jax.tree.leaves(router))
    return Gradients(np.array(lab.layers), language, auxiliary, product, size, expert, counts)


def _norms(whole: Mapping, language: Mapping) -> tuple[Array, Array, Array, Array]:
    """What `Gradients` holds of one batch, from the gradients of the whole loss and of the language-model loss."""
    whole, language = whole["moe_blocks"]["moe"], language["moe_blocks"]["moe"]
    auxiliary = jax.tree.map(jnp.subtract, whole["router"], language["router"])
    by_layer = lambda a, b: sum(jax.tree.leaves(jax.tree.map(lambda x, y: _over(x * y, 1), a, b)))
    expert_LE = sum(_over(jnp.square(whole[name]), 2) for name in ("gate_up_ED2F", "down_EFD"))
    own = language["router"]
    return by_layer(own, own), by_layer(auxiliary, auxiliary), by_layer(own, auxiliary), expert_LE


def _over(x: Array, axes: int) -> Array:
    """Sums over all but the first axes."""
    return x.sum(tuple(range(axes, x.ndim)))
