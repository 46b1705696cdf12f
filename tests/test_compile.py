"""`frugalmoe compile`: what it reads out of compiled programs, what it refuses, and one TPU that is not there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from runs import config_file, run, write_text

from frugalmoe.aot import hlo, program, topologies
from frugalmoe.aot import table as cost_table
from frugalmoe.aot.search import layouts
from frugalmoe.cli import main
from frugalmoe.config import load
from frugalmoe.devices import GIB, GPUS, usable
from frugalmoe.errors import EXIT_USER_ERROR, UserError
from frugalmoe.model.transformer import count_parameters

LAPTOP = "--config=configs/ling_2.py:mini:laptop"


# Collectives


PROGRAM = """
import jax, jax.numpy as jnp
from jax import lax, shard_map
from jax.sharding import NamedSharding, PartitionSpec as P

def body(i, x_N):
    x_N = lax.fori_loop(0, 3, lambda j, x_N: lax.psum(x_N, "x") / 4, x_N)
    every_M = lax.all_gather(x_N, ("x", "y"), tiled=True)
    part_N = lax.psum_scatter(every_M * 2, ("x", "y"), tiled=True)
    swapped_N = lax.all_to_all(part_N, "y", 0, 0, tiled=True)
    return lax.ppermute(swapped_N, "x", [(0, 1), (1, 2), (2, 3), (3, 0)])

mesh = jax.make_mesh((4, 2), ("x", "y"))
loop = lambda x_N: lax.fori_loop(0, 5, body, x_N)
f = jax.jit(shard_map(loop, mesh=mesh, in_specs=P(("x", "y")), out_specs=P(("x", "y")), check_vma=False))
x_N = jax.ShapeDtypeStruct((8 * 16,), jnp.float32, sharding=NamedSharding(mesh, P(("x", "y"))))
print(f.lower(x_N).compile().as_text())
"""


@pytest.mark.slow
def test_collectives_of_a_program_for_eight_devices():
    """A device holds 16 float32, 64 bytes, of 8 * 64 = 512."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | flags, capture_output=True, text=True, check=True
    )
    assert hlo.collectives(done.stdout) == [
        hlo.Collective("all-gather", 5, 5 * 64 * 7),  # its part to the 7 others
        hlo.Collective("all-reduce", 5 * 3, 5 * 3 * 2 * 64 * 3 // 4),  # 3/4 of it to each of two phases, among 4
        hlo.Collective("reduce-scatter", 5, 5 * 512 * 7 // 8),  # all but its own part
        hlo.Collective("all-to-all", 5, 5 * 64 // 2),  # half of it, to the one other
        hlo.Collective("collective-permute", 5, 5 * 64),
    ]


TPU = """
HloModule step

%condition (p: (s32[], f32[4,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %p = (s32[]{:T(128)}, f32[4,64]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%start (a: f32[4,64]) -> f32[8,64] {
  %a = f32[4,64]{1,0:T(8,128)} parameter(0)
  ROOT %g.1 = f32[8,64]{1,0:T(8,128)} all-gather(%a), replica_groups={{0,1},{2,3}}, frontend_attributes={chain_id="6"}
}

%end (b: f32[4,64]) -> f32[8,64] {
  %b = f32[4,64]{1,0:T(8,128)} parameter(0)
  ROOT %g.2 = f32[8,64]{1,0:T(8,128)} all-gather(%b), replica_groups={{0,1},{2,3}}, frontend_attributes={chain_id="6"}
}

%add (m: bf16[], n: bf16[]) -> bf16[] {
  %m = bf16[] parameter(0)
  %n = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%m, %n)
}, execution_thread="sparsecore"

%all-reduce-scatter.1.clone (c: bf16[8,64]) -> bf16[2,64] {
  %c = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[8,64]{1,0:T(8,128)(2,1)} all-reduce(%c), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %slice = bf16[2,64]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={2,64}
}

%body (q: (s32[], f32[4,64])) -> (s32[], f32[4,64]) {
  %q = (s32[]{:T(128)}, f32[4,64]{1,0:T(8,128)S(1)}) parameter(0)
  %x = f32[4,64]{1,0:T(8,128)S(1)} get-tuple-element(%q), index=1
  %s = f32[8,64]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%start
  %e = f32[8,64]{1,0:T(8,128)} fusion(%s), kind=kCustom, calls=%end
  %h = bf16[8,64]{1,0:T(8,128)(2,1)} convert(%e)
  %r = bf16[2,64]{1,0:T(8,128)(2,1)} fusion(%h), kind=kCustom, calls=%all-reduce-scatter.1.clone
  ROOT %t = (s32[]{:T(128)}, f32[4,64]{1,0:T(8,128)S(1)}) tuple(%i, %x)
}

ENTRY %main (y: f32[4,64]) -> f32[4,64] {
  %y = f32[4,64]{1,0:T(8,128)} parameter(0)
  %table = s32[2,2]{1,0} constant({ { 0, 1 }, { 2, 3
}})
  %one = s32[]{:T(128)} constant(1)
  %first = s32[]{:T(128)} copy(%one)
  %state = (s32[]{:T(128)}, f32[4,64]{1,0:T(8,128)}) tuple(%first, %y)
  ROOT %w = (s32[]{:T(128)}, f32[4,64]{1,0:T(8,128)}) while(%state), condition=%condition, body=%body
}
"""


def test_collectives_of_a_tpu_program():
    """Its loop runs from 1 to 7, 6 times. A gather of 4*64 float32, 1024 bytes, is printed where it starts and ends."""
    assert hlo.collectives(TPU) == [
        hlo.Collective("all-gather", 6, 6 * 1024),
        hlo.Collective("reduce-scatter", 6, 6 * 8 * 64 * 2 * 3 // 4),  # bfloat16; all but a device's own quarter
    ]


def test_largest_arrays_of_a_program():
    """Of 8*64 float32; what only exists inside a fusion, as `all-reduce.1`, is not among them."""
    gathered, halved, part = hlo.largest(TPU)[:3]
    assert gathered == hlo.Value("f32[8,64]", 8 * 64 * 4, "s")
    assert (halved.type, halved.bytes, part.type) == ("bf16[8,64]", 8 * 64 * 2, "bf16[2,64]")


def test_a_loop_of_unknown_length_is_not_guessed():
    with pytest.raises(ValueError, match="rounds of loop w"):
        hlo.collectives(TPU.replace("direction=LT", "direction=NE"))


GPU = """
ENTRY %main (a: bf16[4,64], b: f32[2]) -> bf16[8,64] {
  %a = bf16[4,64]{1,0} parameter(0)
  %b = f32[2]{0} parameter(1)
  %s = ((bf16[4,64]{1,0}, f32[2]{0}), (bf16[8,64]{1,0}, f32[4]{0})) all-gather-start(%a, %b), GROUPS, dimensions={0}
  %d = (bf16[8,64]{1,0}, f32[4]{0}) all-gather-done(%s)
  %sizes = s32[2]{0} constant({4, 4})
  %whole = bf16[8,64]{1,0} get-tuple-element(%d), index=0
  ROOT %r = bf16[8,64]{1,0} ragged-all-to-all(%a, %whole, %sizes, %sizes, %sizes, %sizes), GROUPS
}
"""


@pytest.mark.parametrize(
    "groups",
    [
        "replica_groups={{0,2},{1,3}}",
        "replica_groups=[2,2]<=[2,2]T(1,0)",
        "replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_1'}",
        "replica_groups=mesh['axis_0'=4] {'axis_0':(1)2}",
    ],
)
def test_collectives_of_a_gpu_program(groups):
    """Groups of two. The gather sends 4*64 bfloat16 and 2 float32; of the rows of an exchange, half stay at home."""
    assert hlo.collectives(GPU.replace("GROUPS", groups)) == [
        hlo.Collective("all-gather", 1, 4 * 64 * 2 + 2 * 4),
        hlo.Collective("ragged-all-to-all", 1, 4 * 64 * 2 // 2),
    ]


# Topologies


@pytest.mark.parametrize(
    ("text", "slices", "name", "devices"),
    [
        ("v5e:8x8", None, "v5e:8x8", 64),
        ("v5e:1x1", None, "v5e:1x1", 1),
        ("v6e:4x8", 2, "v6e:4x8x2slices", 64),
        ("v5p:4x4x4x2slices", None, "v5p:4x4x4x2slices", 128),
        ("h100:64", None, "h100:64", 64),
        ("a6000:3", None, "a6000:3", 3),
    ],
)
def test_topologies(text, slices, name, devices):
    topology = topologies.parse(text, slices)
    assert (str(topology), topology.num_devices) == (name, devices)


@pytest.mark.parametrize(
    ("text", "slices", "says"),
    [
        ("v5x:8x8", None, "unknown device 'v5x'; valid: v5e:1x1|2x2|2x4|4x4|4x8|8x8|8x16|16x16, v5p:2x2x1"),
        ("v5e", None, "'' is no shape; valid: v5e:1x1|2x2|2x4|4x4"),
        ("v5e:8by8", None, "'8by8' is no shape"),
        ("v5e:4x4x4", None, "a slice of v5e has 2 axes of at most 16x16 chips"),
        ("v5e:3x8", None, "each axis must be a multiple of a host's 2x2 chips"),
        ("v5p:2x2x100", None, "3 axes of at most 16x16x24 chips"),
        ("v5e:8x8", 0, "--slices=0: must be at least 1"),
        ("v5e:8x8x2slices", 4, "--slices=4: --topology=v5e:8x8x2slices has 2"),
        ("h100:8x8", None, "GPUs are given by their number"),
        ("h100:8", 2, "GPUs are given by their number"),
        ("h100:12", None, "must be a multiple of 8"),
    ],
)
def test_topologies_that_are_none(text, slices, says):
    with pytest.raises(UserError) as e:
        topologies.parse(text, slices)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_the_compiler_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(topologies, "_is_installed", lambda module: module != "nvidia.cuda_nvcc")
    with pytest.raises(
        UserError, match=r"without nvidia-cuda-nvcc-cu12: .* pip install 'jax\[cuda12-local\]' nvidia-cuda"
    ):
        topologies.devices(topologies.parse("l4:2"))


# Memory


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: ... Used 64.50G of 15.75G hbm. Exceeded hbm capacity by 48.75G.", 64.5),
        ("the total memory required for HLO temporaries (24.49G) exceeds available HBM (15.75G).", 24.49),
        ("INTERNAL: something else, of 15.75G hbm", 0),
    ],
)
def test_refusals_of_the_tpu_compiler(message, gib):
    assert program._needed(message) == pytest.approx(gib * GIB, abs=1)


def test_a_gpu_keeps_some_memory_for_itself():
    """80 GiB less what its driver hides, and a twentieth of the rest."""
    assert usable(GPUS["h100"]) == int(84_942_979_072 * 0.95)


# Layouts


def test_layouts_use_every_device_and_keep_the_batch():
    """4400 sequences on 64 devices: 68.75 micro-batches of 64, so 69. Sixteen groups of 4: 275 micro-batches."""
    topology = topologies.parse("v5e:8x8")
    found = list(layouts(load("configs/ling_2.py:mini"), topology))
    sizes = [(c.mesh.fsdp, c.mesh.expert, c.mesh.tensor) for c in found]
    assert sizes == [(64, 1, 1), (8, 8, 1), (1, 64, 1), (2, 8, 4)]
    batches = [(c.train.batch_size, c.train.accumulate_steps) for c in found]
    assert batches == [(69 * 64, 69)] * 3 + [(4400, 275)]


# The command


@pytest.mark.slow
def test_a_dry_run_says_what_a_run_needs_here_and_writes_nothing(tmp_path):
    """Two of eight devices along fsdp hold a half of the parameters each, and norms, which are under 1%, whole."""
    config = config_file(tmp_path, write_text(tmp_path / "text"), tmp_path / "cache", {"model.dim": 256})
    flags = (f"--config={config}", "--dry-run", "--config.mesh.fsdp=2", f"--workdir={tmp_path / 'run'}")
    done = run("train", *flags, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert done.returncode == 0, done.stderr
    half = 2 * count_parameters(program.as_expected(load(str(config)), None).model)["total"]
    parts = {k: float(v) * 2**20 for k, v in re.findall(r"(parameters|optimizer state) +([\d.]+) MiB", done.stdout)}
    assert 0.99 < parts["parameters"] / half < 1.01
    assert abs(parts["optimizer state"] - 2 * parts["parameters"]) < 0.02 * 2**20
    assert "data 4 x fsdp 2" in done.stdout and re.search(r"all-gather +\d", done.stdout)
    assert not (tmp_path / "run").exists()


RESULT = program.Compiled(
    topology=topologies.parse("v5e:2x2"),
    mesh={"data": 1, "fsdp": 2, "expert": 2, "tensor": 1, "context": 1},
    sequences=(3, 4),
    fits=True,
    available=16 * GIB,
    needed=7 * GIB,
    memory={"parameters": GIB, "optimizer state": 2 * GIB, "temporaries": 4 * GIB},
    gradients=GIB,
    collectives=[hlo.Collective("all-gather", 1500, GIB // 2)],
    largest=[hlo.Value("f32[8,64]", GIB // 4, "jit(train_step)/jvp()/dot_general")],
    text=None,
    seconds=7.4,
)


def test_what_is_printed():
    console = Console(width=120, highlight=False)
    with console.capture() as printed:
        console.print(*cost_table.tables(RESULT), sep="\n")
    lines = [" ".join(line.split()) for line in printed.get().splitlines()]
    assert lines[0] == "v5e:2x2, fsdp 2 x expert 2: fits, 7.00 GiB of 16.00 GiB per device, compiled in 7 s"
    assert {
        "temporaries 4.00 GiB",
        "gradients among them 1.00 GiB",
        "all 7.00 GiB",
        "all-gather 1,500 0.50 GiB",
    } <= set(lines)
    assert "f32[8,64] 0.25 GiB jvp()/dot_general" in lines
    flags = ["mesh.data=1", "mesh.fsdp=2", "mesh.expert=2", "train.batch_size=12", "train.accumulate_steps=3"]
    assert cost_table._overrides(RESULT) == " ".join(f"--config.{flag}" for flag in flags)


def test_what_is_printed_of_a_refused_program():
    refused = RESULT._replace(fits=False, memory={"parameters": GIB}, collectives=None, largest=None)
    *_, row = cost_table.markdown([RESULT, refused]).splitlines()
    assert row == "| v5e:2x2 | fsdp 2 x expert 2 | 3 x 4 | no | 7.00 / 16.00 | 1.00 |  |  | 1.00 |  | 7 |"


def test_a_search_that_finds_nothing_says_what_it_tried(monkeypatch, capsys):
    refused = RESULT._replace(fits=False, memory={"parameters": GIB}, collectives=None, largest=None)
    monkeypatch.setattr("frugalmoe.aot.search.compile_step", lambda config, topology: refused)
    assert main(["compile", LAPTOP, "--topology=v5e", "--search", "--format=markdown"]) == EXIT_USER_ERROR
    out, err = capsys.readouterr()
    assert out.count("| no | 7.00 / 16.00 |") == err.count("does not fit") > 1
    assert err.splitlines()[-1] == "frugalmoe: --topology=v5e: no slice up to v5e:16x16 has a layout that fits"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--topology=v5e:2x2", "--config.mesh.expert=3"), "mesh.expert=3: must divide the 4 devices"),
        (("--topology=v5e:2x2", "--search"), "--search finds the shape: give the kind alone"),
        (("--topology=v9", "--search"), "unknown device"),
    ],
)
def test_bad_input_is_one_line(flags, says, capsys):
    assert main(["compile", LAPTOP, *flags]) == EXIT_USER_ERROR
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1


# `make test` keeps the compiler apart: JAX would look for a TPU in every other process.
WITH_LIBTPU = os.pathsep.join([*filter(None, sys.path), str(Path(sys.prefix) / "aot")])


@pytest.mark.slow
def test_tpus_that_are_not_there():
    """Two slices of four v5e chips: data 2, the slices, x expert 4, the chips of one."""
    fields = {"model.vocab_size": 512, "model.num_layers": 1, "model.num_dense_layers": 0, "data.sequence_length": 64}
    overrides = [f"--config.{name}={value}" for name, value in (fields | {"mesh.expert": 4}).items()]
    flags = (LAPTOP, "--topology=v5e:2x2", "--slices=2", "--format=json", *overrides)
    done = run("compile", *flags, PYTHONPATH=WITH_LIBTPU)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    memory = result["memory"]
    assert result["fits"] and result["available"] == 15.75 * GIB
    assert memory["optimizer state"] == 2 * memory["parameters"] + 2 * 4  # moments; two counts of steps
    assert sum(memory.values()) == result["needed"]
    assert all(size >= 0 for size in memory.values())
    assert {c["kind"] for c in result["collectives"]} >= {"all-gather", "all-reduce", "send"}


@pytest.mark.slow
def test_rows_travel_on_v5e_too():
    """Its compiler has no ragged exchange for more than 16 chips."""
    fields = {"model.num_layers": 1, "model.num_dense_layers": 0, "model.dim": 128, "model.moe.exchange": "all_to_all"}
    fields |= {"mesh.expert": 8, "mesh.fsdp": 4, "mesh.data": 1, "train.batch_size": 32, "data.sequence_length": 64}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    done = run("compile", LAPTOP, "--topology=v5e:4x8", "--format=json", *overrides, PYTHONPATH=WITH_LIBTPU)
    assert done.returncode == 0, done.stderr
    kinds = {c["kind"] for c in json.loads(done.stdout)["collectives"]}
    assert "all-to-all" in kinds and "ragged-all-to-all" not in kinds


@pytest.mark.slow
def test_what_a_refused_tpu_program_needs_has_its_arguments_in_it():
    """6 GiB that are doubled in place while 12 GiB are sorted, on a chip of 15.75 GiB."""
    program = """
import jax, jax.numpy as jnp
from frugalmoe.aot import program, topologies
def step(a):
    sorted = jnp.sort(jnp.sin(a[0, 0] + jnp.arange(6 << 28, dtype=jnp.float32)).reshape(-1, 8192), axis=0)
    total = jnp.sum(jnp.sort(sorted, axis=1)[::3, ::5])
    return 2 * a + total, total
device = jax.sharding.SingleDeviceSharding(topologies.devices(topologies.parse("v5e:1x1"))[0])
a = jax.ShapeDtypeStruct((6 << 10, 1 << 18), jnp.float32, sharding=device)
try:
    jax.jit(step, donate_argnums=0).lower(a).compile()
except jax.errors.JaxRuntimeError as e:
    print(program._needed(str(e)) / 2**30)
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": WITH_LIBTPU}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert float(done.stdout) == pytest.approx(18, abs=0.1), done.stderr
