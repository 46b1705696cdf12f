"""What a run says of its causality, against the whole model: other later tokens, other sequences, and their effects.

By hand, with XLA_FLAGS as in `EIGHT`: `python tests/test_causality.py` prints the changes under a limited exchange.

Letters: B sequences, T tokens, D model.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runs import tiny, write_text
from test_train_step import config_of, mesh_of, router

from frugalmoe import sharding
from frugalmoe.analysis import load_run
from frugalmoe.analysis.pages.table import headline_rows
from frugalmoe.errors import UserError
from frugalmoe.generate import Sampling, generate, sample_text
from frugalmoe.model.causality import LEVELS, causality, leaking, parts
from frugalmoe.model.moe import Context
from frugalmoe.model.transformer import structure
from frugalmoe.routing import strategies
from frugalmoe.schema import Config
from frugalmoe.train.loop import train
from frugalmoe.train.step import init

pytestmark = pytest.mark.whole

B, T = 4, 16
EIGHT = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
FIELDS = {"model.init_std": 0.3, "model.num_layers": 3, "model.moe.num_shared_experts": 0}
TIGHT = {"model.moe.executor": "capacity", "model.moe.capacity_factor": 0.5}


def order(name: str) -> dict:
    return TIGHT | {"model.moe.drop_order": name}


def changes(config: Config, train: bool, mesh: jax.sharding.Mesh | None = None) -> tuple[float, float]:
    """The largest change of earlier hidden states by other later tokens, and of a sequence by all other sequences."""
    mesh = mesh or mesh_of()
    with jax.set_mesh(mesh):
        (graphdef, _, _), start = structure(config.model), init(config)
        params, state = start.params, start.router_state
        state = jax.tree.map(lambda s: s + 0.02 * jnp.arange(s.shape[-1]) if s.ndim > 1 else s, state)
        place = lambda a, letters: sharding.put(mesh, a, letters)
        ones = place(np.ones((B, T), np.int32), "BT")
        position_BT = place(np.tile(np.arange(T, dtype=np.int32), (B, 1)), "BT")
        keys_B = place(jax.random.split(jax.random.key(0), B), "B")

        @jax.jit
        def hidden(params, state, tokens_BT):
            context = Context(tokens_BT, ones, position_BT, keys_B, jnp.int32(0), train)
            return nnx.merge(graphdef, params, state)(context).hidden_BTD

        run = lambda tokens_BT: np.asarray(hidden(params, state, place(tokens_BT.astype(np.int32), "BT")))
        by_later, by_others, rng = 0.0, 0.0, np.random.default_rng(0)
        for cut in (4, 9, 12):
            here_BT, there_BT = rng.integers(0, 64, (2, B, T))
            plain = run(here_BT)
            later = run(np.where(np.arange(T) < cut, here_BT, there_BT))
            others = run(np.where(np.arange(B)[:, None] == 0, here_BT, there_BT))
            by_later = max(by_later, np.abs(later - plain)[:, :cut].max())
            by_others = max(by_others, np.abs(others - plain)[0].max())
    return float(by_later), float(by_others)


def found(by_later: float, by_others: float) -> str:
    """The level that the changes show; rounding is far below, and an expert more or less far above."""
    assert all(change < 1e-4 or change > 1e-2 for change in (by_later, by_others))
    return "leak" if by_later > 1e-2 else "batch" if by_others > 1e-2 else "safe"


# Every router as it is; and some of each kind whose rows an executor drops: one choice, two, more than K, not all real.
COMBINATIONS = [
    *((n, {}) for n in strategies.names()),
    *((n, order(o)) for n in ("topk_softmax", "switch_top1", "longcat", "gshard_top2") for o in ("choice", "weight")),
    *((n, order("token")) for n in ("topk_softmax", "top_p", "recycle")),
    ("top_p", order("choice") | {"model.moe.num_experts_per_token": 1, "model.moe.options.threshold": 0.9}),
    ("expert_choice", order("weight")),
    ("expert_choice", order("weight") | {"model.moe.options.evaluate": "choice"}),
    ("expert_choice", {"model.moe.options.pool": "batch", "model.moe.options.evaluate": "choice"}),
    ("topk_softmax", order("weight") | {"model.moe.capacity_factor": 4.0}),  # every token has room: E / K
    ("topk_softmax", order("weight") | {"model.moe.capacity_factor": 3.0}),
    ("topk_softmax", {"model.moe.exchange_room": 1.0}),  # on one device nothing is exchanged
    ("topk_softmax", {"model.mixture_of_depths.capacity": 0.4}),
    ("topk_softmax", {"model.mixture_of_depths.capacity": 0.4} | order("token")),
    ("topk_softmax", {"model.mixture_of_depths.capacity": 0.4} | order("weight")),
]


def parameters(name: str, fields: dict):
    marks = () if name == "topk_softmax" and len(fields) != 1 else pytest.mark.slow
    return pytest.param(name, fields, id="-".join(map(str, (name, *fields.values()))), marks=marks)


CASES = [parameters(*combination) for combination in COMBINATIONS]


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_the_whole_model_is_as_causal_as_it_says(name: str, fields: dict) -> None:
    """In evaluation, both ways: no change where nothing is said to leak, and a change where something is."""
    config = config_of(FIELDS | router(name) | fields)
    assert found(*changes(config, train=False)) == causality(config.model, train=False)


@pytest.mark.parametrize(("name", "fields"), CASES[-3:] + CASES[:1])
def test_training_too(name: str, fields: dict) -> None:
    config = config_of(FIELDS | router(name) | fields)
    assert found(*changes(config, train=True)) == causality(config.model, train=True)


def test_the_worst_part_decides_and_the_message_names_those_that_leak() -> None:
    both = router("expert_choice") | order("weight") | {"model.moe.options.evaluate": "choice"}
    config = config_of(both | {"model.mixture_of_depths.capacity": 0.4}).model
    assert list(parts(config, train=False).values()) == ["leak", "safe", "safe"]  # its plan has its capacity already
    assert leaking(config, train=False) == "model.moe.router='expert_choice'"
    assert leaking(config, train=True) == ("model.moe.router='expert_choice' and model.mixture_of_depths.capacity=0.4")
    threshold = config_of(router("expert_choice") | order("weight")).model
    assert leaking(threshold, train=False) == "model.moe.executor='capacity' with model.moe.drop_order='weight'"
    dense = config_of({"model.num_dense_layers": 3} | order("weight")).model
    assert parts(dense, train=True) == {} and causality(dense, train=True) == "safe"
    assert LEVELS.index("safe") < LEVELS.index("batch") < LEVELS.index("leak")


@pytest.mark.slow
def test_parts_are_known_inside_a_mesh_for_every_router() -> None:
    """As the loop and generation ask for them; a plan's shape needs no device."""
    with jax.set_mesh(mesh_of()):
        for name in strategies.names():
            for train_ in (True, False):
                assert parts(config_of(router(name) | order("weight")).model, train_).keys() == {
                    f"model.moe.router={name!r}",
                    "model.moe.executor='capacity' with model.moe.drop_order='weight'",
                }


def test_a_run_says_it_and_neither_samples_nor_measures_a_gap(tmp_path: Path) -> None:
    from frugalmoe.analysis import train_causal_gap

    config = tiny(write_text(tmp_path / "text"), tmp_path / "cache", order("weight") | {"train.steps": 5})
    path = tmp_path / "run"
    summary = train(config, path, sample=sample_text)
    assert (summary["router"]["causal"], summary["router"]["causal_in_evaluation"]) == ("leak", "leak")
    assert "causality: leak" in dict(headline_rows(load_run(path)))["router"]
    assert "drop_order='weight': cannot be sampled" in summary["sample"]["why"] and not summary["sample"]["text"]
    with pytest.raises(UserError, match=r"drop_order='weight': .* no causal loss to compare"):
        train_causal_gap(path, tokens=500)


@pytest.mark.parametrize("name", ["choice", "weight"])
def test_sampling_is_refused_before_anything_is_computed(name: str) -> None:
    with (
        jax.set_mesh(mesh_of()),
        pytest.raises(UserError, match=f"drop_order='{name}': cannot be sampled.*causal=leak"),
    ):
        next(generate(config_of(order(name)), None, np.zeros(3, np.int32), Sampling()))


ROOMS = {"all_gather": 1.0, "all_to_all": 1.0, "auto": 2.0}  # 2.0: room for all that two devices can ask for


@pytest.mark.slow
def test_a_limited_exchange_leaks_and_one_with_room_for_all_does_not() -> None:
    """On two devices of the expert axis; rows without room are lost in the order of experts, over all sequences."""
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": EIGHT}, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shown = json.loads(done.stdout.splitlines()[-1])
    assert {name: said for name, (_, said) in shown.items()} == {
        "all_gather": "leak",
        "all_to_all": "leak",
        "auto": "safe",
    }
    for name, (seen, said) in shown.items():
        assert found(*seen) == said, name


def exchanged(exchange: str) -> tuple[tuple[float, float], str]:
    fields = {"model.moe.exchange": exchange, "model.moe.exchange_room": ROOMS[exchange]}
    config = config_of(FIELDS | fields)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "expert": 2, "tensor": 1, "context": 1}, jax.devices()[:2])
    return changes(config, False, mesh), causality(config.model, False, expert_devices=2)


if __name__ == "__main__":
    print(json.dumps({exchange: exchanged(exchange) for exchange in ROOMS}))
