"""Tiny random models of `transformers`, saved as published models are: one line per family and setting."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

V, D, H, K, d, F, E, L, B, T = 320, 32, 4, 2, 8, 16, 8, 3, 2, 12
DENSE = dict(
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
)
COMMON = DENSE | {"num_experts_per_tok": 2}
LATENT = COMMON | dict(
    num_key_value_heads=H,
    intermediate_size=24,
    moe_intermediate_size=F,
    n_routed_experts=E,
    q_lora_rank=12,
    kv_lora_rank=10,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=6,
    first_k_dense_replace=1,
)
LITE = {name: value for name, value in LATENT.items() if name != "first_k_dense_replace"}
QWEN3 = COMMON | dict(head_dim=d, moe_intermediate_size=F, num_experts=E, mlp_only_layers=[])
QWEN2 = COMMON | dict(
    moe_intermediate_size=F, num_experts=E, shared_expert_intermediate_size=2 * F, intermediate_size=24
)
GLM4_SIZES = COMMON | dict(
    head_dim=d,
    intermediate_size=24,
    moe_intermediate_size=F,
    n_routed_experts=E,
    n_shared_experts=1,
    first_k_dense_replace=1,
)
GLM4 = GLM4_SIZES | dict(
    attention_bias=True,
    n_group=4,
    topk_group=2,
    use_qk_norm=True,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_type": "default"},
)
GRANITE_ROUTED = COMMON | dict(intermediate_size=F, num_local_experts=E)
GRANITE = GRANITE_ROUTED | dict(
    shared_intermediate_size=2 * F,
    attention_multiplier=d**-0.5,
    embedding_multiplier=1.0,
    logits_scaling=1.0,
    residual_multiplier=1.0,
)
LLAMA4 = COMMON | dict(
    num_hidden_layers=4,
    head_dim=d,
    num_experts_per_tok=1,
    intermediate_size=F,
    intermediate_size_mlp=24,
    num_local_experts=E,
    attention_chunk_size=5,
    floor_scale=4,
)
YARN = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# The first of a family is the one that other tests take.
CASES: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "mixtral": lambda: hf.MixtralConfig(
        **COMMON, head_dim=d, intermediate_size=F, num_local_experts=E, rope_parameters={"rope_theta": 1e6}
    ),
    "mixtral window, tied": lambda: hf.MixtralConfig(
        **COMMON | {"tie_word_embeddings": True}, intermediate_size=F, num_local_experts=E, sliding_window=5
    ),
    "mixtral linear, one head of keys": lambda: hf.MixtralConfig(
        **COMMON | {"num_key_value_heads": 1},
        intermediate_size=F,
        num_local_experts=E,
        rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
    ),
    "olmoe": lambda: hf.OlmoeConfig(**COMMON, intermediate_size=F, num_experts=E),
    "olmoe renormalised": lambda: hf.OlmoeConfig(
        **COMMON | {"num_key_value_heads": H}, intermediate_size=F, num_experts=E, norm_topk_prob=True
    ),
    "olmoe clipped": lambda: hf.OlmoeConfig(**COMMON, intermediate_size=F, num_experts=E, clip_qkv=0.5),
    "flex_olmo": lambda: hf.FlexOlmoConfig(**COMMON, intermediate_size=F, num_experts=E),
    "flex_olmo renormalised, biases": lambda: hf.FlexOlmoConfig(
        **COMMON, intermediate_size=F, num_experts=E, norm_topk_prob=True, attention_bias=True
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**QWEN3, norm_topk_prob=True),
    "qwen3_moe as they are, dense layers, yarn": lambda: hf.Qwen3MoeConfig(
        **QWEN3 | {"mlp_only_layers": [0], "intermediate_size": 24}, norm_topk_prob=False, rope_parameters=YARN
    ),
    "qwen3_moe every other layer": lambda: hf.Qwen3MoeConfig(
        **QWEN3 | {"num_hidden_layers": 5, "mlp_only_layers": [1]}, intermediate_size=24, decoder_sparse_step=2
    ),
    "qwen3_moe window": lambda: hf.Qwen3MoeConfig(
        **QWEN3, norm_topk_prob=True, use_sliding_window=True, sliding_window=5
    ),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(**QWEN2),
    "qwen2_moe renormalised, windows, no bias": lambda: hf.Qwen2MoeConfig(
        **QWEN2, norm_topk_prob=True, use_sliding_window=True, sliding_window=4, qkv_bias=False, mlp_only_layers=[0]
    ),
    "deepseek_v3": lambda: hf.DeepseekV3Config(**LATENT, n_group=4, topk_group=2),
    "deepseek_v3 whole queries, no shared, yarn": lambda: hf.DeepseekV3Config(
        **LATENT | {"q_lora_rank": None},
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        rms_norm_eps=1e-2,
        rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 0.8},
    ),
    "deepseek_v2": lambda: hf.DeepseekV2Config(
        **LATENT, n_shared_experts=2, topk_method="group_limited_greedy", n_group=4, topk_group=2
    ),
    "deepseek_v2 greedy, scaled, yarn": lambda: hf.DeepseekV2Config(
        **LATENT, routed_scaling_factor=3.0, rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}
    ),
    "glm4_moe": lambda: hf.Glm4MoeConfig(**GLM4),
    "glm4_moe no bias, no norm, one group": lambda: hf.Glm4MoeConfig(
        **GLM4 | {"attention_bias": False, "use_qk_norm": False, "n_group": 1, "topk_group": 1}
    ),
    "glm4_moe_lite": lambda: hf.Glm4MoeLiteConfig(**LITE, n_group=4, topk_group=2),
    "glm4_moe_lite whole queries, two dense layers, yarn": lambda: hf.Glm4MoeLiteConfig(
        **LITE | {"q_lora_rank": None, "rms_norm_eps": 1e-2},
        n_shared_experts=2,
        norm_topk_prob=False,
        mlp_layer_types=["dense", "dense", "sparse"],
        rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 0.8},
    ),
    "dots1": lambda: hf.Dots1Config(
        **GLM4_SIZES, norm_topk_prob=True, routed_scaling_factor=2.5, n_group=4, topk_group=2
    ),
    "dots1 windows": lambda: hf.Dots1Config(**GLM4_SIZES, sliding_window=5, max_window_layers=2),
    "ernie4_5_moe": lambda: hf.Ernie4_5_MoeConfig(
        **DENSE, intermediate_size=24, moe_intermediate_size=F, moe_num_experts=E, moe_k=2
    ),
    "ernie4_5_moe tied, none shared": lambda: hf.Ernie4_5_MoeConfig(
        **DENSE | {"tie_word_embeddings": True},
        intermediate_size=24,
        moe_intermediate_size=F,
        moe_num_experts=E,
        moe_k=2,
        moe_num_shared_experts=0,
        moe_layer_start_index=0,
    ),
    "granitemoe": lambda: hf.GraniteMoeConfig(
        **GRANITE_ROUTED | {"attention_multiplier": 0.2, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
        logits_scaling=6.0,
    ),
    "granitemoe biases, tied, one head of keys": lambda: hf.GraniteMoeConfig(
        **GRANITE_ROUTED | {"num_key_value_heads": 1, "tie_word_embeddings": True, "num_experts_per_tok": 3},
        attention_multiplier=d**-0.5,
        attention_bias=True,
    ),
    "granitemoeshared": lambda: hf.GraniteMoeSharedConfig(**GRANITE),
    "granitemoeshared none shared": lambda: hf.GraniteMoeSharedConfig(**GRANITE | {"shared_intermediate_size": 0}),
    "gpt_oss": lambda: hf.GptOssConfig(
        **COMMON, head_dim=d, intermediate_size=F, num_local_experts=E, sliding_window=4
    ),
    "gpt_oss tied, no bias in attention, no window, not stretched": lambda: hf.GptOssConfig(
        **COMMON | {"tie_word_embeddings": True, "num_key_value_heads": 1, "num_experts_per_tok": 3},
        head_dim=16,
        intermediate_size=F,
        num_local_experts=E,
        layer_types=["full_attention"] * L,
        attention_bias=False,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
    ),
    "hunyuan_v1_moe": lambda: hf.HunYuanMoEV1Config(
        **DENSE, head_dim=d, intermediate_size=F, num_experts=E, moe_topk=2
    ),
    "hunyuan_v1_moe tied, biases, one head of keys": lambda: hf.HunYuanMoEV1Config(
        **DENSE | {"tie_word_embeddings": True, "num_key_value_heads": 1},
        head_dim=16,
        intermediate_size=F,
        num_experts=E,
        moe_topk=3,
        attention_bias=True,
    ),
    "hunyuan_v1_moe alpha, as released": lambda: hf.HunYuanMoEV1Config(
        **DENSE,
        head_dim=d,
        intermediate_size=F,
        num_experts=E,
        moe_topk=2,
        rope_parameters={"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 1e4, "mscale": 1.0},
    ),
    "phimoe": lambda: hf.PhimoeConfig(
        **COMMON, intermediate_size=F, num_local_experts=E, attention_bias=True, lm_head_bias=True
    ),
    "phimoe no bias, window, wide choice": lambda: hf.PhimoeConfig(
        **COMMON, intermediate_size=F, num_local_experts=E, sliding_window=5, router_jitter_noise=0.3
    ),
    "llama4_text": lambda: hf.Llama4TextConfig(**LLAMA4, rope_parameters=LLAMA3 | {"rope_theta": 5e5}),
    "llama4_text every other layer, no norm, no temperature": lambda: hf.Llama4TextConfig(
        **LLAMA4 | {"num_hidden_layers": 5},
        interleave_moe_layer_step=2,
        use_qk_norm=False,
        attn_temperature_tuning=False,
    ),
    "llama4_text all rotate, whole and chunked, biases, tied": lambda: hf.Llama4TextConfig(
        **LLAMA4 | {"tie_word_embeddings": True, "num_key_value_heads": 1},
        no_rope_layers=[1] * 4,
        layer_types=["full_attention", "chunked_attention"] * 2,
        attention_bias=True,
        moe_layers=[1, 2, 3],
    ),
    "llama": lambda: hf.LlamaConfig(**DENSE, intermediate_size=24, rope_parameters=LLAMA3),
    "llama tied": lambda: hf.LlamaConfig(**DENSE | {"tie_word_embeddings": True}, intermediate_size=24),
    "llama biases": lambda: hf.LlamaConfig(**DENSE, intermediate_size=24, attention_bias=True),
    "olmo": lambda: hf.OlmoConfig(**DENSE, intermediate_size=24),
    "olmo clipped, tied, one head of keys": lambda: hf.OlmoConfig(
        **DENSE | {"tie_word_embeddings": True, "num_key_value_heads": 1}, intermediate_size=24, clip_qkv=0.5
    ),
    "olmo2": lambda: hf.Olmo2Config(**DENSE, intermediate_size=24, rope_parameters={"rope_theta": 5e5}),
    "olmo2 tied, yarn": lambda: hf.Olmo2Config(
        **DENSE | {"tie_word_embeddings": True, "num_key_value_heads": H}, intermediate_size=24, rope_parameters=YARN
    ),
    "olmo3": lambda: hf.Olmo3Config(
        **DENSE | {"num_hidden_layers": 5},
        intermediate_size=24,
        sliding_window=4,
        rope_parameters={
            "full_attention": YARN | {"rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
        },
    ),
    "olmo3 no window": lambda: hf.Olmo3Config(**DENSE, intermediate_size=24, layer_types=["full_attention"] * L),
    "qwen3": lambda: hf.Qwen3Config(**DENSE, head_dim=d, intermediate_size=24),
    "qwen3 windows": lambda: hf.Qwen3Config(
        **DENSE, head_dim=d, intermediate_size=24, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
}
FIRST = list({name.split()[0]: name for name in reversed(CASES)}.values())[::-1]


@functools.cache
def randomized(case: str) -> hf.PreTrainedModel:
    """Weights large enough that every term is seen; norms and biases off their defaults."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(
        CASES[case](), dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    fill(model)
    return model.eval()  # of which routers that draw experts know


def fill(module: torch.nn.Module) -> None:
    """Random numbers in all parameters and buffers of a module."""
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if "inv_freq" not in name:
                is_scale = "norm" in name and not name.endswith("bias")
                tensor.normal_(mean=1.0 if is_scale else 0.0, std=0.2)


def tokens() -> np.ndarray:
    """The same ids [B, T] in every test."""
    return np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)


def save(model: hf.PreTrainedModel, directory: Path, modules: Sequence[torch.nn.Module] = ()) -> Path:
    """Saves a model, and modules of multi-token prediction as DeepSeek releases them: in layers behind the last."""
    model.save_pretrained(directory)
    if not modules:
        return directory
    network = load_file(directory / "model.safetensors")
    copies = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    further = {}
    for layer, module in enumerate(modules, model.config.num_hidden_layers):
        found = dict(_on_disk(module)) | {name: network[other].clone() for name, other in copies.items()}
        further |= {f"model.layers.{layer}.{name}": tensor.contiguous() for name, tensor in found.items()}
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    (directory / "model.safetensors").rename(directory / names[0])
    save_file(further, directory / names[1])
    index = {"weight_map": dict.fromkeys(network, names[0]) | dict.fromkeys(further, names[1])}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _on_disk(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a module under the names that released files have, each expert by itself."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        name = name.replace("post_norm.", "shared_head.norm.").removeprefix("mtp_block.")
        tensor = tensor.detach()
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                for part, half in zip(("gate", "up"), both.chunk(2)):
                    yield name.replace("gate_up_proj", f"{expert}.{part}_proj.weight"), half
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                yield name.replace("down_proj", f"{expert}.down_proj.weight"), down
        else:
            yield name, tensor


@contextlib.contextmanager
def gradients_in_place(*modules: torch.nn.Module) -> Iterator[None]:
    """While the block runs, every parameter holds its gradient."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    values = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    try:
        yield
    finally:
        for parameter, value in zip(parameters, values):
            parameter.data = value
