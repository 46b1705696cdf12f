"""Traces and interventions of real tiny runs. Letters: S checkpoints, L layers, N tokens, E experts, K choices."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from runs import run as command
from runs import tiny, write_text

from frugalmoe import analysis
from frugalmoe.analysis import (
    Demote,
    Mask,
    RandomChoice,
    Swap,
    gradients,
    intervene,
    load_drops,
    load_gradients,
    load_run,
    load_trace,
    train_causal_gap,
    try_swaps,
    write_report,
    write_trace,
)
from frugalmoe.analysis.lab.lab import Lab
from frugalmoe.data import open_data
from frugalmoe.errors import UserError
from frugalmoe.train.loop import train

pytestmark = pytest.mark.slow
STEPS, TOKENS, E, K = [4, 8, 12], 1000, 8, 2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two domains of 40 documents each, half of them held out."""
    root = tmp_path_factory.mktemp("traced")
    for i, file in enumerate(sorted(write_text(root / "text", documents=80).iterdir())):
        folder = root / "text" / ("verse" if i % 2 else "code")
        folder.mkdir(exist_ok=True)
        file.rename(folder / file.name)
    return root


def trained(root, name, **overrides):
    sources = {d: {"path": str(root / "text" / d)} for d in ("code", "verse")}
    fields = {"checkpoint.every_steps": 4, "checkpoint.keep_last": 9, "data.sources": sources}
    fields |= {"data.validation_fraction": 0.5} | overrides
    config = tiny(root / "text", root / "cache", fields)
    train(config, root / name)
    return root / name


@pytest.fixture(scope="module")
def run_dir(root):
    """Three checkpoints, the first two traced."""
    path = trained(root, "run")
    write_trace(path, tokens=TOKENS, progress=False)
    return path


def copy(run_dir, tmp_path, name="copy", **moe):
    """The run, as if `model.moe` had had other values."""
    path = shutil.copytree(run_dir, tmp_path / name)
    config = json.loads((path / "config.json").read_text())
    config["model"]["moe"] |= moe
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_trace_agrees_with_the_probe_of_the_run(run_dir):
    trace, probe = load_trace(run_dir), load_run(run_dir).probe
    assert trace.steps_S.tolist() == STEPS and trace.domains == tuple(load_run(run_dir).domains)
    last = trace.probe()
    # 2 batches of 8 rows of 32 tokens of each of 2 domains are 1024, the nearest to 1000; the run's probe has 2 as well
    assert last.token_ids_N.size == 1024 and np.bincount(last.domain_ids_N).tolist() == [512, 512]
    np.testing.assert_array_equal(last.token_ids_N, probe.token_ids_N)
    np.testing.assert_array_equal(last.selected_LNE, probe.selected_LNE)
    np.testing.assert_array_equal(last.unit_ids_N, probe.unit_ids_N)
    np.testing.assert_allclose(last.loss_N, probe.loss_N, rtol=1e-5)


def test_the_columns_of_a_trace(run_dir):
    trace = load_trace(run_dir)
    probe, gate_LNE = trace.probe(), trace.gate()
    assert trace.expert_SLNK.shape[-1] == K and trace.loss_SN.shape == (3, probe.token_ids_N.size)
    np.testing.assert_allclose(gate_LNE.sum(-1), 1, rtol=1e-5)  # renormalized over K
    np.testing.assert_array_equal(gate_LNE > 0, probe.selected_LNE)
    first_LNE = trace.selected(k=1)
    np.testing.assert_array_equal(first_LNE.argmax(-1), gate_LNE.argmax(-1))  # the plan's order: best first
    assert (first_LNE.sum(-1) == 1).all()
    follows = (probe.next_ids_N[:-1] >= 0) & (probe.positions_N[1:] == probe.positions_N[:-1] + 1)
    np.testing.assert_array_equal(probe.next_ids_N[:-1][follows], probe.token_ids_N[1:][follows])
    assert np.isnan(probe.loss_N[probe.next_ids_N < 0]).all()
    assert probe.predicted_ids_N.min() >= 0 and probe.predicted_ids_N.max() < 320
    assert np.mean(probe.predicted_ids_N == probe.next_ids_N) > np.mean(
        trace.probe(0).predicted_ids_N == probe.next_ids_N
    )  # it learns
    assert trace.router["entropy"].shape == (3, 2) and (trace.router["active_per_token"] == K).all()
    metrics = load_run(run_dir).summary["router"]["layers"]
    assert trace.router["entropy"][-1, 0] == pytest.approx(metrics["layer_01"]["entropy"], rel=0.05)


def test_documents_are_those_of_the_store(run_dir, root):
    """All parts of rows that are said to be of one document are found in one text."""
    probe = load_trace(run_dir).probe()
    texts = ["\0" + p.read_text() + "\0" for p in sorted((root / "text").glob("*/*.txt"))]
    assert probe.unit_ids_N.max() > 8
    for unit in range(probe.unit_ids_N.max() + 1):
        of_N = probe.unit_ids_N == unit
        starts_N = np.flatnonzero(of_N & (probe.positions_N == 0))
        parts = [
            s for s in np.split(np.arange(of_N.size), np.flatnonzero(probe.positions_N == 0)) if s.size and of_N[s[0]]
        ]
        assert len(parts) == len(starts_N)
        said = [bytes(b if b < 256 else 0 for b in probe.token_ids_N[part].tolist()).decode() for part in parts]
        assert any(all(part in text for part in said) for text in texts)


def test_saturation_of_a_trace_ends_at_one(run_dir):
    trace = load_trace(run_dir)
    found = analysis.dynamics.saturation(np.stack([trace.selected(s) for s in range(3)]), trace.probe().unit_ids_N)
    assert (found.value[-1] == 1).all() and (found.value[0] < 1).all() and (found.value[1] > found.value[0]).all()


def test_a_traced_checkpoint_is_not_traced_again(run_dir, tmp_path):
    path = copy(run_dir, tmp_path)
    files = sorted((path / "trace").iterdir())
    stamps = [f.stat().st_mtime_ns for f in files]
    content = files[1].read_bytes()
    files[1].unlink()
    assert write_trace(path, tokens=TOKENS, progress=False) == [files[1]]
    assert [f.stat().st_mtime_ns for f in files[::2]] == stamps[::2]
    with np.load(files[1]) as new:
        assert int(new["step"]) == 8
    assert len(content) == files[1].stat().st_size
    assert write_trace(path, checkpoints="last", tokens=TOKENS, progress=False) == []


def test_a_trace_of_another_tokenizer_or_config_is_one_line(run_dir, tmp_path):
    path = copy(run_dir, tmp_path)
    (path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"kind": "json", "eos_token": "<eos>"}))
    (path / "tokenizer" / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "model": {"type": "WordLevel", "vocab": {"<eos>": 0}, "unk_token": "<eos>"},
            }
        )
    )
    with pytest.raises(
        UserError, match=r"step_00000004.npz: traced with another tokenizer \(fingerprint bytes-257 there"
    ):
        load_trace(path)
    shutil.rmtree(path / "tokenizer")
    shutil.copytree(run_dir / "tokenizer", path / "tokenizer")
    config = json.loads((path / "config.json").read_text())
    config["model"]["rope_theta"] = 5.0
    (path / "config.json").write_text(json.dumps(config))
    out = command("trace", path, f"--tokens={TOKENS}")
    assert out.returncode == 2 and out.stderr.count("\n") == 1
    assert "traced with another config (fingerprint" in out.stderr and "again" in out.stderr


def test_bad_input_is_one_line(run_dir, tmp_path):
    with pytest.raises(UserError, match=rf"--tokens=9: .* was traced with --tokens={TOKENS}; give that, or delete"):
        write_trace(run_dir, tokens=9)
    with pytest.raises(UserError, match="--tokens=0: must be positive"):
        write_trace(run_dir, tokens=0)
    with pytest.raises(UserError, match="not a run directory"):
        write_trace(tmp_path)
    path = copy(run_dir, tmp_path)
    (path / "trace" / "step_00000008.npz").write_bytes((path / "trace" / "step_00000004.npz").read_bytes()[:999])
    with pytest.raises(
        UserError, match=r"step_00000008.npz: not a readable trace \(ValueError: File is not a zip file"
    ):
        load_trace(path)
    shutil.rmtree(path / "trace")
    with pytest.raises(UserError, match="trace: no trace; make one with `frugalmoe trace"):
        load_trace(path)
    shutil.rmtree(path / "checkpoints")
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        write_trace(path)
    for change, message in [
        (Mask(0, 1), r"Mask.layer=0: not an MoE layer of the run; valid: \[1, 2\]"),
        (Mask(1, 8), r"Mask.expert=8: must be in 0 .. 7"),
        (Swap(1, 2, 0), r"Swap.slot=2: must be in 0 .. 1"),
        (Swap(1, 0, 8), r"Swap.expert=8: must be in 0 .. 7"),
        (Demote(1, "best"), r"Demote.instead='best': unknown; valid: nothing, rest, random, next"),
    ]:
        with pytest.raises(UserError, match=message):
            intervene(run_dir, change, tokens=TOKENS, progress=False)
    with pytest.raises(UserError, match=r"no checkpoint of step 5; valid: \[4, 8, 12\]"):
        intervene(run_dir, checkpoint=5)


def test_the_report_has_the_trace(run_dir, tmp_path):
    path = copy(run_dir, tmp_path)
    page = write_report(path).read_text()
    assert "When the routing settles" in page and "At step 4 of 12, tokens already go to" in page
    assert all((path / "report" / f"{name}.png").stat().st_size > 10_000 for name in ("saturation", "vocabulary"))
    assert "3 checkpoints, " in analysis.plots.saturation(load_trace(path)).axes[0].get_title("left")
    for step, count in ((4, "2 traced checkpoints"), (8, "1 traced checkpoint")):
        (path / "trace" / f"step_{step:08d}.npz").unlink()
        assert f"the run has {count}, and when the routing settles takes three" in write_report(path).read_text()
        assert analysis.plots.saturation(load_trace(path)) is None, "a line between two points says nothing of when"
    shutil.rmtree(path / "trace")
    assert "When the routing settles" not in write_report(path).read_text()


def test_interventions_change_what_they_say(run_dir):
    trace = load_trace(run_dir)
    busy = int(trace.selected()[1].sum(0).argmax())
    changes = [Mask(2, busy), Mask(2, busy, "rest"), Mask(2, busy, "next"), Mask(2, busy, "random"), RandomChoice()]
    effects = intervene(run_dir, *changes, Demote(2, "next"), tokens=TOKENS, progress=False)
    whole = {str(e.intervention): e for e in effects if e.domain == "all"}
    assert list(whole) == [*map(str, changes), "layer 2, first choice gives way to next"]
    share = trace.selected()[1, :, busy][np.isfinite(trace.loss_SN[-1])].mean()
    for change in changes[:4]:
        assert whole[str(change)].moved == pytest.approx(share)  # who had the expert, and nobody else
    for e in effects:
        assert e.change.low <= e.change.value <= e.change.high and e.change.value != 0
    for e in whole.values():
        assert e.loss == pytest.approx(np.nanmean(trace.loss_SN[-1]), rel=1e-5)
        assert e.tokens == np.isfinite(trace.loss_SN[-1]).sum() and e.documents == trace.probe().unit_ids_N.max() + 1
    for code, verse, both in zip(*[iter(effects)] * 3):
        assert [code.domain, verse.domain, both.domain] == ["code", "verse", "all"]
        parts = code.tokens * code.change.value + verse.tokens * verse.change.value
        assert both.change.value == pytest.approx(parts / both.tokens)
    assert whole["all layers, random experts"].moved > 0.95  # all but (2 / 56)^2 of tokens in two layers


def test_hiding_an_expert_is_what_its_bias_would_do(root):
    """`next` against the strategy itself: a balance bias of -inf hides an expert from selection, not from weights."""
    import jax

    from frugalmoe.train.evaluate import evaluate, limited
    from frugalmoe.train.step import make_eval_step
    from frugalmoe.train.weights import load_model

    path = trained(root, "bias", **{"model.moe.router": "sigmoid_bias", "model.moe.losses": {}})
    busy = int(load_run(path).probe.selected_LNE[0].sum(0).argmax())
    (found,) = [e for e in intervene(path, Mask(1, busy, "next"), tokens=500, progress=False) if e.domain == "all"]
    config, weights, _, mesh = load_model(path)
    data = open_data(config.data, batch_size=config.train.batch_size, seed=0)
    config = limited(config, len(data.domains), 500)
    state = weights.router_state
    bias_LE = state["moe_blocks"]["moe"]["router_state"]["bias_E"]
    state["moe_blocks"]["moe"]["router_state"]["bias_E"] = bias_LE.at[0, busy].set(-np.inf)
    seen = []
    with jax.set_mesh(mesh):
        evaluate(jax.jit(make_eval_step(config, trace=True)), weights, data, config, mesh, seen)
    ce = np.concatenate([t.out.ce_BT[t.batch.loss_mask_BT] for t in seen])
    assert found.change.value == pytest.approx(ce.mean() - found.loss, abs=1e-6) and abs(found.change.value) > 3e-5


def test_a_router_without_a_next_choice_is_refused_and_the_others_work(root, tmp_path):
    fields = {"model.moe.router": "expert_choice", "model.moe.losses": {"z": 0.001}, "train.steps": 5}
    fields["model.moe.options"] = {"evaluate": "choice"}
    path = trained(root, "choice", **fields)
    with pytest.raises(UserError, match="router 'expert_choice' does not allow instead='next': the first K of K"):
        intervene(path, Mask(1, 0, "next"), tokens=500, progress=False)
    effects = intervene(path, Mask(1, 0), Mask(1, 0, "rest"), Demote(2, "random"), tokens=500, progress=False)
    assert all(e.moved > 0 and np.isfinite(e.change.value) for e in effects)
    write_trace(path, tokens=500, progress=False)
    trace = load_trace(path)
    # C = T K / E for each expert and sequence: full rows have K experts per token on average
    assert trace.router["active_per_token"][-1] == pytest.approx(K, rel=0.05)
    assert trace.expert_SLNK.shape[-1] > K and trace.selected().sum() == (trace.expert_SLNK[-1] < E).sum()

    with pytest.raises(UserError, match=r"router='expert_choice': .* in evaluation too, so there is no causal loss"):
        train_causal_gap(path, tokens=500)
    causal = copy(path, tmp_path, options={"evaluate": "threshold"})
    *_, whole = train_causal_gap(causal, tokens=500)
    assert effects[2].domain == "all"
    assert whole.training == pytest.approx(effects[2].loss, rel=1e-6)
    assert whole.gap.value == pytest.approx(whole.causal - whole.training, abs=1e-6) and whole.gap.value != 0
    (undisturbed, *_) = [e for e in intervene(causal, Mask(1, 0), tokens=500, progress=False) if e.domain == "all"]
    assert whole.causal == pytest.approx(undisturbed.loss, rel=1e-6) and whole.tokens == undisturbed.tokens


def test_experts_compute_what_the_oracle_does(run_dir):
    """`Experts.outputs` against the dense executor with one expert and weight 1."""
    import jax
    import jax.numpy as jnp

    from frugalmoe.experts import Biases, executors
    from frugalmoe.experts.contract import Call
    from frugalmoe.laws.executors import run_dense
    from frugalmoe.routing.contract import TokenPlan
    from frugalmoe.schema import MoE

    experts = analysis.load_experts(run_dir)
    assert experts.layers_L.tolist() == [1, 2] and experts.router_LDE.shape == (2, 32, E)
    x_ND = np.random.default_rng(3).standard_normal((16, 32))
    x_ND *= experts.norm_LD[1] / np.sqrt(np.mean(x_ND**2, axis=-1, keepdims=True))
    plan = TokenPlan(jnp.full((16, 1), 5), jnp.ones((16, 1)))
    y_ND = run_dense(plan, jnp.float32(x_ND), experts.gate_up_LED2F[1], experts.down_LEFD[1])
    np.testing.assert_allclose(experts.outputs(1, 16, seed=3)[5], y_ND, rtol=1e-4, atol=1e-7)
    rng = np.random.default_rng(4)
    biases = Biases(*(rng.standard_normal((2, E, *shape)).astype(np.float32) for shape in ((2, 16), (32,))))
    other = dataclasses.replace(experts, activation="clamped_swiglu", biases_L=biases)
    moe = MoE(num_experts=E, activation="clamped_swiglu", expert_bias=True)
    call = Call(moe, biases=jax.tree.map(lambda a: a[1], biases))
    arrays = jnp.float32(x_ND), experts.gate_up_LED2F[1], experts.down_LEFD[1]
    y_ND, _ = executors.get("dense").run(plan, *arrays, call)
    np.testing.assert_allclose(other.outputs(1, 16, seed=3)[5], y_ND, rtol=1e-4, atol=1e-6)
    neurons_EF = experts.neurons(1)
    assert neurons_EF.shape == (E, 16, 96)
    np.testing.assert_array_equal(neurons_EF[5, 3, :32], experts.gate_up_LED2F[1, 5, :, 0, 3])
    np.testing.assert_array_equal(neurons_EF[5, 3, 32:64], experts.gate_up_LED2F[1, 5, :, 1, 3])
    np.testing.assert_array_equal(neurons_EF[5, 3, 64:], experts.down_LEFD[1, 5, 3])


def test_rules_that_are_the_same_have_no_gap(run_dir):
    gaps = train_causal_gap(run_dir, tokens=TOKENS)
    assert [g.domain for g in gaps] == ["code", "verse", "all"]
    assert all(g.gap.value == 0 and g.causal == g.training for g in gaps)


def test_a_swap_at_one_position_is_that_of_everybody_in_the_last_layer(run_dir):
    """After the last MoE layer no token sees another, so that swapping the others too changes nothing."""
    found = try_swaps(run_dir, 2, position=3, tokens=TOKENS, progress=False)
    lab = Lab(run_dir, None, TOKENS)
    before = lab.probe(analysis.interventions.Nothing())
    at_N = (before.positions_N == 3) & np.isfinite(before.loss_N)
    best_KN = np.tile(before.loss_N[at_N], (K, 1))
    for slot in range(K):
        for expert in range(E):
            after = lab.probe(lab.bind(Swap(2, slot, expert), before))
            best_KN[slot] = np.minimum(best_KN[slot], after.loss_N[at_N])
    gain_KN = before.loss_N[at_N] - best_KN
    np.testing.assert_allclose(found.slot_K.value, gain_KN.mean(1), atol=1e-6)
    assert found.gain.value == pytest.approx(gain_KN.max(0).mean(), abs=1e-6) and found.gain.value > 1e-4
    assert (found.chance_K.value > found.slot_K.value / 2).all() and (
        (found.better_K.value > 0) & (found.better_K.value < 1)
    ).all()
    with pytest.raises(UserError, match=r"position=32: must be in 0 .. 31"):
        try_swaps(run_dir, 2, position=32, tokens=TOKENS)
    with pytest.raises(UserError, match=r"Swap.layer=0: not an MoE layer"):
        try_swaps(run_dir, 0, tokens=TOKENS)


def test_drops_are_those_that_the_executor_counts(run_dir, tmp_path):
    with pytest.raises(UserError, match=r"model\.moe\.executor='auto': drops nothing; valid: capacity"):
        load_drops(run_dir, tokens=TOKENS)
    path = copy(run_dir, tmp_path, executor="capacity", capacity_factor=0.75)
    found = load_drops(path, tokens=TOKENS)
    assert found.layers_L.tolist() == [1, 2] and found.lost_LNK.shape == (2, 1024, K)
    lab = Lab(path, None, TOKENS)
    counted_L = sum(t.out.stats["dropped"] for t in lab.evaluate(lab.eval_step, analysis.interventions.Nothing()))
    np.testing.assert_array_equal(np.nansum(found.lost_LNK, axis=(1, 2)), counted_L)
    assert (counted_L > 0.25 * 1024 * K - 1).all()  # at most 0.75 of the slots find room
    place_LP = analysis.drops.by_place(found.lost_LNK, found.place_N // 8, found.sequence_N).value
    assert (place_LP[:, 0] < place_LP[:, -1]).all()
    # an expert has 0.75 * 32 * 2 / 8 = 6 slots, and a token takes one of them at most: the first six are never late
    assert not np.nansum(found.lost_LNK[:, found.place_N < 6])


def test_gradients_of_a_run(run_dir, tmp_path):
    found = load_gradients(run_dir, batches=3, progress=False)
    assert found.language_SL.shape == (3, 2) and found.expert_SLE.shape == (3, 2, E) and found.parameters == 32 * E
    assert (found.counts_SLE.sum(-1) == 8 * 32 * K).all()  # every token of the batch has K experts
    np.testing.assert_array_equal(found.expert_SLE > 0, found.counts_SLE > 0)
    share = gradients.language_share(found.language_SL, found.auxiliary_SL)
    assert ((share.low <= share.value) & (share.value <= share.high) & (share.value < 1)).all()
    # the gradient of a loss is linear in its coefficient, and language modelling does not see it
    losses = json.loads((run_dir / "config.json").read_text())["model"]["moe"]["losses"]
    tripled = load_gradients(
        copy(run_dir, tmp_path, losses={k: 3 * v for k, v in losses.items()}), batches=3, progress=False
    )
    np.testing.assert_allclose(tripled.auxiliary_SL, 9 * found.auxiliary_SL, rtol=1e-3)
    np.testing.assert_allclose(tripled.product_SL, 3 * found.product_SL, rtol=1e-2, atol=1e-12)
    np.testing.assert_allclose(tripled.language_SL, found.language_SL, rtol=1e-6)
    without = load_gradients(copy(run_dir, tmp_path, "without", losses={}), batches=1, progress=False)
    assert (without.auxiliary_SL == 0).all() and (without.expert_SLE > 0).any()
    np.testing.assert_allclose(without.language_SL, found.language_SL[:1], rtol=1e-6)
    assert (gradients.language_share(without.language_SL, without.auxiliary_SL).value == 1).all()
    with pytest.raises(UserError, match="batches=0: must be at least 1"):
        load_gradients(run_dir, batches=0)
