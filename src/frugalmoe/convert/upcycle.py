"""A mixture of experts from a dense model: each feed-forward becomes experts that begin as copies of it, or of parts.

With `granularity` m an expert holds one of m equal parts of the feed-forward's hidden units, and m experts, one of each
part, are a copy; their routers begin with equal scores, so that a token chooses whole copies. What the experts add is
scaled by m / (sum of a token's weights), so that before the first step the model computes what the dense one did.

Sparse upcycling: Komatsuzaki et al. 2022, arXiv 2212.05055. Parts, and routers by virtual groups: He et al. 2024, arXiv
2410.07524; their scale is shared among the three matrices of SwiGLU, ours is in the last one, in which it is exact.
Hidden units that are drawn anew ("drop-upcycling"): Nakamura et al. 2025, arXiv 2502.19261.

Letters: L layers, E experts, D model, F hidden units of an expert; B sequences, T tokens.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from frugalmoe.config import RECORD, Config, override, read, resolve, settle
from frugalmoe.convert import output
from frugalmoe.convert.settings import flat_fields
from frugalmoe.data.batches import Batch
from frugalmoe.errors import UserError
from frugalmoe.fields import check_float, check_integer, to_dict
from frugalmoe.files import write_json
from frugalmoe.model import pattern
from frugalmoe.model.pattern import BlockKind
from frugalmoe.model.transformer import Transformer, count_parameters, declarations, split
from frugalmoe.routing import strategies
from frugalmoe.schema import Model
from frugalmoe.train import checkpoint, memory
from frugalmoe.train.placing import put_batch
from frugalmoe.train.step import Evaluated, make_eval_step
from frugalmoe.train.weights import Loaded, Weights, load_checkpoint

FILE = "upcycled.json"  # in the run's directory: what it was made of, and how
ROWS, TOKENS = 2, 64  # of random tokens on which the two models are compared
_FREE = ("model.moe", "model.num_dense_layers")  # of the model, what may differ from the dense one

Layer = dict[tuple[str, ...], np.ndarray]  # a block's arrays by path


class Recipe(NamedTuple):
    """How experts are made of a feed-forward."""

    granularity: int = 1  # parts of the feed-forward, of which an expert is one
    noise: float = 0.0  # deviation of what is added to every weight, over that of the expert's matrix
    redrawn: float = 0.0  # share of an expert's hidden units that are drawn anew, with mean and deviation of the old


class Found(NamedTuple):
    """A dense run, and the config of what is made of it."""

    run: Path
    dense: Loaded
    config: Config  # settled
    recipe: Recipe

    def __str__(self) -> str:
        sizes = [count_parameters(config.model) for config in (self.dense.config, self.config)]
        moe, layers = self.config.model.moe, len(pattern.moe_layers(self.config.model))
        return (
            f"{self.run}, step {self.dense.step:,}: {sizes[0]['total']:,} parameters become {sizes[1]['total']:,}, of "
            f"which a token uses {sizes[1]['active']:,}: {moe.num_experts_per_token} of {moe.num_experts} experts of "
            f"{moe.expert_dim} hidden units in {layers} layers"
        )


class Made(NamedTuple):
    """The weights of an upcycled model, and how far it is from the dense one."""

    weights: Weights
    scale_L: np.ndarray  # by which a layer's experts are multiplied
    difference: float  # nats: largest difference of a token's loss, over random tokens


def look(
    run: Path, step: int | None = None, *, recipe: Recipe, experts: int, per_token: int, overrides: Sequence[str] = ()
) -> Found:
    """Returns how a dense run would be upcycled. Raises `UserError` for a run that has experts already or is no run,
    for counts that are no multiples of the granularity, and for overrides that change what is not of the experts.

    overrides: fields of the run's config, as "model.moe.router=sigmoid_bias"; `model.num_dense_layers` first layers
    stay dense, and so do those between that `model.moe_every` leaves out.
    """
    _check(recipe, experts, per_token)
    dense = load_checkpoint(run, step)
    theirs = dense.config.model
    if pattern.has_experts(theirs):
        raise UserError(f"{run}: has experts already; a dense run has model.num_dense_layers = model.num_layers")
    for field in ("mixture_of_depths.capacity", "multi_token_prediction.depth"):
        section, name = field.split(".")
        if value := getattr(getattr(theirs, section), name):
            raise UserError(f"{run}: model.{field}={value}: upcycling knows no such models; valid: 0")
    if theirs.dense_dim % recipe.granularity:
        rule = f"does not divide the {theirs.dense_dim} hidden units of the feed-forward (model.dense_dim)"
        raise UserError(f"--granularity={recipe.granularity}: {rule}")
    fields = {
        "model.num_dense_layers": 0,
        "model.moe.num_experts": experts,
        "model.moe.num_experts_per_token": per_token,
        "model.moe.expert_dim": theirs.dense_dim // recipe.granularity,
        "model.moe.num_shared_experts": 0,
        "model.moe.shared_gate": False,
        "model.moe.expert_bias": False,
        "model.moe.activation": "swiglu",  # as dense feed-forwards have it
    }
    config = resolve(override(override(read(str(run / RECORD)), fields), overrides))
    config = settle(config, dense.tokenizer.size, None)
    _check_alike(config.model, theirs, fields)
    if config.data.tokenizer != dense.config.data.tokenizer:
        raise UserError(f"--config.data.tokenizer={config.data.tokenizer!r}: upcycling keeps that of the dense run")
    # The weights are in memory twice: as they are made, and as the model computes with them.
    memory.check(f"--experts={experts}", 2 * 4 * count_parameters(config.model)["total"])
    return Found(run, dense, config, recipe)


def _check(recipe: Recipe, experts: int, per_token: int) -> None:
    check_integer("--granularity", recipe.granularity, least=1)
    for flag, count in (("--experts", experts), ("--per-token", per_token)):
        check_integer(flag, count, least=1)
        if count % recipe.granularity:
            rule = f"must be a multiple of --granularity={recipe.granularity}, so that tokens choose whole copies"
            raise UserError(f"{flag}={count}: {rule}")
    if not 0 <= recipe.redrawn <= 1:
        raise UserError(f"--redrawn={recipe.redrawn}: must be in [0, 1]")
    if not 0 <= recipe.noise < float("inf"):
        raise UserError(f"--noise={recipe.noise}: must be a finite number, 0 or more")
    check_float("--noise", recipe.noise)


def _check_alike(ours: Model, theirs: Model, fields: Mapping[str, Any]) -> None:
    """Refuses overrides of what the dense model fixes, or flags of their own say."""
    here, there = flat_fields({"model": to_dict(ours)}), flat_fields({"model": to_dict(theirs)})
    for name, value in here.items():
        if name in fields and name != "model.num_dense_layers":
            wanted = fields[name]
        elif name.startswith(_FREE):
            continue
        else:
            wanted = there.get(name)
        if value != wanted:
            raise UserError(f"--config.{name}={value!r}: upcycling keeps {wanted!r}")
    if not pattern.has_experts(ours):
        rule = f"leaves no layer with experts; valid: 0 to {ours.num_layers - 1}"
        raise UserError(f"--config.model.num_dense_layers={ours.num_dense_layers}: {rule}")


def upcycle(found: Found) -> Made:
    """Returns the upcycled weights, float32, in memory, on one device."""
    model = found.config.model
    claimed = strategies.get(model.moe.router).claim("weight_sum", model.moe)
    count, granularity = len(pattern.moe_layers(model)), found.recipe.granularity
    known = isinstance(claimed, (int, float))
    sum_L = np.full(count, claimed if known else model.moe.num_experts_per_token / model.moe.num_experts)
    with jax.set_mesh(found.dense.mesh):
        made = _weights(found, granularity / sum_L)
        ours = _evaluated(found.config, made)
        if not known:  # it is what this router's weights come to, in the mean
            sum_L = _mean_weight_sums(found.config, ours)
            made = _weights(found, granularity / sum_L)
            ours = _evaluated(found.config, made)
        theirs = _evaluated(found.dense.config, found.dense.weights)
    difference = float(np.abs(np.asarray(ours.ce_BT) - np.asarray(theirs.ce_BT)).max())
    if not np.isfinite(difference):
        raise UserError(f"{found.run}: the upcycled model has losses that are not finite")
    return Made(made, granularity / sum_L, difference)


def write(found: Found, made: Made, run: Path) -> None:
    """Writes the run directory, whole or not at all: a checkpoint of step 0, without an optimizer's state."""
    output.check_new(run, "RUN")
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made.weights))
    checkpoint.check_space_for(output.existing_parent(run), size)
    with output.appearing(run) as place:
        output.write_run(place, found.config, found.dense.tokenizer, made.weights)
        about = {"run": str(found.run.resolve()), "step": found.dense.step, **found.recipe._asdict()}
        about |= {"scale": made.scale_L.tolist(), "difference": made.difference}
        write_json(place / FILE, about)


def _weights(found: Found, scale_L: np.ndarray) -> Weights:
    """The weights of the upcycled model, where a layer's experts are multiplied by `scale_L`."""
    old, new = found.dense.config.model, found.config.model
    params = jax.tree.map(np.asarray, found.dense.weights.params)
    layers = _by_layer(params.pop("dense_blocks"), pattern.layers(old))
    fresh, state = _fresh_routers(found)
    for i, layer in enumerate(layers[number] for number in pattern.moe_layers(new)):
        key = np.random.default_rng([found.config.train.seed, i])
        layer |= _experts(layer.pop(("ffn", "gate_up_D2F")), layer.pop(("ffn", "down_FD")), found, scale_L[i], key)
        layer |= {path: a_L[i] for path, a_L in fresh.items()}
    for feed_forward in pattern.FEED_FORWARDS:
        own = [(layer, kind) for layer, kind in zip(layers, pattern.layers(new)) if kind.feed_forward == feed_forward]
        if own:
            params[pattern.NAMES[feed_forward, ""]] = _stack(*zip(*own))
    return Weights(params | state.params, state.router_state)


def _experts(
    gate_up_D2F: np.ndarray, down_FD: np.ndarray, found: Found, scale: float, rng: np.random.Generator
) -> Layer:
    """The experts of one layer: parts of a feed-forward, each as often as there are copies, then changed."""
    recipe, moe = found.recipe, found.config.model.moe
    parts = np.arange(moe.num_experts) % recipe.granularity
    hidden = moe.expert_dim
    gate_up_ED2F = np.stack([gate_up_D2F[..., p * hidden : (p + 1) * hidden] for p in parts])
    down_EFD = np.stack([down_FD[p * hidden : (p + 1) * hidden] for p in parts])
    if count := round(recipe.redrawn * hidden):
        for gate_up_D2F, down_FD in zip(gate_up_ED2F, down_EFD):
            units = rng.choice(hidden, count, replace=False)
            for matrix in (gate_up_D2F[:, 0].T, gate_up_D2F[:, 1].T, down_FD):  # views, a hidden unit a row
                old = matrix[units]
                matrix[units] = rng.normal(old.mean(), old.std(), old.shape)
    if recipe.noise:
        for of_expert in (*gate_up_ED2F, *down_EFD):
            of_expert += rng.normal(0, recipe.noise * of_expert.std(), of_expert.shape)
    return {("moe", "gate_up_ED2F"): gate_up_ED2F, ("moe", "down_EFD"): down_EFD * np.float32(scale)}


def _fresh_routers(found: Found) -> tuple[Layer, Weights]:
    """(routers' parameters [L, ...] by their path in a block, routers' shared parameters and state), as a new model has
    them, but for experts of one copy, which have the same.
    """
    config = found.config.model

    @jax.jit
    def routers(seed: Array) -> tuple[dict, dict, dict]:
        _, params, state = split(Transformer(config, jax.random.key(seed)))
        own = params["moe_blocks"]["moe"].get("router", {})
        return own, {name: params[name] for name in ("shared_router",) if name in params}, state

    with jax.set_mesh(found.dense.mesh):
        own, shared, state = jax.tree.map(np.asarray, routers(np.uint32(found.config.train.seed)))
    declared = declarations(config)
    alike = lambda a, path: _alike(a, declared[path].letters, found)
    own = {name: alike(a, ("moe_blocks", "moe", "router", name)) for name, a in own.items()}
    shared = jax.tree_util.tree_map_with_path(lambda p, a: alike(a, tuple(key.key for key in p)), shared)
    return {("moe", "router", name): a for name, a in own.items()}, Weights(shared, state)


def _alike(array: np.ndarray, letters: str, found: Found) -> np.ndarray:
    """An array of routers in which the experts of a copy have the entries of its first one."""
    letters = letters.replace("->", "")
    experts, granularity = found.config.model.moe.num_experts, found.recipe.granularity
    if granularity == 1 or "E" not in letters:
        return array
    axis = letters.index("E") - len(letters)  # from the end: a stack has its layers in front
    return np.take(array, np.arange(experts) // granularity * granularity, axis=axis)


def _by_layer(blocks: Mapping[str, Any], kinds: Sequence[BlockKind]) -> list[Layer]:
    """The arrays of each block of a stack, by path; see `block.stacked` for attention of several kinds."""
    several = len({kind.attention for kind in kinds}) > 1
    layers: list[Layer] = [{} for _ in kinds]
    for path, stack in _paths(blocks):
        if several and path[0] == "attention":
            own = [layer for layer, kind in zip(layers, kinds) if pattern.short(kind.attention) == path[1]]
            path = (path[0], *path[2:])
        else:
            own = layers
        for layer, array in zip(own, stack, strict=True):
            layer[path] = array
    return layers


def _stack(layers: Sequence[Layer], kinds: Sequence[BlockKind]) -> dict:
    """What `_by_layer` takes apart."""
    several = len({kind.attention for kind in kinds}) > 1
    rows: dict[tuple[str, ...], list[np.ndarray]] = {}
    for layer, kind in zip(layers, kinds):
        for path, array in layer.items():
            named = several and path[0] == "attention"
            path = (path[0], pattern.short(kind.attention), *path[1:]) if named else path
            rows.setdefault(path, []).append(array)
    tree: dict = {}
    for path, arrays in rows.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = np.stack(arrays)
    return tree


def _paths(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], np.ndarray]]:
    found = []
    for name, node in tree.items():
        found += _paths(node, (*prefix, name)) if isinstance(node, Mapping) else [((*prefix, name), node)]
    return found


def _mean_weight_sums(config: Config, evaluated: Evaluated) -> np.ndarray:
    """What a token's weights come to in each layer, in the mean [L]."""
    sum_L = np.asarray(evaluated.plan.weights.sum(-1).mean((-2, -1)), np.float64)
    if not (np.isfinite(sum_L).all() and (sum_L > 0).all()):
        rule = f"a token's weights come to {sum_L.min():.3g} in a layer, which no scale of the experts can make up for"
        raise UserError(f"model.moe.router={config.model.moe.router!r}: {rule}")
    return sum_L


def _evaluated(config: Config, weights: Weights) -> Evaluated:
    """What a model makes of rows of random tokens, a document each, on the mesh in context."""
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, (ROWS, TOKENS + 1), dtype=np.int32)
    places_BT = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (ROWS, TOKENS))
    ones_BT = np.ones((ROWS, TOKENS), np.int32)
    batch = Batch(ids[:, :-1], ids[:, 1:], ones_BT, places_BT, ones_BT > 0, np.zeros_like(ones_BT))
    step = jax.jit(make_eval_step(config, trace=pattern.has_experts(config.model)))
    return step(*weights, put_batch(jax.sharding.get_mesh(), batch, "BT"))
