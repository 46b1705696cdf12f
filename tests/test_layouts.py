"""The law of layouts: training on any layout of eight devices is training on one.

By hand, with XLA_FLAGS as below: `python tests/test_layouts.py carry 41112` prints the differences.
"""

import functools
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_train_step import DEPTHS, STATEFUL, batch, config_of, largest_difference, mesh_of

from frugalmoe import sharding
from frugalmoe.config.checks import check_devices
from frugalmoe.data import Batch
from frugalmoe.laws import xla_flags
from frugalmoe.sharding.mesh import AXES
from frugalmoe.sharding.parameters import Declaration, gather_array, parameter_spec
from frugalmoe.train import checkpoint
from frugalmoe.train.step import State, abstract, init, make_train_step

# Sizes of the axes data, fsdp, expert, tensor, context.
LAYOUTS = ["".join(map(str, s)) for s in itertools.product((1, 2, 4, 8), repeat=5) if math.prod(s) == 8]
HALVED = {"train.accumulate_steps": 2}
INTERLEAVED = {"model.num_layers": 4, "model.num_dense_layers": 0, "model.moe_every": 2}
DENSE_TOO = {"model.num_layers": 3, "model.num_dense_layers": 1}
WIDE = {
    "model.num_layers": 2,
    "model.num_dense_layers": 0,
    "model.num_heads": 8,
    "model.num_kv_heads": 4,
    "model.head_dim": 8,
    "model.qkv_bias": True,
    "model.qk_norm": "head",
    "model.dense_dim": 64,
    "model.moe.num_shared_experts": 1,
    "data.sequence_length": 32,
    "train.batch_size": 16,
}
BIASES = {"model.moe.expert_bias": True, "model.moe.activation": "clamped_swiglu"}
# Every form of plan, executor, exchange, state, carry and optimizer, with and without accumulation and remat.
FORMS = {
    "all_gather": DENSE_TOO
    | {
        "model.moe.router": "noisy_topk",
        "model.moe.losses.load": 0.1,
        "model.moe.load_balance_scope": "global",
        "model.moe.exchange": "all_gather",
    }
    | BIASES,
    "all_to_all": HALVED
    | {
        "model.moe.router": "similarity_preserving",
        "model.moe.losses.orthogonality": 0.1,
        "model.moe.exchange": "all_to_all",
        "model.remat": "full",
    }
    | BIASES,
    "capacity": {"model.moe.executor": "capacity", "model.moe.capacity_factor": 1.0, "model.remat": "dots"}
    | (HALVED | BIASES),
    "expert_choice": {"model.moe.router": "expert_choice", "model.remat": "full"},
    "state": STATEFUL | {"model.moe.losses.sequence_balance": 0.01, "model.moe.exchange": "all_to_all"} | HALVED,
    "carry": {"model.moe.router": "recurrent", "model.moe.options.hidden": 8, "model.remat": "full"}
    | (HALVED | INTERLEAVED),
    "variable": {"model.moe.router": "relu", "model.moe.losses.l1": 1.0, "model.moe.exchange": "all_to_all"}
    | {"model.moe.shared_gate": True},
    "noise, experts run, added": {
        "model.moe.router": "stochastic_warmup",
        "model.moe.options.base": "default_moe",
        "model.moe.options.steps": 2,
        "model.remat": "dots",
    },
    "depths": DEPTHS | DENSE_TOO | {"model.remat": "full"},
    "muon": DENSE_TOO
    | {
        "optim.name": "muon",
        "model.norm": "layer",
        "model.head_bias": True,
        "model.attention": "chunked,nope",
        "model.attention_options.chunked.chunk": 7,
        "model.attention_options.nope.temperature": 0.3,
        "model.attention_options.nope.floor": 4,
        "model.qk_norm": "unit",
        "model.clip_qkv": 0.5,
        "model.multipliers.logits": 2.0,
    },
    "window, sinks": {
        "model.attention": "window,grouped",
        "model.attention_options.window.window": 7,
        "model.attention_options.window.sinks": True,
        "model.attention_options.grouped.sinks": True,
        "model.moe.options.logit_bias": True,
        "model.qk_norm": "rotated",
        "model.out_bias": True,
        "model.norm_position": "after",
        "model.multipliers.embedding": 3.0,
        "model.multipliers.residual": 0.5,
        "model.multipliers.logits": 2.0,
    }
    | HALVED,
    "latent": {
        "model.attention": "latent",
        "model.attention_options.latent.query_rank": 16,
        "model.qkv_bias": False,
        "model.qk_norm": "none",
        "model.remat": "full",
    },
    "multi_token": STATEFUL | {"model.multi_token_prediction.depth": 2, "model.remat": "full"} | HALVED,
}
# Which form is trained on which layouts: each layout has a form, each form meets each axis, and the expert axis twice
# where it has an exchange of its own. ALL_LAYOUTS=1 trains every form on every layout, inverted too.
LAYOUTS_OF = {
    "all_gather": "21122 12212 11421 11124",
    "all_to_all": "41211 14121 12141 11214",
    "capacity": "24111 12411 11222 11142",
    "expert_choice": "42111 21221 21212 11118",
    "state": "21114 12114 11412 11241",
    "carry": "41112 22211 12122 11181",
    "variable": "81111 22112 21411 12221",
    "noise, experts run, added": "41121 18111 14112 11811",
    "depths": "22121 21141 14211",
    "muon": "12221 22112",
    "window, sinks": "22121 11222",
    "latent": "22121 11222",
    "multi_token": "22112 11222",
}


def inverted(fields: dict) -> dict:
    """Accumulation and remat where the form has none, and none where it has."""
    steps = 3 - fields.get("train.accumulate_steps", 1)
    scope = {"model.moe.load_balance_scope": "micro_batch"} if steps == 2 else {}  # no micro-batch knows the whole step
    remat = "none" if "model.remat" in fields else "full"
    return fields | scope | {"train.accumulate_steps": steps, "model.remat": remat}


INVERTED = {f"{form}, inverted": inverted(fields) for form, fields in FORMS.items()}
EVERYTHING = "ALL_LAYOUTS" in os.environ
STEPS = 5
TOLERANCE = 1e-5  # of the largest value of an array, float32


def layouts_of(form: str) -> list[str]:
    if not EVERYTHING:
        return LAYOUTS_OF[form].split()
    return [layout for layout in LAYOUTS if "depths" not in form or layout.endswith("1")]  # it wants whole sequences


def without_ties(batch: Batch) -> Batch:
    """Each document of a row begins with a token of its own: where `a` or `a a` begins two places, the model's states
    are equal there, and an expert that chooses one of them has to draw.
    """
    own_BT = 62 + (batch.segment_ids_BT == 2)
    return batch._replace(tokens_BT=np.where(batch.positions_BT == 0, own_BT, batch.tokens_BT % 62))


def replicas_agree(array: jax.Array) -> bool:
    """Whether all devices that hold the same part of it hold the same bits."""
    parts = {}
    for shard in array.addressable_shards:
        parts.setdefault(str(shard.index), []).append(np.asarray(shard.data))
    return all(np.array_equal(first, other) for first, *others in parts.values() for other in others)


@functools.cache
def start(form: str, num_kv_heads: int) -> State:
    with jax.set_mesh(mesh_of()):
        return jax.device_get(init(config_of(WIDE | (FORMS | INVERTED)[form] | {"model.num_kv_heads": num_kv_heads})))


@functools.cache
def trained(form: str, layout: str, num_kv_heads: int) -> dict:
    """The gradient as the first step's Adam has it, what follows after some steps, and every step's metrics."""
    sizes = [int(size) for size in layout]
    mesh = {f"mesh.{axis}": size for axis, size in zip(sharding.AXES, sizes)}
    config = config_of(WIDE | (FORMS | INVERTED)[form] | mesh | {"model.num_kv_heads": num_kv_heads})
    num_devices, a = math.prod(sizes), config.train.accumulate_steps
    mesh = sharding.make_mesh(check_devices(config, num_devices), jax.devices()[:num_devices])
    options = {"xla_backend_optimization_level": 0}  # most of the time is the compiler's
    with jax.set_mesh(mesh):
        step = jax.jit(make_train_step(config), compiler_options=options)
        state = jax.device_put(start(form, num_kv_heads), jax.tree.map(lambda a: a.sharding, abstract(config)))
        metrics, first = [], None
        for i in range(STEPS):
            split = Batch(*(x.reshape(a, -1, *x.shape[1:]) for x in without_ties(batch(i, B=config.train.batch_size))))
            state, of_step = step(state, Batch(*(sharding.put(mesh, x, "ABT") for x in split)))
            first = jax.device_get(state.opt_state) if first is None else first
            metrics.append(jax.device_get(of_step))
        assert step._cache_size() == 1, "compiled twice"
        assert all(map(replicas_agree, jax.tree.leaves(state)))
    of_devices = [m.metrics.pop("router/device_load") for m in metrics if "router/device_load" in m.metrics]
    assert len(of_devices) == STEPS * (sizes[2] > 1)
    parts = {"gradient": first, "parameters": state.params, "optimizer": state.opt_state, "metrics": metrics}
    return jax.device_get(parts | {"router state": state.router_state})


def differences(form: str, layout: str) -> dict[str, float]:
    num_kv_heads = max(4, int(layout[3]))
    one, eight = (trained(form, of, num_kv_heads) for of in ("11111", layout))
    return {part: largest_difference(one[part], eight[part]) for part in one if jax.tree.leaves(one[part])}


def moved(directory: Path) -> dict[str, bool]:
    """A state made on one layout, saved there and restored on others: the bits of the one made on one device."""
    config, equal = config_of(WIDE | FORMS["state"]), {}
    bits = lambda tree: [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    of_one_device = bits(start("state", WIDE["model.num_kv_heads"]))
    with checkpoint.open_manager(directory, config.checkpoint) as manager:
        for layout in ("12212", "21141", "11111"):
            sizes = [int(size) for size in layout]
            mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)), jax.devices()[: math.prod(sizes)])
            with jax.set_mesh(mesh):
                state = init(config) if not equal else checkpoint.restore(manager, 0, abstract(config))
                if not equal:
                    checkpoint.save(manager, 0, state)
                    manager.wait_until_finished()
                places = jax.tree.map(lambda a, b: a.sharding == b.sharding, state, abstract(config))
            equal[layout] = jax.tree.all(places) and all(map(np.array_equal, of_one_device, bits(state)))
    return equal


def test_every_layout_has_a_form_and_every_form_meets_every_axis():
    assert len(LAYOUTS) == math.comb(3 + 4, 4) == 35
    of_form = {form: layouts.split() for form, layouts in LAYOUTS_OF.items()}
    assert set(itertools.chain(*of_form.values())) == set(LAYOUTS) and of_form.keys() == FORMS.keys()
    for form, layouts in of_form.items():
        assert all(max(sizes) > "1" for sizes in list(zip(*layouts))[: 4 if form == "depths" else 5]), form


def on_eight_devices(*arguments: object) -> dict:
    # Bits of a new state are compared as users' programs make them, steps as they are compiled fastest.
    flags = "" if arguments[0] == "moved" else xla_flags()
    flags += " --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, *map(str, arguments)]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])


ON_NEWEST = ("all_to_all", "carry")  # both accumulate; routers whole and with a carry
EVERY_FORM = [pytest.param(form, marks=pytest.mark.newest if form in ON_NEWEST else ()) for form in FORMS]


@pytest.mark.slow
@pytest.mark.parametrize("form", [*EVERY_FORM, *(INVERTED if EVERYTHING else ())])
def test_eight_devices_equal_one(form):
    """The same loss, gradient, statistics, router state and parameters after five steps."""
    found = on_eight_devices(form, *layouts_of(form))
    assert list(found) == layouts_of(form)
    wrong = {layout: parts for layout, parts in found.items() if max(parts.values()) > TOLERANCE}
    assert not wrong, wrong


@pytest.mark.newest
@pytest.mark.slow
def test_a_state_is_the_same_on_every_layout_and_moves_between_them(tmp_path):
    assert on_eight_devices("moved", tmp_path) == {"12212": True, "21141": True, "11111": True}


@pytest.mark.parametrize("platform, constrained", [("gpu", True), ("tpu", False)])
def test_gpus_keep_parameters_as_they_are_stored(platform, constrained):
    """What is gathered is row-major, so that XLA turns around one layer and not a copy of all. Before this a step of
    Ling-mini on 4 H100 took 80.3 GiB, now 65.4 (docs/pods.md).
    """
    absent, sizes = jax.sharding.AbstractDevice("a device", 1, platform), tuple(2 * (a == "fsdp") or 1 for a in AXES)
    mesh = jax.sharding.AbstractMesh(sizes, AXES, (jax.sharding.AxisType.Explicit,) * len(AXES), abstract_device=absent)
    declared = Declaration("ED->F", "matrix")
    loss = lambda a_EDF: gather_array(a_EDF, declared, jax.numpy.bfloat16).astype(jax.numpy.float32).sum()
    with jax.sharding.use_abstract_mesh(mesh):
        kept = jax.sharding.NamedSharding(mesh, parameter_spec(declared, 3, True))
        text = str(jax.make_jaxpr(jax.grad(loss))(jax.ShapeDtypeStruct((4, 8, 6), np.float32, sharding=kept)))
    before, gathered, _ = text.partition("all_gather[")
    assert gathered and ("layout_constraint" in before) == constrained
    assert not constrained or "major_to_minor=(0, 1, 2)" in before


def test_nothing_sorts_by_jnp_argsort():
    """Its gradient is silently wrong under `shard_map` on jax 0.10.2, where `lax.sort` of pairs is right."""
    sources = {path: path.read_text() for path in Path(sharding.__file__).parents[1].rglob("*.py")}
    assert len(sources) > 100 and not [path for path, text in sources.items() if "jnp.argsort" in text]


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    print(json.dumps(moved(Path(rest[0])) if what == "moved" else {of: differences(what, of) for of in rest}))
