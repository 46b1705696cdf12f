"""Dense runs become mixtures of experts: what is kept, what is drawn anew, and what is refused.

Letters: L layers, E experts, D model, F hidden units of an expert.
"""

import json

import jax
import numpy as np
import pytest
from runs import TINY, tiny, write_text

from frugalmoe.cli import main
from frugalmoe.convert.upcycle import FILE, Recipe, look, upcycle, write
from frugalmoe.errors import UserError
from frugalmoe.train.loop import train
from frugalmoe.train.weights import load_checkpoint

pytestmark = pytest.mark.whole

DENSE = {
    "model.num_layers": 3,
    "model.num_dense_layers": 3,
    "model.attention": "window,grouped",
    "model.attention_options.window.window": 8,
    "train.steps": 2,
    "train.eval_rows": 4,
    "optim.warmup_steps": 1,
}
ROUNDING = 2e-5  # nats of a token's loss; sums over experts are in another order


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("upcycle")
    write_text(root / "text")
    return root


@pytest.fixture(scope="module")
def dense(place):
    train(tiny(place / "text", place / "cache", DENSE), place / "dense")
    return place / "dense"


def made_of(dense, *overrides, experts=4, per_token=2, **recipe):
    found = look(dense, recipe=Recipe(**recipe), experts=experts, per_token=per_token, overrides=overrides)
    return found, upcycle(found)


def moe(made) -> dict:
    return made.weights.params["moe_blocks"]["moe"]


@pytest.mark.parametrize(
    ("router", "counts", "scale"),
    [
        pytest.param(["topk_softmax", "options.renormalize=True"], (4, 2, 1), 1, id="copies"),
        pytest.param(["topk_softmax", "options.renormalize=True"], (8, 4, 4), 4, id="quarters"),
        pytest.param(["sigmoid_bias", "options.scale=2.5"], (4, 2, 2), 2 / 2.5, id="sigmoid", marks=pytest.mark.slow),
        pytest.param(["hash"], (4, 2, 1), 1, id="hash", marks=pytest.mark.slow),
        pytest.param(["recurrent", "options.hidden=8"], (8, 4, 2), 2, id="recurrent", marks=pytest.mark.slow),
    ],
)
def test_the_function_is_kept_where_weights_have_one_sum(dense, router, counts, scale):
    experts, per_token, granularity = counts
    overrides = [f"model.moe.router={router[0]}", *(f"model.moe.{option}" for option in router[1:])]
    _, made = made_of(dense, *overrides, experts=experts, per_token=per_token, granularity=granularity)
    np.testing.assert_allclose(made.scale_L, scale, rtol=1e-6)
    assert made.difference < ROUNDING


def test_weights_without_a_fixed_sum_are_scaled_by_their_mean(dense):
    """Softmax over all experts, whose new router gives a normed token logits of deviation 1, each token others."""
    _, made = made_of(dense, "model.moe.options.renormalize=False", experts=8)
    share_NE = np.exp(np.random.default_rng(0).normal(size=(10_000, 8)))
    share_NE /= share_NE.sum(-1, keepdims=True)
    np.testing.assert_allclose(made.scale_L, 1 / np.sort(share_NE)[:, -2:].sum(-1).mean(), rtol=0.05)
    assert ROUNDING < made.difference < 0.1


def test_what_is_no_expert_is_kept_to_the_bit_and_a_layer_may_stay_dense(dense):
    """Layers 0 and 2 look through a window, layer 1 at everything; layer 0 stays dense."""
    _, made = made_of(dense, "model.num_dense_layers=1")
    old, new = load_checkpoint(dense).weights.params, made.weights.params
    for name in ("embed_VD", "head_DV"):
        np.testing.assert_array_equal(new[name], old[name])
    of_kind = old["dense_blocks"]["attention"]
    for name, window_LD in of_kind["window"].items():
        np.testing.assert_array_equal(new["dense_blocks"]["attention"][name], window_LD[:1])
        np.testing.assert_array_equal(new["moe_blocks"]["attention"]["window"][name], window_LD[1:])
        np.testing.assert_array_equal(new["moe_blocks"]["attention"]["grouped"][name], of_kind["grouped"][name])
    np.testing.assert_array_equal(
        new["moe_blocks"]["ffn_norm"]["scale"], np.asarray(old["dense_blocks"]["ffn_norm"]["scale"])[1:]
    )
    assert made.difference < ROUNDING


def test_layers_between_may_stay_dense(dense):
    """Layer 1 of three gets experts; its attention sees everything, that of the others a window."""
    _, made = made_of(dense, "model.moe_every=2")
    old, new = load_checkpoint(dense).weights.params, made.weights.params
    for name, window_LD in old["dense_blocks"]["attention"]["window"].items():
        np.testing.assert_array_equal(new["dense_blocks"]["attention"][name], window_LD)
    gate_up_LD2F = np.asarray(old["dense_blocks"]["ffn"]["gate_up_D2F"])
    np.testing.assert_array_equal(new["dense_blocks"]["ffn"]["gate_up_D2F"], gate_up_LD2F[::2])
    np.testing.assert_array_equal(moe(made)["gate_up_ED2F"][0, 0], gate_up_LD2F[1])
    assert made.difference < ROUNDING


def test_an_expert_is_a_part_and_routers_choose_whole_copies(dense):
    _, made = made_of(dense, experts=8, per_token=4, granularity=2)
    hidden = TINY["model.dense_dim"] // 2
    gate_up_LED2F, down_LEFD = moe(made)["gate_up_ED2F"], moe(made)["down_EFD"]
    ffn = load_checkpoint(dense).weights.params["dense_blocks"]["ffn"]
    for expert in range(8):
        part = slice(expert % 2 * hidden, (expert % 2 + 1) * hidden)
        np.testing.assert_array_equal(gate_up_LED2F[:, expert], np.asarray(ffn["gate_up_D2F"])[..., part])
        np.testing.assert_allclose(down_LEFD[:, expert], 2 * np.asarray(ffn["down_FD"])[:, part], rtol=1e-6)
    kernel_LDE = moe(made)["router"]["kernel_DE"]
    np.testing.assert_array_equal(kernel_LDE[..., 0::2], kernel_LDE[..., 1::2])
    assert (kernel_LDE[..., 0] != kernel_LDE[..., 2]).all()


def test_redrawn_units_are_the_same_in_all_three_matrices_and_noise_has_its_size(dense):
    _, kept = made_of(dense)
    _, made = made_of(dense, redrawn=0.25)
    changed = jax.tree.map(lambda new, old: new != old, moe(made), moe(kept))
    of_gate_LEF, of_up_LEF = (changed["gate_up_ED2F"][..., i, :].all(2) for i in (0, 1))
    of_down_LEF = changed["down_EFD"].all(-1)
    assert (of_gate_LEF == of_up_LEF).all() and (of_gate_LEF == of_down_LEF).all()
    assert (of_gate_LEF.sum(-1) == TINY["model.dense_dim"] // 4).all() and len(np.unique(of_gate_LEF[0], axis=0)) == 4
    assert changed["gate_up_ED2F"].sum() == of_gate_LEF.sum() * TINY["model.dim"] * 2  # and nothing else
    deviation = lambda made: moe(made)["gate_up_ED2F"].std()
    assert abs(deviation(made) / deviation(kept) - 1) < 0.02
    _, noisy = made_of(dense, noise=0.1)
    added = moe(noisy)["gate_up_ED2F"] - moe(kept)["gate_up_ED2F"]
    assert abs(added.std() / deviation(kept) - 0.1) < 0.005
    assert ROUNDING < noisy.difference < made.difference


@pytest.mark.slow
def test_the_command_writes_a_run_that_training_goes_on_from(dense, place, capsys):
    flags = ["--experts=4", "--per-token=2", "--config.model.moe.losses.z=0.0"]
    assert main(["upcycle", str(dense), str(place / "new"), *flags, "--dry-run"]) == 0
    assert not (place / "new").exists()
    assert main(["upcycle", f"{dense}@2", str(place / "new"), *flags]) == 0
    assert "differ from the dense model's by at most" in " ".join(capsys.readouterr().out.split())
    about = json.loads((place / "new" / FILE).read_text())
    assert (about["step"], about["granularity"]) == (2, 1) and about["difference"] < ROUNDING
    run = place / "new"
    assert (
        main(["train", f"--from={run}", f"--config={run}", f"--workdir={place / 'on'}", "--config.train.steps=3"]) == 0
    )
    assert load_checkpoint(place / "on").step == 3


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--experts=3", "--per-token=2", "--granularity=2"], "--experts=3: must be a multiple of --granularity=2"),
        (["--experts=4", "--per-token=1", "--granularity=2"], "--per-token=1: must be a multiple"),
        (["--experts=30", "--per-token=5", "--granularity=5"], "--granularity=5: does not divide the 64 hidden units"),
        (["--experts=0", "--per-token=1"], "--experts=0: must be from 1"),
        (["--experts=4", "--per-token=2", "--noise=1e39"], "--noise=1e+39: must be 0 or from"),
        (["--experts=4", "--per-token=2", "--config.data.tokenizer=bpe:300"], "upcycling keeps that of the dense run"),
        (["--experts=100000000", "--per-token=2"], "--experts=100000000: the model needs "),
        (["--experts=2", "--per-token=4"], "model.moe.num_experts_per_token=4"),
        (["--experts=4", "--per-token=2", "--redrawn=1.5"], "--redrawn=1.5: must be in [0, 1]"),
        (["--experts=4", "--per-token=2", "--noise=nan"], "--noise=nan: must be a finite number"),
        (
            ["--experts=4", "--per-token=2", "--config.model.num_heads=2"],
            "--config.model.num_heads=2: upcycling keeps 4",
        ),
        (["--experts=4", "--per-token=2", "--config.model.num_dense_layers=3"], "leaves no layer with experts"),
        (["--experts=4", "--per-token=2", "--config.model.moe.expert_bias=True"], "expert_bias=True: upcycling keeps"),
        (["--experts=4", "--per-token=2", "--config.model.moe.activation=clamped_swiglu"], "upcycling keeps 'swiglu'"),
        (
            ["--experts=4", "--per-token=2", "--config.model.moe.num_shared_experts=1"],
            "--config.model.moe.num_shared_experts=1: upcycling keeps 0",
        ),
    ],
)
def test_what_is_refused_is_one_line(dense, place, capsys, flags, told):
    assert main(["upcycle", str(dense), str(place / "refused"), *flags]) == 2
    line = capsys.readouterr().err
    assert told in line and line.count("\n") == 1
    assert not (place / "refused").exists()


def test_a_run_with_experts_is_refused(dense, place):
    found, made = made_of(dense)
    write(found, made, place / "sparse")
    with pytest.raises(UserError, match="has experts already"):
        look(place / "sparse", recipe=Recipe(), experts=4, per_token=2)
    with pytest.raises(UserError, match="exists"):
        write(found, made, place / "sparse")
