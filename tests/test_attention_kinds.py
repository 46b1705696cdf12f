"""Kinds of attention against `transformers`, the pattern of layers, and what a config may say of both.

Letters: B sequences, T tokens, D model, H query heads, K key-value heads, d channels of a head.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf
from flax import nnx
from test_train_step import config_of, mesh_of
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.hunyuan_v1_moe import modeling_hunyuan_v1_moe as hunyuan
from transformers.models.mistral import modeling_mistral as mistral

from frugalmoe import sharding
from frugalmoe.config import completed, default, override, record, resolve
from frugalmoe.config.checks import check_devices
from frugalmoe.config.describe import describe
from frugalmoe.cost import forward_flops
from frugalmoe.errors import UserError
from frugalmoe.fields import to_dict
from frugalmoe.files import write_json
from frugalmoe.model import pattern
from frugalmoe.model.attention import kinds
from frugalmoe.model.rotary import attention_factor, frequencies
from frugalmoe.model.transformer import count_parameters, structure
from frugalmoe.schema import RopeScaling

B, T, D, H, K, d = 2, 24, 32, 4, 2, 8
HEADS = {"model.dim": D, "model.num_heads": H, "model.num_kv_heads": K, "model.head_dim": d}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
DEEP_YARN = YARN | {"mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 32.0, "beta_slow": 1.0}


def scaling(rope: dict) -> dict:
    """Our fields of a `rope_parameters` of transformers."""
    names = {"rope_type": "kind", "original_max_position_embeddings": "original_length"}
    return {f"model.rope_scaling.{names.get(k, k)}": v for k, v in rope.items() if k != "rope_theta"}


def rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """[heads * d, inputs] -> [inputs, heads, d]."""
    return weight.reshape(heads, -1, weight.shape[1]).transpose(2, 0, 1)


def grouped_names(get) -> dict:
    tree = {
        "query_DHd": rows(get("q_proj.weight"), H),
        "key_Dhd": rows(get("k_proj.weight"), K),
        "value_Dhd": rows(get("v_proj.weight"), K),
        "out_HdD": get("o_proj.weight").T.reshape(H, d, D),
    }
    return tree


def with_sinks(get) -> dict:
    biases = {f"{name}_bias_{letter}d": get(f"{name[0]}_proj.bias").reshape(-1, d) for name, letter in BIASES}
    return grouped_names(get) | biases | {"sink_H": get("sinks")}


BIASES = (("query", "H"), ("key", "h"), ("value", "h"))
RANK, QUERY_RANK, ROTATED, VALUE = 16, 12, 4, 6
PAIRS = np.r_[0:ROTATED:2, 1:ROTATED:2]  # DeepSeek rotates channel 2 i with 2 i + 1


def latent_names(get, query_rank: int) -> dict:
    order = np.r_[0:d, d + PAIRS]
    down, up = get("kv_a_proj_with_mqa.weight"), rows(get("kv_b_proj.weight"), H)
    tree = {
        "latent_DP": down[:RANK].T,
        "latent_norm": {"scale": get("kv_a_layernorm.weight")},
        "rotated_key_Dd": down[RANK:][PAIRS].T,
        "key_PHd": up[..., :d],
        "value_PHd": up[..., d:],
        "out_HdD": get("o_proj.weight").T.reshape(H, VALUE, D),
    }
    if not query_rank:
        return tree | {"query_DHd": rows(get("q_proj.weight"), H)[..., order]}
    return tree | {
        "query_down_DP": get("q_a_proj.weight").T,
        "query_norm": {"scale": get("q_a_layernorm.weight")},
        "query_up_PHd": rows(get("q_b_proj.weight"), H)[..., order],
    }


def latent_case(query_rank: int | None, rope: dict):
    config = hf.DeepseekV3Config(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=H, q_lora_rank=query_rank, kv_lora_rank=RANK,
        qk_nope_head_dim=d, qk_rope_head_dim=ROTATED, v_head_dim=VALUE, rope_parameters=dict(rope),
        max_position_embeddings=128,
    )  # fmt: skip
    ours = {"rank": RANK, "query_rank": query_rank or 0, "rotary_dim": ROTATED, "value_dim": VALUE}
    fields = {"model.attention": "latent"} | {f"model.attention_options.latent.{k}": v for k, v in ours.items()}
    names = functools.partial(latent_names, query_rank=query_rank)
    return deepseek.DeepseekV3Attention, deepseek.DeepseekV3RotaryEmbedding, config, fields, names, 0


def gpt_oss_case(window: int):
    config = hf.GptOssConfig(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=K, head_dim=d, sliding_window=window or None,
        layer_types=["sliding_attention" if window else "full_attention"], num_hidden_layers=1,
        rope_parameters=dict(YARN) | {"truncate": False}, max_position_embeddings=128,
    )  # fmt: skip
    kind = "window" if window else "grouped"
    fields = {"model.attention": kind, f"model.attention_options.{kind}.sinks": True, "model.qkv_bias": True}
    fields |= {"model.attention_options.window.window": window} if window else {}
    return gpt_oss.GptOssAttention, gpt_oss.GptOssRotaryEmbedding, config, fields, with_sinks, window


def mistral_case(window: int):
    config = hf.MistralConfig(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=K, head_dim=d, sliding_window=window,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    fields = {"model.attention": "window", "model.attention_options.window.window": window}
    return mistral.MistralAttention, mistral.MistralRotaryEmbedding, config, fields, grouped_names, window


PLAIN = {"rope_type": "default", "rope_theta": 1e4}
ORACLES = {
    "grouped with sinks, YaRN (gpt-oss)": gpt_oss_case(0),
    "window with sinks, YaRN (gpt-oss)": gpt_oss_case(7),
    "window (Mistral)": mistral_case(5),
    "latent (DeepSeek-V3)": latent_case(QUERY_RANK, PLAIN),
    "latent, YaRN (DeepSeek-V3)": latent_case(QUERY_RANK, DEEP_YARN),
    "latent without query rank (DeepSeek-V2-Lite)": latent_case(None, PLAIN),
}


@pytest.mark.filterwarnings("default")  # transformers' own
@pytest.mark.parametrize("case", ORACLES.values(), ids=ORACLES.keys())
def test_same_outputs_and_gradients_as_transformers(case):
    attention, angles, config, fields, names, window = case
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = attention(config, layer_idx=0)
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            tensor.normal_(mean=1.0 if "norm" in name else 0.0, std=0.0 if name == "o_proj.bias" else 0.3)
    x = torch.randn(B, T, D, requires_grad=True)
    age = torch.arange(T)[:, None] - torch.arange(T)
    mask = torch.where((age >= 0) & (age < (window or T)), 0.0, -torch.inf)[None, None]
    out, _ = theirs(x, angles(config)(x, torch.arange(T)[None].expand(B, T)), mask)
    g = torch.randn(B, T, D)
    (out * g).sum().backward()
    values = {name: tensor.detach().numpy() for name, tensor in theirs.named_parameters()}
    grads = {name: tensor.grad.numpy() for name, tensor in theirs.named_parameters()}
    rope = {k: v for k, v in config.rope_parameters.items() if k in {*DEEP_YARN, "truncate"} and v is not None}
    model = config_of(HEADS | fields | (scaling(rope) if rope["rope_type"] == "yarn" else {})).model
    model = dataclasses.replace(model, norm_eps=1e-6)

    kind = kinds.get(model.attention)
    options, mesh = kinds.options_of(model, model.attention), mesh_of()
    with jax.set_mesh(mesh):
        graphdef, shapes = nnx.split(nnx.eval_shape(lambda: kind.layer(jax.random.key(0), model, options, 1.0)))
        params = jax.tree.map(jnp.asarray, names(values.__getitem__))
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, nnx.to_pure_dict(shapes))
        place = lambda a, letters: sharding.put(mesh, np.asarray(a), letters)
        position_BT = place(np.tile(np.arange(T, dtype=np.int32), (B, 1)), "BT")
        ones_BT = place(np.ones((B, T), np.int32), "BT")

        def apply(params, x_BTD):
            prepared = kind.prepare(position_BT, model, options)
            y_BTD, _ = nnx.merge(graphdef, params)(x_BTD, prepared, ones_BT, None, None)
            return jnp.sum(y_BTD * g.numpy()), y_BTD

        both = jax.jit(jax.value_and_grad(apply, (0, 1), has_aux=True))
        (_, y_BTD), (ours, dx_BTD) = both(params, place(x.detach().numpy(), "BTD"))
    error = lambda a, b: float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())
    assert error(y_BTD, out.detach().numpy()) < 1e-5
    assert error(dx_BTD, x.grad.numpy()) < 2e-5
    errors = jax.tree.map(error, ours, names(grads.__getitem__))
    assert max(jax.tree.leaves(errors)) < 2e-5, errors


ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": YARN | {"original_max_position_embeddings": 4096, "factor": 32.0},
    "yarn, not truncated": YARN | {"original_max_position_embeddings": 4096, "truncate": False},
    "yarn, DeepSeek-V3": DEEP_YARN | {"original_max_position_embeddings": 4096, "factor": 40.0, "mscale_all_dim": 1.0},
    "yarn, given factor": YARN | {"attention_factor": 1.5},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_rotary_frequencies_are_those_of_transformers(rope, theta):
    config = hf.LlamaConfig(head_dim=64, max_position_embeddings=131_072, rope_parameters=rope | {"rope_theta": theta})
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    fields = resolve(override(default(), scaling(rope))).model.rope_scaling
    np.testing.assert_allclose(frequencies(64, theta, fields), expected.numpy(), rtol=3e-6)
    assert attention_factor(fields) == pytest.approx(factor)
    assert np.abs(np.asarray(frequencies(64, theta, RopeScaling())) / expected.numpy()).max() > 1.5, "nothing stretched"


@pytest.mark.parametrize("channels", [4, 128])
def test_the_alpha_of_hunyuan_is_that_of_its_code(channels):
    rope = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 1e4}
    config = hf.HunYuanMoEV1Config(head_dim=channels, rope_parameters=rope)
    expected, factor = hunyuan.HunYuanMoEV1RotaryEmbedding.compute_ntk_alpha_rope_parameters(config)
    fields = resolve(override(default(), scaling({"rope_type": "ntk", "factor": 1000.0}))).model.rope_scaling
    np.testing.assert_allclose(frequencies(channels, 1e4, fields), expected.numpy(), rtol=3e-6)
    assert attention_factor(fields) == factor == 1
    assert frequencies(2, 1e4, fields).tolist() == [1], "of one pair, where d / (d - 2) is no number"


def kinds_of(**fields) -> list[pattern.BlockKind]:
    return pattern.layers(config_of({f"model.{k}": v for k, v in fields.items()}).model)


def test_layers_follow_the_pattern_from_the_first_to_the_last():
    found = kinds_of(attention="window, grouped", num_layers=5, num_dense_layers=1)
    assert [kind.attention for kind in found] == ["window", "grouped", "window", "grouped", "window"]
    assert [kind.feed_forward for kind in found] == ["dense", *["moe"] * 4]
    assert not any(kind.wrapper for kind in found)


# Attention, layers, dense ones, every how many are wrapped -> (first layer, unit, repeats) of each scan, where w is a
# window, g grouped, capitals are wrapped.
SCANS = [
    ("grouped", 6, 2, 0, [(0, "g", 2), (2, "g", 4)]),
    ("window,grouped", 6, 2, 0, [(0, "wg", 1), (2, "wg", 2)]),
    ("window,grouped", 6, 1, 0, [(0, "w", 1), (1, "gw", 2), (5, "g", 1)]),
    ("window,window,window,grouped", 10, 0, 0, [(0, "wwwg", 2), (8, "w", 2)]),
    ("grouped", 7, 3, 2, [(0, "gG", 1), (2, "g", 1), (3, "gG", 2)]),
    ("grouped", 3, 0, 1, [(0, "G", 3)]),
    ("window,grouped", 12, 0, 3, [(0, "wgWgwG", 2)]),
]


@pytest.mark.parametrize("attention, layers, dense, every, expected", SCANS)
def test_repeating_units_are_one_scan(attention, layers, dense, every, expected):
    wrapped = {"model.mixture_of_depths.capacity": 0.5, "model.mixture_of_depths.every": every} if every else {}
    fields = {"model.attention": attention, "model.num_layers": layers, "model.num_dense_layers": dense}
    model = config_of(fields | wrapped).model
    letter = lambda kind: kind.attention[0].upper() if kind.wrapper else kind.attention[0]
    found = [(first, "".join(map(letter, unit)), repeats) for first, unit, repeats in pattern.segments(model)]
    assert found == expected


# Layers, first dense ones, which ones behind them have experts -> (first layer, unit, repeats), dense or MoE.
INTERLEAVED = [
    ("grouped", 4, 0, 2, [(0, "dm", 2)]),
    ("grouped", 7, 1, 3, [(0, "d", 1), (1, "ddm", 2)]),
    ("grouped", 5, 0, 2, [(0, "dm", 2), (4, "d", 1)]),
    ("grouped", 3, 1, 2, [(0, "d", 1), (1, "dm", 1)]),
    ("chunked,chunked,chunked,nope", 8, 0, 2, [(0, "dmdm", 2)]),
]


@pytest.mark.parametrize("attention, layers, dense, every, expected", INTERLEAVED)
def test_dense_layers_and_such_with_experts_are_one_scan(attention, layers, dense, every, expected):
    fields = {"model.attention": attention, "model.num_layers": layers, "model.num_dense_layers": dense}
    model = config_of(fields | {"model.moe_every": every}).model
    letters = lambda unit: "".join(kind.feed_forward[0] for kind in unit)
    assert [(first, letters(unit), repeats) for first, unit, repeats in pattern.segments(model)] == expected
    sparse = pattern.moe_layers(model)
    assert sparse == list(range(dense + every - 1, layers, every)) and pattern.has_experts(model)
    assert structure(model)[1]["moe_blocks"]["ffn_norm"]["scale"].shape[0] == len(sparse)
    plain = forward_flops(config_of(fields).model, 6)
    per_layer = plain["routed experts"] / (layers - dense)
    assert forward_flops(model, 6)["routed experts"] == len(sparse) * per_layer


MIXED = {"model.attention": "window,grouped,latent", "model.num_layers": 8, "model.num_dense_layers": 1}


def test_parameters_of_several_kinds_are_stacked_by_kind_and_all_others_as_ever():
    mixed, plain = (structure(config_of(f).model)[1] for f in (MIXED, MIXED | {"model.attention": "grouped"}))
    assert {name: stack["out_HdD"].shape[0] for name, stack in mixed["moe_blocks"]["attention"].items()} == {
        "grouped": 3, "latent": 2, "window": 2,
    }  # fmt: skip
    shapes = lambda blocks: jax.tree.map(jnp.shape, {k: v for k, v in blocks.items() if k != "attention"})
    assert shapes(mixed["moe_blocks"]) == shapes(plain["moe_blocks"])
    assert plain["moe_blocks"]["attention"].keys() == {"query_DHd", "key_Dhd", "value_Dhd", "out_HdD"}
    assert mixed["dense_blocks"]["attention"].keys() == plain["dense_blocks"]["attention"].keys()


def test_flops_and_parameters_are_those_of_the_shapes():
    """Of a layer's matrices each weight is multiplied once per token, 2 FLOPs; products by hand."""
    for attention in ("grouped", "window", "latent", "chunked", "nope"):
        model = config_of({"model.attention": attention, "model.num_layers": 2, "model.num_dense_layers": 0}).model
        attention_params = structure(model)[1]["moe_blocks"]["attention"]
        matrices = sum(a.size for a in jax.tree.leaves(attention_params) if a.ndim > 2)
        assert forward_flops(model, 32)["attention projections"] == 2 * matrices
        counted = count_parameters(model)
        assert counted["total"] == sum(a.size for a in jax.tree.leaves(structure(model)[1]))
    wide = {"model.attention": "window", "model.attention_options.window.window": 4}
    few = forward_flops(config_of(wide).model, 6)["attention products"]
    assert few == 3 * 2 * 2 * 4 * 8 * (1 + 2 + 3 + 4 + 4 + 4) / 6  # 3 layers, 4 heads of 8 channels
    chunked = {"model.attention": "chunked", "model.attention_options.chunked.chunk": 4}
    few = forward_flops(config_of(chunked).model, 6)["attention products"]
    assert few == pytest.approx(3 * 2 * 2 * 4 * 8 * (1 + 2 + 3 + 4 + 1 + 2) / 6)
    latent = forward_flops(config_of({"model.attention": "latent"}).model, 5)["attention products"]
    assert latent == 3 * 2 * 4 * (8 + 4 + 8) * 3  # keys of 8 + 4 channels, values of 8; 3 keys in the mean


BAD = [
    ("model.attention=windw", "model.attention='windw'", "did you mean 'window'"),
    ("model.attention=", "model.attention=''", "no such kind of attention"),
    ("model.attention=window,,grouped", "model.attention=''", "no such kind"),
    ("model.attention_options.windw.window=3", "model.attention_options.windw", "no kind of attention in"),
    ("model.attention_options.grouped.sink=True", "model.attention_options.grouped.sink", "did you mean 'sinks'"),
    ("model.attention_options.grouped.sinks=1", "model.attention_options.grouped.sinks=1", "expected bool"),
    ("model.attention_options.grouped=3", "model.attention_options.grouped=3", "section"),
    ("model.attention_options=3", "model.attention_options=3", "section"),
    ("model.attention=window,model.attention_options.window.window=0", "options.window.window=0", "must be positive"),
    ("model.attention=latent,model.attention_options.latent.rank=-1", "latent.rank=-1", "must not be negative"),
    ("model.attention=latent,model.attention_options.latent.rotary_dim=7", "rotary_dim=7", "an even number"),
    ("model.attention=latent,model.qk_norm=head", "model.qk_norm='head'", "must be none with model.attention=latent"),
    ("model.attention=latent,model.out_bias=True", "model.out_bias=True", "must be False"),
    ("model.attention=latent,model.rope_fraction=0.5", "model.rope_fraction=0.5", "must be 1.0"),
    ("model.attention=latent,model.clip_qkv=8.0", "model.clip_qkv=8.0", "must be 0.0"),
    ("model.attention=chunked,model.attention_options.chunked.chunk=0", "options.chunked.chunk=0", "must be positive"),
    ("model.attention=nope,model.attention_options.nope.floor=0", "options.nope.floor=0", "must be positive"),
    ("model.attention=nope,model.attention_options.nope.temperature=-0.1", "nope.temperature=-0.1", "0 or more"),
    ("model.qk_norm=units", "model.qk_norm='units'", "did you mean 'unit'"),
    ("model.rope_scaling.kind=yarm", "model.rope_scaling.kind='yarm'", "did you mean 'yarn'"),
    ("model.rope_scaling.kind=yarn", "model.rope_scaling.original_length=0", "with model.rope_scaling.kind=yarn"),
    ("model.rope_scaling.factor=0.5", "model.rope_scaling.factor=0.5", "at least 1"),
    ("model.rope_scaling.beta_fast=0.5", "model.rope_scaling.beta_fast=0.5", "greater than"),
]


@pytest.mark.parametrize("overrides, field, rule", BAD, ids=lambda v: v)
def test_bad_values_are_one_line(overrides, field, rule):
    pairs = re.split(r",(?=model\.)", overrides)
    with pytest.raises(UserError) as error:
        resolve(override(default(), pairs))
    assert field in str(error.value) and rule in str(error.value)


def test_what_devices_do_not_divide_is_one_line():
    fields = {"model.attention": "window,latent", "model.attention_options.latent.rank": 30, "mesh.fsdp": 4}
    config = config_of(fields)
    with pytest.raises(UserError, match=r"fsdp\*expert\*context=4: must divide .*\.latent\.rank=30"):
        check_devices(config, 4)
    latent = config_of({"model.attention": "latent", "mesh.tensor": 4, "model.num_kv_heads": 1})
    assert check_devices(latent, 4)["tensor"] == 4, "it has no heads of keys and values"


def test_options_are_shown_dropped_and_completed(tmp_path):
    config = config_of({"model.attention": "window,grouped", "model.attention_options.window.window": 6})
    rows = {row.name: row for row in describe(config)}
    assert rows["model.attention_options.window.window"].value == 6
    assert "itself and those before it" in rows["model.attention_options.window.window"].meaning
    assert "attend to nothing" in rows["model.attention_options.grouped.sinks"].meaning
    base = override(default(), {"model.attention": "window", "model.attention_options.window.window": 6})
    assert resolve(override(base, {"model.attention": "grouped"})).model.attention_options.keys() == {"grouped"}
    again = resolve(override(base, {"model.attention": "grouped,window"})).model.attention_options["window"]
    assert again.window == 6
    saved = to_dict(config)
    write_json(tmp_path / "config.json", saved)
    assert resolve(record(tmp_path / "config.json")) == config
    del saved["model"]["attention"], saved["model"]["attention_options"], saved["model"]["rope_scaling"]
    assert completed(saved)["model"]["attention"] == "grouped", "runs that are older"


def test_a_file_that_is_no_kind_is_one_line(tmp_path, monkeypatch):
    for name, text in (("empty_kind", "x = 1\n"), ("bad_kind", "x = 1\ny = 1 / 0\n")):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(kinds, "__path__", [*kinds.__path__, str(tmp_path)])
    assert {"empty_kind", "bad_kind"} <= set(kinds.names())
    with pytest.raises(UserError, match=r"empty_kind\.py: ends without ATTENTION"):
        kinds.get("empty_kind")
    with pytest.raises(UserError, match=r"bad_kind\.py, line 2: ZeroDivisionError"):
        kinds.get("bad_kind")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"model\.attention='\./bad_kind\.py': .*line 2: ZeroDivisionError"):
        config_of({"model.attention": "grouped,./bad_kind.py"})


def test_every_kind_says_what_it_is():
    for name in kinds.names():
        kind = kinds.get(name)
        assert re.search(r"\d{4}\.\d{5}", kind.paper) and kind.about and kind.name == name
