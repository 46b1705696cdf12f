"""The model of a step: its counts against the network's own, its bytes and FLOPs against what XLA says of programs."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import ShapeDtypeStruct

from frugalmoe import sharding
from frugalmoe.aot.program import compile_step
from frugalmoe.config import default, load, override, resolve, settle
from frugalmoe.cost import device_catalogue, failures, formulas
from frugalmoe.cost.formulas import ASSUMED, Layout
from frugalmoe.data.batches import Batch
from frugalmoe.fields import to_dict
from frugalmoe.model.transformer import count_parameters
from frugalmoe.train.program import compiled_train_step
from frugalmoe.train.step import abstract

PODS = (Path(__file__).parents[1] / "docs/pods.md").read_text(encoding="utf-8")
LARGE = ["ling_1.py:lite", "ling_1.py:plus", "ling_2.py:flash", "deepseek_v3.py", "gpt_oss.py", "moonlight.py"]
H800 = device_catalogue.read().get("h800").device()


def config(**fields):
    """One device. Each token goes to all experts, so that what `executor=dense` does is what the formula counts."""
    base = {
        "model.vocab_size": 2048,
        "model.dim": 256,
        "model.num_layers": 1,
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.head_dim": 64,
        "model.moe.num_experts": 4,
        "model.moe.num_experts_per_token": 4,
        "model.moe.expert_dim": 512,
        "data.sequence_length": 64,
        "train.batch_size": 4,
        "mesh.data": 1,
    }
    return resolve(override(default(), base | {name.replace("__", "."): value for name, value in fields.items()}))


@pytest.mark.parametrize("name", LARGE)
def test_parameters_are_those_of_the_network(name):
    model = load(f"configs/{name}").model
    ours, theirs = formulas.parameters(model), count_parameters(model)
    assert (ours.total, ours.embedding, ours.head) == (theirs["total"], theirs["embedding"], theirs["head"])
    moe = model.moe
    of_one = 3 * model.dim * moe.expert_dim + moe.expert_bias * (2 * moe.expert_dim + model.dim)
    layers = model.num_layers - model.num_dense_layers + model.multi_token_prediction.depth
    assert ours.experts == layers * moe.num_experts * of_one
    assert ours.layer_experts == moe.num_experts * of_one < ours.layer


def flops_of_program(c) -> float:
    """What XLA counts in a compiled step: a loop's body once, so that each loop of the program must run once."""
    mesh = sharding.make_mesh(to_dict(c.mesh), jax.devices()[:1])
    shape = (1, c.train.batch_size, c.data.sequence_length)
    batch = Batch(*(ShapeDtypeStruct(shape, bool if f == "loss_mask_BT" else np.int32) for f in Batch._fields))
    with jax.set_mesh(mesh):
        return compiled_train_step(c).lower(abstract(c), batch).compile().cost_analysis()["flops"]


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"model__num_dense_layers": 1, "model__dense_dim": 1024}], ids=["moe", "dense"])
def test_flops_are_those_of_the_compiled_step(fields):
    """Within 5%. One layer, one chunk of queries and of the loss: no loop runs twice. Of 64 tokens the program has all
    64 x 64 scores, and not the half that a causal count has.
    """
    c = settle(config(model__moe__executor="dense", **fields), None, 1)
    tokens = c.train.batch_size * c.data.sequence_length
    counted = tokens * formulas.train_flops(c.model, c.data.sequence_length)
    assert counted == pytest.approx(flops_of_program(c), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_memory_is_that_of_the_compiled_step(remat):
    """Within 15% of XLA's peak on a CPU, arguments included, whatever a layer keeps."""
    fields = {
        "model__vocab_size": 8192,
        "model__dim": 512,
        "model__num_layers": 4,
        "model__num_heads": 8,
        "model__num_kv_heads": 4,
        "model__moe__num_experts": 16,
        "data__sequence_length": 1024,
        "train__batch_size": 8,
    }
    c = config(model__remat=remat, **fields)
    ours = formulas.memory(c, Layout(sequences=8, remat=remat), "cpu")
    assert ours.total == pytest.approx(compile_step(c).needed, rel=0.15)


def compiled_for_pods():
    """Rows of docs/pods.md, which TPU and GPU compilers wrote: programs that fit, and those that a GPU would refuse."""
    name = ""
    for line in PODS.splitlines():
        if found := re.match(r"### .*`configs/(\S+?)`", line):
            name = found[1]
        row = re.match(r"\| (\w+):\S+ \| (.*?) \| (\d+) x \d+ \| (yes|no) \| ([\d.]+) /", line)
        if row and (row[4] == "yes" or row[1] == "h100"):
            axes = {axis: int(size) for axis, size in (part.split() for part in row[2].split(" x "))}
            yield pytest.param(name, row[1], axes, float(row[5]), id=f"{name}-{line.split('|')[1].strip()}-{row[2]}")


@pytest.mark.parametrize("name, kind, axes, needed", list(compiled_for_pods()))
def test_memory_is_what_compilers_of_accelerators_say(name, kind, axes, needed):
    """Within 15% in each of the 18 programs of the Ling models, on 4 to 256 devices of four kinds."""
    c = load(f"configs/{name}", ["model.moe.exchange_room=2"])
    ours = formulas.memory(c, Layout(**axes), "gpu" if kind == "h100" else "tpu")
    assert ours.total / 2**30 == pytest.approx(needed, rel=0.15)


def test_there_are_rows_of_pods():
    assert len(list(compiled_for_pods())) == 18


def test_what_a_layer_keeps_by_hand():
    """2 bytes of D = 4096, and 8 of each of 8 choices; queries 4096, keys and values 1024, added 4096, 256 logits."""
    model = load("configs/ling_2.py:flash").model
    moe = formulas.pattern.layers(model)[-1]
    keeps = lambda remat, platform="gpu": formulas.kept_of_layer(model, moe, Layout(remat=remat), platform)
    assert keeps("full") == 2 * 4096 + 64
    # The shared expert of 1024 has gate and up, and adds 4096 once more.
    assert keeps("dots") == 2 * (4096 + 4096 + 1024 + 2048 + 2 * 4096) + 4 * 256 + 64
    assert keeps("none") > keeps("dots") > keeps("full")
    # Each of 8 rows has gate and up of 1024, which a CPU computes again.
    assert keeps("none") - keeps("none", "cpu") == 2 * 2 * 1024 * 8 and keeps("full") == keeps("full", "cpu")


def test_traffic_by_hand():
    """4 devices of an expert axis, K = 8: the tokens' rows to each of 3 others, 5 times, 19 layers, 2 bytes."""
    c = load("configs/ling_2.py:mini")
    sent = formulas.traffic(c, Layout(expert=4), node=8)
    assert sent.experts == 5 * 19 * 4096 * 2048 * 2 * 3 and sent.experts_far == 0
    # All but routed experts is spread over the 4 and gathered whole: 3 times, 2 bytes, 3/4 of it.
    count = formulas.parameters(c.model)
    assert sent.parameters == 3 * 2 * (count.total - count.experts) * 3 / 4
    assert (sent.tensor, sent.context) == (0, 0)
    # 16 devices, 8 of a node: a row for each of 8 choices, one of 16 each: 7 stay in the node, 8 leave it.
    far = formulas.traffic(c, Layout(expert=16), node=8)
    assert far.experts_far / far.experts == pytest.approx(8 / 15)
    assert far.experts == 5 * 19 * 4096 * 2048 * 2 * 8 / 16 * 15
    fsdp = formulas.traffic(c, Layout(fsdp=4, micro_batches=3), node=8)
    assert fsdp.parameters == 3 * 3 * 2 * count.total * 3 / 4 and fsdp.experts == 0


def test_a_perfect_device_takes_the_time_of_its_flops():
    """With a memory and links of no cost, all products at the peak and equal experts, a step is FLOPs over peak."""
    c = load("configs/ling_2.py:mini")
    perfect = H800._replace(bandwidth=1e30, link=1e30, network=1e30)
    ideal = ASSUMED._replace(matmul=1, attention=1, imbalance=1, tile=0, launch=0, software=1)
    times = formulas.step_seconds(c, Layout(remat="none"), perfect, "bf16", ideal)
    assert times.compute == pytest.approx(4096 * formulas.train_flops(c.model, 4096) / 989e12, rel=1e-6)
    assert times.total == pytest.approx(times.compute, rel=1e-6)
    assert formulas.utilization(c, Layout(remat="none"), perfect, times.total) == pytest.approx(1, rel=1e-6)
    halves = formulas.step_seconds(c, Layout(remat="none", pipeline=2, micro_batches=4), perfect, "bf16", ideal)
    head = 3 * formulas.forward_seconds(c, Layout(remat="none"), perfect, "bf16", ideal)["head"][0]
    blocks = times.compute - head
    slowest = min(max(k * blocks / 20 + head, (20 - k) * blocks / 20) for k in range(11))  # of 20 layers
    assert halves.bubble == pytest.approx(4 * slowest - halves.compute + slowest)  # and (p - 1) / m of the slowest


def test_time_goes_the_way_that_it_must():
    c = load("configs/ling_2.py:mini")
    seconds = lambda device=H800, assumed=ASSUMED, **axes: (
        formulas.step_seconds(c, Layout(**{"expert": 16} | axes), device, "bf16", assumed).total
    )
    assert seconds(H800._replace(bandwidth=1e12)) > seconds() > seconds(H800._replace(network=1e12))
    assert seconds(assumed=ASSUMED._replace(imbalance=2)) > seconds()
    assert seconds(remat="full") > seconds(remat="none")
    assert seconds(micro_batches=2) > 1.5 * seconds()
    narrow = dataclasses.replace(c, model=dataclasses.replace(c.model, compute_dtype="float32"))
    assert formulas.memory(narrow, Layout(), "gpu").activations == pytest.approx(
        2 * formulas.memory(c, Layout(), "gpu").activations, rel=0.02
    )


DENSE = {
    "model__num_dense_layers": 4,
    "model__num_layers": 4,
    "model__dense_dim": 1024,
    "model__num_heads": 16,
    "model__num_kv_heads": 8,
    "model__head_dim": 16,
    "model__compute_dtype": "bfloat16",
}


def test_tensor_lies_in_a_node_and_a_ring_beside_attention():
    """16 devices of tensor 8 x context 2 span two nodes: sums of tensor go over links, and the ring over the network,
    which is waited for only beyond attention's products.
    """
    c = config(**DENSE)
    ring = Layout(tensor=8, context=2, ring=True, remat="none")
    sent = formulas.traffic(c, ring, 8)
    # 4 layers of 32 tokens: keys and values of 8 heads of 16, of tensor's share, 3 times on to one other device
    assert sent.context == 3 * 4 * 32 * (2 * 8 * 16) / 8 * 2
    assert sent.tensor == 2 * 7 / 8 * 4 * 4 * 32 * 256 * 2
    waits = lambda attending, layout=ring: formulas.exchange_seconds(c, layout, H800, 1.0, ASSUMED, attending)
    sums, ring_takes = sent.tensor / (0.8 * 200e9), sent.context / (0.8 * 50e9)
    assert waits(0.0) == pytest.approx(sums + ring_takes)
    assert waits(1e-9) == pytest.approx(sums + ring_takes - 1e-9) and waits(1.0) == pytest.approx(sums)
    places = formulas.traffic(c, ring._replace(ring=False), 8).context / (0.8 * 200e9)  # ours: context inside a node
    assert waits(1.0, ring._replace(ring=False)) == pytest.approx(sums + places)


def test_a_collective_over_nodes_uses_the_lines_of_all_its_devices():
    """16 devices in 2 nodes: 8 lines of 50 GB/s for a node are more than the links' 200. Every eighth device: one."""
    c = config(**DENSE)
    exchange = lambda device, **axes: formulas.exchange_seconds(c, Layout(remat="none", **axes), device, 0.0)
    sent = formulas.traffic(c, Layout(fsdp=16, remat="none"), 8).parameters
    assert exchange(H800, fsdp=16) == pytest.approx(sent / (0.8 * 200e9))
    assert exchange(H800._replace(network=10e9), fsdp=16) == pytest.approx(sent / (0.8 * 80e9))
    both = formulas.traffic(c, Layout(fsdp=4, tensor=8, remat="none"), 8)
    found = exchange(H800, fsdp=4, tensor=8)
    assert found == pytest.approx(both.parameters / (0.8 * 50e9) + both.tensor / (0.8 * 200e9))


def test_devices_that_split_tokens_share_norms_sends_and_experts():
    """Folded, tensor 2 x expert 2 are four devices of the expert axis: half of the tokens each, 3 of 4 rows leave."""
    c = load("configs/ling_2.py:mini")
    plain, folded = (Layout(tensor=2, expert=2, remat="none", sequence_parallel=on) for on in (False, True))
    seconds = lambda layout: formulas.forward_seconds(c, layout, H800)
    assert seconds(plain)["norms and residual"][1] == pytest.approx(2 * seconds(folded)["norms and residual"][1])
    sent = formulas.traffic(c, folded, 8)
    assert sent.experts == 4 * 19 * (4096 / 2) * 2048 * 2 * 3
    assert seconds(folded)["routed experts"][0] < seconds(plain)["routed experts"][0]  # experts stay whole
    dense = config(**DENSE)
    wait = lambda layout: formulas.exchange_seconds(dense, layout._replace(expert=1, pipeline=2), H800, 1e9)
    assert wait(plain) - wait(folded) == pytest.approx(2 * 64 * 256 * 2 / 2 / (0.8 * 50e9))


def test_rows_pass_through_memory_as_often_as_they_are_moved():
    """K = 8 of D = 2048 in 2 bytes, 19 layers: 25 times on one device, 82 over several, 50 where copies are late."""
    c = load("configs/ling_2.py:mini")
    reading = lambda **axes: formulas.forward_seconds(
        c, Layout(remat="none", **axes), H800, "bf16", ASSUMED._replace(imbalance=1)
    )["routed experts"][1]
    one = 19 * 4096 * 2048 * 2 / (H800.bandwidth * ASSUMED.memory)
    assert reading(expert=8) - reading() == pytest.approx((82 - 25) * one)
    assert reading(expert=8, node_limit=1) - reading() == pytest.approx((50 - 25) * one)
    unfused = 19 * 4096 * 8 * 2 * 512 * 2 / (H800.bandwidth * ASSUMED.memory)  # SiLU and product: 5 F, not 3
    assert reading(eager=True) - reading() == pytest.approx(16 * one + unfused)


def test_a_capacity_computes_all_its_slots():
    c = load("configs/ling_2.py:mini")
    moe = dataclasses.replace(c.model.moe, executor="capacity", capacity_factor=1.25)
    filled = dataclasses.replace(c, model=dataclasses.replace(c.model, moe=moe))
    free = H800._replace(bandwidth=1e30)
    work = lambda c: formulas.forward_seconds(c, Layout(expert=8), free)["routed experts"][0]
    assert work(filled) / work(c) == pytest.approx(1.25 / ASSUMED.imbalance)


def test_what_is_computed_anew():
    """hidden: gate and up of each feed-forward, two of its three products, and nothing else."""
    c = config(**DENSE)
    free = H800._replace(bandwidth=1e30, link=1e30, network=1e30)
    seconds = lambda remat: formulas.step_seconds(c, Layout(remat=remat), free, "bf16", ASSUMED._replace(launch=0))
    parts = {name: part[0] for name, part in formulas.forward_seconds(c, Layout(), free).items()}
    more = (seconds("hidden").compute - seconds("dots").compute) * ASSUMED.software
    assert more == pytest.approx(2 / 3 * parts["dense feed-forward"])
    again = (seconds("full").compute - seconds("none").compute) * ASSUMED.software
    assert again == pytest.approx(sum(parts.values()) - parts["head"])


def test_fp8_reads_factors_of_one_byte_and_casts_in_both_orders():
    c = config(**DENSE)
    parts = lambda precision, **assumed: formulas.forward_seconds(
        c, Layout(remat="none"), H800, precision, ASSUMED._replace(**assumed)
    )["dense feed-forward"]
    stream = H800.bandwidth * ASSUMED.memory
    cast = 4 * 64 * (256 + 1024) / stream  # 4 layers of 64 tokens: what goes into gate and up, and into down
    assert parts("fp8")[1] - parts("bf16")[1] == pytest.approx(4 * cast)
    assert parts("fp8", cast=6.0)[1] - parts("bf16")[1] == pytest.approx(6 * cast)
    # One scale of a tensor: at twice the peak and the same share half of the time, and of factors half of the bytes.
    written = 4 * 64 * (2 * 1024 + 256) * 2 / stream
    assert parts("fp8", fp8=0.75)[0] == pytest.approx((parts("bf16")[0] - written) / 2 + written, rel=1e-3)


def test_what_hides_beside_computing_is_not_shorter_than_itself_and_takes_its_share():
    c = load("configs/ling_2.py:mini")
    layout, hidden = Layout(expert=16, remat="none"), ASSUMED._replace(hidden=1.0)
    rows = formulas.exchange_seconds(c, layout, H800, 1e9)
    wait = lambda computing, assumed=hidden: formulas.exchange_seconds(c, layout, H800, computing, assumed)
    gathers = wait(0.0) - rows
    assert wait(1e9) == 0 and wait(rows / 2) == pytest.approx(rows / 2 + max(0, gathers - rows / 2))
    steps = [formulas.step_seconds(c, layout, H800, "bf16", assumed).compute for assumed in (ASSUMED, hidden)]
    assert steps[1] / steps[0] == pytest.approx(132 / 112)


@pytest.mark.parametrize(
    ("layout", "idle"),
    [
        (Layout(pipeline=8), 7),
        (Layout(pipeline=8, virtual=2), 3.5),
        (Layout(pipeline=9, schedule="zero-bubble"), 8 / 3),
        (Layout(pipeline=16, schedule="dualpipe"), 14 / 3),
    ],
)
def test_how_long_a_pipeline_is_idle(layout, idle):
    assert formulas.idle_ends(layout) == pytest.approx(idle)


def test_a_pipeline_goes_at_the_speed_of_its_slowest_stage():
    """36 layers of 1 and a head of 5 on 4 stages: 9 + 5 where all have 9, else 6 + 5 and 10; the mean is 10.25."""
    slowest = lambda layers=36, head=5.0, **axes: (
        formulas.slowest_stage(Layout(pipeline=4, **axes), layers, layers / 4, head / 4) * (layers + head) / 4
    )
    assert slowest(even=True) == pytest.approx(14)
    assert slowest() == pytest.approx(11)  # k = 6: 11 and ceil(30 / 3) = 10; k = 5: 10 and 11
    assert slowest(head=0.0) == pytest.approx(9) and slowest(37, 0.0) == pytest.approx(10)
    assert formulas.slowest_stage(Layout(), 36, 9, 5) == 1
    # In pairs of stages 18 layers and a head of 5 are 20.5: 15 + 5 and 21, or 16 + 5 and 20
    paired = formulas.slowest_stage(Layout(pipeline=4, schedule="dualpipe"), 36, 9, 1.25)
    assert paired == pytest.approx(21 / 20.5)


def test_sums_of_gradients_are_read_and_written_by_each_micro_batch():
    """6 bytes more than the 2 that the product writes: of what a device computes with, or of its part of it."""
    c = load("configs/ling_2.py:mini")
    reading = lambda count, **axes: (
        formulas.step_seconds(
            c, Layout(fsdp=4, remat="none", micro_batches=count, **axes), H800, "bf16", ASSUMED._replace(software=1)
        ).memory
    )
    total, stream = formulas.parameters(c.model).total, H800.bandwidth * ASSUMED.memory
    added = lambda **axes: reading(4, **axes) - reading(3, **axes)
    assert added(gathered_once=True) - added() == pytest.approx(6 * total * 3 / 4 / stream)


def test_failures_by_hand():
    """16,384 cards of 50,700 hours: one fails every 3.09 hours, and Llama 3's run had one every 3.1."""
    up = failures.uptime(405 * 10**9, 16_384, 8, 50_700)
    assert up.between / 3600 == pytest.approx(3.09, abs=0.01)
    assert up.saving == pytest.approx(12 * 405e9 / (2048 * 3e9))
    assert up.interval == pytest.approx((2 * up.saving * up.between) ** 0.5)
    assert 0.90 < up.goodput < 0.92  # "more than 90%"
    taken = failures.uptime(405 * 10**9, 16_384, 8, 50_700, preemptions_per_hour=1e-4)
    assert taken.between == pytest.approx(3600 / (16_384 * (1 / 50_700 + 1e-4)))
    assert taken.goodput < up.goodput
