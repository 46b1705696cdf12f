"""The model is what the papers mean: tiny random `transformers` models give the same logits, routing and gradients.

GLM-4-MoE is Ling 2.0 after renaming; Granite-MoE-shared with unit multipliers is Ling 1 without NormHead.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf
from flax import nnx

from frugalmoe import sharding
from frugalmoe.config import default, override, resolve
from frugalmoe.model.moe import Context
from frugalmoe.model.transformer import structure

V, D, H, K, d, F, E, L, B, T = 64, 32, 4, 2, 8, 16, 8, 3, 2, 12
COMMON = dict(
    vocab_size=V,
    hidden_size=D,
    num_hidden_layers=L,
    num_attention_heads=H,
    num_key_value_heads=K,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
    num_experts_per_tok=2,
)


@dataclasses.dataclass(frozen=True)
class Family:
    """A `transformers` config, the same model in our fields, and the names that differ between families."""

    config: Callable[[], hf.PretrainedConfig]
    ours: dict
    moe: str = "mlp"
    router: str = "mlp.gate.weight"


FAMILIES = {
    "mixtral": Family(
        lambda: hf.MixtralConfig(**COMMON, head_dim=d, intermediate_size=F, num_local_experts=E, rope_theta=1e6),
        {"model.moe.options.softmax": "after", "model.rope_theta": 1e6, "model.norm_eps": 1e-5},
    ),
    "olmoe": Family(
        lambda: hf.OlmoeConfig(**COMMON, intermediate_size=F, num_experts=E),
        {"model.qk_norm": "full", "model.moe.options.renormalize": False, "model.norm_eps": 1e-5},
    ),
    "qwen3_moe": Family(
        lambda: hf.Qwen3MoeConfig(
            **COMMON, head_dim=d, moe_intermediate_size=F, num_experts=E, norm_topk_prob=True, mlp_only_layers=[]
        ),
        {"model.qk_norm": "head", "model.moe.options.renormalize": True},
    ),
    "glm4_moe (Ling 2.0)": Family(
        lambda: hf.Glm4MoeConfig(
            **COMMON,
            head_dim=d,
            attention_bias=True,
            intermediate_size=24,
            moe_intermediate_size=F,
            n_routed_experts=E,
            n_shared_experts=1,
            n_group=4,
            topk_group=2,
            first_k_dense_replace=1,
            use_qk_norm=True,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_type": "default"},
        ),
        {
            "model.moe.router": "sigmoid_bias",
            "model.moe.options.num_groups": 4,
            "model.moe.options.groups_per_token": 2,
            "model.moe.options.scale": 2.5,
            "model.moe.num_shared_experts": 1,
            "model.num_dense_layers": 1,
            "model.dense_dim": 24,
            "model.qk_norm": "head",
            "model.qkv_bias": True,
            "model.rope_fraction": 0.5,
            "model.norm_eps": 1e-5,
        },
    ),
    "granitemoeshared (Ling 1)": Family(
        lambda: hf.GraniteMoeSharedConfig(
            **COMMON,
            intermediate_size=F,
            num_local_experts=E,
            shared_intermediate_size=2 * F,
            attention_multiplier=d**-0.5,
            embedding_multiplier=1.0,
            logits_scaling=1.0,
            residual_multiplier=1.0,
        ),
        {"model.moe.options.renormalize": True, "model.moe.num_shared_experts": 2},
        moe="block_sparse_moe",
        router="block_sparse_moe.router.weight",
    ),
}


def our_config(family: Family):
    sizes = {
        "vocab_size": V, "dim": D, "num_layers": L, "num_heads": H, "num_kv_heads": K, "head_dim": d,
        "moe.num_experts": E, "moe.num_experts_per_token": 2, "moe.expert_dim": F,
    }  # fmt: skip
    return resolve(override(default(), {f"model.{k}": v for k, v in sizes.items()} | family.ours)).model


def by_our_names(get: Callable[[str], np.ndarray], model, family: Family) -> dict:
    """Our parameter tree from torch tensors, or from their gradients: every map is linear."""

    def attention(i):
        p = f"model.layers.{i}.self_attn."
        tree = {
            "query_DHd": get(p + "q_proj.weight").reshape(H, d, D).transpose(2, 0, 1),
            "key_Dhd": get(p + "k_proj.weight").reshape(K, d, D).transpose(2, 0, 1),
            "value_Dhd": get(p + "v_proj.weight").reshape(K, d, D).transpose(2, 0, 1),
            "out_HdD": get(p + "o_proj.weight").T.reshape(H, d, D),
        }
        if model.qkv_bias:
            tree["query_bias_Hd"] = get(p + "q_proj.bias").reshape(H, d)
            tree["key_bias_hd"] = get(p + "k_proj.bias").reshape(K, d)
            tree["value_bias_hd"] = get(p + "v_proj.bias").reshape(K, d)
        if model.qk_norm != "none":
            tree["query_norm"] = {"scale": get(p + "q_norm.weight")}
            tree["key_norm"] = {"scale": get(p + "k_norm.weight")}
        return tree

    def feed_forward(gate, up, down):
        return {"gate_up_D2F": np.stack([gate.T, up.T], axis=1), "down_FD": down.T}

    def moe(i):
        p = f"model.layers.{i}.{family.moe}."
        gate_up = get(p + "experts.gate_up_proj")  # [E, 2F, D]
        tree = {
            "router": {"kernel_DE": get(f"model.layers.{i}.{family.router}").T},
            "gate_up_ED2F": gate_up.reshape(E, 2, -1, D).transpose(0, 3, 1, 2),
            "down_EFD": get(p + "experts.down_proj").transpose(0, 2, 1),
        }
        if family.moe == "block_sparse_moe":
            q = f"model.layers.{i}.shared_mlp."
            tree["shared"] = feed_forward(*np.split(get(q + "input_linear.weight"), 2), get(q + "output_linear.weight"))
        elif model.moe.num_shared_experts:
            names = (p + f"shared_experts.{n}_proj.weight" for n in ("gate", "up", "down"))
            tree["shared"] = feed_forward(*map(get, names))
        return tree

    def block(i):
        p = f"model.layers.{i}."
        tree = {
            "attention": attention(i),
            "attention_norm": {"scale": get(p + "input_layernorm.weight")},
            "ffn_norm": {"scale": get(p + "post_attention_layernorm.weight")},
        }
        if i < model.num_dense_layers:
            names = (p + f"mlp.{n}_proj.weight" for n in ("gate", "up", "down"))
            return tree | {"ffn": feed_forward(*map(get, names))}
        return tree | {"moe": moe(i)}

    stack = lambda layers: jax.tree.map(lambda *a: np.stack(a), *[block(i) for i in layers])
    tree = {
        "embed_VD": get("model.embed_tokens.weight"),
        "moe_blocks": stack(range(model.num_dense_layers, L)),
        "final_norm": {"scale": get("model.norm.weight")},
        "head_DV": get("lm_head.weight").T,
    }
    return tree | ({"dense_blocks": stack(range(model.num_dense_layers))} if model.num_dense_layers else {})


def randomized(family: Family) -> hf.PreTrainedModel:
    """Weights large enough that every term is seen; norms and biases off their defaults."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(
        family.config(), dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            tensor.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.mark.filterwarnings("default")  # transformers' own
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_same_logits_routing_and_gradients(family):
    theirs = randomized(family)
    tokens = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
    chosen = {}
    for name, module in theirs.named_modules():
        if name.endswith(".experts"):
            layer = int(name.split(".")[2])
            module.register_forward_hook(lambda m, args, out, layer=layer: chosen.__setitem__(layer, args[1]))
    ids = torch.from_numpy(tokens).long()
    out = theirs(input_ids=ids, use_cache=False)
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1))
    loss.backward()
    numpy = lambda t: t.detach().numpy()
    values, grads = dict(theirs.named_parameters()), {n: p.grad for n, p in theirs.named_parameters()}

    model = our_config(family)
    graphdef, shapes, router_state = structure(model)
    params = by_our_names(lambda n: numpy(values[n]), model, family)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, shapes)
    if router_state:
        bias = [
            numpy(theirs.model.layers[i].mlp.gate.e_score_correction_bias) for i in range(model.num_dense_layers, L)
        ]
        router_state = {"moe_blocks": {"moe": {"router_state": {"bias_E": np.stack(bias)}}}}

    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1, "context": 1})
    with jax.set_mesh(mesh):
        tokens_BT = sharding.put(mesh, tokens, "BT")
        ones_BT, positions_BT = (
            jnp.ones_like(tokens_BT),
            sharding.put(mesh, np.tile(np.arange(T, dtype=np.int32), (B, 1)), "BT"),
        )
        keys_B = sharding.put(mesh, jax.random.split(jax.random.key(0), B), "B")

        @jax.jit
        @jax.value_and_grad
        def run(params):
            net = nnx.merge(graphdef, params, router_state)
            logits = net.logits(net(Context(tokens_BT, ones_BT, positions_BT, keys_B, jnp.int32(0))).hidden_BTD)
            logp = jax.nn.log_softmax(logits[:, :-1])
            return -jnp.mean(jnp.take_along_axis(logp, tokens_BT[:, 1:, None], axis=-1))

        def forward(params):
            net = nnx.merge(graphdef, params, router_state)
            out = net(Context(tokens_BT, ones_BT, positions_BT, keys_B, jnp.int32(0), trace=True))
            return net.logits(out.hidden_BTD), out.routed.selected_BTE

        logits, selected_LBTE = jax.jit(forward)(params)
        our_loss, our_grads = run(params)

    assert relative_error(logits, numpy(out.logits)) < 1e-5
    assert abs(float(our_loss) - loss.item()) < 1e-5 * loss.item()
    for row, layer in enumerate(range(model.num_dense_layers, L)):
        their_choice = np.zeros((B * T, E), bool)
        np.put_along_axis(their_choice, numpy(chosen[layer]), True, axis=1)
        np.testing.assert_array_equal(np.asarray(selected_LBTE[row]).reshape(B * T, E), their_choice)
    expected = by_our_names(lambda n: numpy(grads[n]), model, family)
    errors = jax.tree.map(relative_error, our_grads, expected)
    assert max(jax.tree.leaves(errors)) < 1e-5, errors
