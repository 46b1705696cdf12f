"""What is counted in a compiled program: FLOPs, bytes and kernels of programs whose figures are known by hand."""

import jax
import jax.numpy as jnp
import pytest
from runs import TINY

from frugalmoe.aot import traffic
from frugalmoe.config import default, override, resolve, settle
from frugalmoe.cost import items
from frugalmoe.cost.flops import forward_flops
from frugalmoe.model.transformer import count_parameters

STATE = "(s32[], f32[7,4,130]{2,1,0:T(8,128)}, f32[7,8]{1,0}, f32[8]{0}, bf16[130,16]{1,0})"
PROGRAM = """
HloModule step

%sum (m: f32[], n: f32[]) -> f32[] {
  %m = f32[] parameter(0)
  %n = f32[] parameter(1)
  ROOT %s = f32[] add(%m, %n)
}

%take (p: f32[7,4,130], i: s32[]) -> bf16[4,130] {
  %p = f32[7,4,130]{2,1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,4,130]{2,1,0:T(8,128)} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,4,130}
  %b = f32[4,130]{1,0:T(8,128)} bitcast(%slice)
  ROOT %c = bf16[4,130]{1,0:T(8,128)(2,1)} convert(%b), metadata={op_name="feed_forward/convert"}
}

%put (q: f32[7,8], r: f32[8], k: s32[]) -> f32[7,8] {
  %q = f32[7,8]{1,0} parameter(0)
  %r = f32[8]{0} parameter(1)
  %k = s32[] parameter(2)
  %o = s32[] constant(0)
  %twice = f32[8]{0} add(%r, %r)
  %row = f32[1,8]{1,0} reshape(%twice)
  ROOT %u = f32[7,8]{1,0} dynamic-update-slice(%q, %row, %k, %o)
}

%body (t: STATE) -> STATE {
  %t = STATE parameter(0)
  %n.1 = s32[] get-tuple-element(%t), index=0
  %stack = f32[7,4,130]{2,1,0:T(8,128)} get-tuple-element(%t), index=1
  %rows = f32[7,8]{1,0} get-tuple-element(%t), index=2
  %one = f32[8]{0} get-tuple-element(%t), index=3
  %w = bf16[130,16]{1,0} get-tuple-element(%t), index=4
  %cast = bf16[4,130]{1,0:T(8,128)(2,1)} fusion(%stack, %n.1), calls=%take, metadata={op_name="feed_forward/convert"}
  %product = bf16[4,16]{1,0:S(1)} dot(%cast, %w), lhs_contracting_dims={1}, metadata={op_name="attention/dot"}
  %new = f32[7,8]{1,0} fusion(%rows, %one, %n.1), calls=%put, metadata={op_name="KEPT"}
  ROOT %next = STATE tuple(%n.1, %stack, %new, %one, %w)
}

ENTRY %main (a: STATE) -> f32[7,8] {
  %a = STATE parameter(0)
  %loop = STATE while(%a), body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %result = f32[7,8]{1,0} get-tuple-element(%loop), index=2
  %zeros = f32[7,8]{1,0} broadcast(f32[] %result), dimensions={}, metadata={op_name="broadcast"}
  %start = (f32[7,8]{1,0:S(1)}, f32[7,8]{1,0}, u32[]{:S(2)}) copy-start(%result)
  %done = f32[7,8]{1,0:S(1)} copy-done(%start)
  ROOT %total = f32[7,8]{1,0} copy(%done), metadata={op_name="optimizer/copy"}
}
""".replace("STATE", STATE).replace("KEPT", "dynamic_update_index_in_dim/dynamic_update_slice")


def test_a_program_by_hand():
    """Seven rounds. A slice of 4*130 float32 is stored as 8*256; what the vector memory, S(1), holds is not moved."""
    found = {kernel.name: kernel for kernel in traffic.kernels(PROGRAM)}
    sliced, halved = 8 * 256 * 4, 8 * 256 * 2
    counted = {name: (k.launches, k.flops, k.read, k.written) for name, k in found.items()}
    assert counted["cast"] == (7, 0, 7 * (sliced + 4), 7 * halved)
    assert counted["product"] == (7, 7 * 2 * 4 * 130 * 16, 7 * (halved + 130 * 16 * 2), 0)
    assert counted["new"] == (7, 0, 7 * (8 * 4 + 4), 7 * 8 * 4), "an update in place moves what it updates"
    assert counted["start"] == (0, 0, 7 * 8 * 4, 0), "a copy engine reads from the main memory"
    assert counted["total"] == (1, 0, 0, 7 * 8 * 4)
    kinds = {name: (k.kind, items.name_of(k)) for name, k in found.items()}
    assert kinds["cast"] == ("cast", "casts") and kinds["product"] == ("compute", "attention")
    assert kinds["new"][1] == "kept for the backward pass" and kinds["total"] == ("move", "copies and transposes")
    assert kinds["zeros"] == ("fill", "fills with zeros") and len(found) == 6


def test_a_program_that_this_machine_compiles():
    """Three layers of [8, 16] by [16, 16], a scan: 2 FLOPs for each of 8*16*16 pairs. Its last line is one fusion."""

    def layers(x_NI, w_LIJ):
        with jax.named_scope("experts"):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_NI, w_LIJ)[0]

    text = jax.jit(layers).lower(jnp.ones((8, 16)), jnp.ones((3, 16, 16))).compile().as_text()
    products = [kernel for kernel in traffic.kernels(text) if kernel.flops]
    assert sum(kernel.flops for kernel in products) == 3 * 2 * 8 * 16 * 16
    assert {items.name_of(kernel) for kernel in products} == {items.PRODUCTS}
    text = jax.jit(lambda a, b: 2 * a + b).lower(jnp.ones(4096), jnp.ones(4096)).compile().as_text()
    (one,) = traffic.kernels(text)
    assert (one.launches, one.read, one.written) == (1, 2 * 4096 * 4, 4096 * 4)


CONVOLUTIONS = [
    ("f32[4,6]", "f32[6,5]", "f32[4,5]", "dim_labels=bf_io->bf", 2 * 4 * 6 * 5),
    # Heads as places of a window: each meets its own alone.
    ("bf16[9,8,1]", "bf16[8,3,2]", "bf16[9,3,2]", "window={size=3 pad=2_2 rhs_reversal=1}, dim_labels=bf0_i0o->b0f", 0),
]


@pytest.mark.parametrize(("a", "b", "out", "how", "flops"), CONVOLUTIONS)
def test_products_as_tpus_write_them(a, b, out, how, flops):
    """[9, 8] by [8, 3, 2]: 2 for each of 9*8*3*2 pairs."""
    layout = lambda of: of + "{" + ",".join(map(str, reversed(range(of.count(",") + 1)))) + "}"
    lines = [f"%a = {layout(a)} parameter(0)", f"%b = {layout(b)} parameter(1)"]
    text = "\n  ".join(["ENTRY %main (a: f32[], b: f32[]) -> f32[] {", *lines])
    text += f"\n  ROOT %c = {layout(out)} convolution(%a, %b), {how}\n}}\n"
    (product,) = traffic.kernels(text)
    assert product.flops == (flops or 2 * 9 * 8 * 3 * 2)


GPU_CALLS = [
    ("bf16[70,8]", "bf16[4,8,6]", "bf16[70,6]", 2 * 70 * 8 * 6),
    ("bf16[70,6]", "bf16[4,8,6]", "bf16[70,8]", 2 * 70 * 8 * 6),
    ("bf16[70,8]", "bf16[70,6]", "bf16[4,8,6]", 2 * 70 * 8 * 6),
]


@pytest.mark.parametrize(("a", "b", "out", "flops"), GPU_CALLS)
def test_grouped_products(a, b, out, flops):
    """Rows by weights, by their transposes, and rows by rows: 70 rows in all."""
    lines = [f"%a = {a} parameter(0)", f"%b = {b} parameter(1)", "%ids = s32[4] parameter(2)"]
    text = "\n  ".join(["ENTRY %main (a: f32[]) -> f32[] {", *lines])
    text += f'\n  ROOT %c = {out} custom-call(%ids, %a, %b), custom_call_target="triton_kernel_call"\n}}\n'
    (call,) = traffic.kernels(text)
    assert (call.flops, call.bytes > 0) == (flops, True)


def test_the_ideal_step():
    """Two micro-batches of 4 sequences of 32 tokens. An expert's weights, 3*32*16, are read twice in each, and their
    gradient is written, then added to; each of 2 rows of a token has the numbers that go in and out three times.
    """
    fields = TINY | {"model.vocab_size": 256, "train.accumulate_steps": 2, "model.moe.num_experts_per_token": 2}
    config = settle(resolve(override(default(), fields)), None, 1)
    least, tokens = items.ideal(config), 4 * 32
    weights, rows = 8 * 3 * 32 * 16, 2 * tokens
    of_layer = weights * (2 * 8 + 4 + 8) + 2 * 3 * 4 * rows * (2 * 32 + 3 * 16)
    assert least[items.PRODUCTS].bytes == 2 * of_layer
    assert least["optimizer"].bytes == 28 * count_parameters(config.model)["total"]
    flops = sum(forward_flops(config.model, 32).values())
    assert sum(item.flops for item in least.values()) == pytest.approx(3 * 2 * tokens * flops)
    (*_, (name, row)) = items.cells(dict.fromkeys(items.ITEMS, items.Item(1, 2e12, 3e9)), least)
    assert name == "all" and row[:3] == [f"{n * len(items.ITEMS):,.{d}f}" for n, d in ((1, 0), (2, 2), (3, 2))]
