"""Pieces that families share: rows and keys of a decoder in the style of Llama."""

from frugalmoe.convert.contract import Key, Row

LAYER = "model.layers.{layer}."

KEYS = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "dim"),
    Key("num_hidden_layers", "num_layers"),
    Key("num_attention_heads", "num_heads"),
    Key("num_key_value_heads", "num_kv_heads", lambda keys: keys.integer("num_attention_heads")),
    Key("rms_norm_eps", "norm_eps"),
    Key("tie_word_embeddings", "tie_embeddings", False),
)
HEAD_DIM = Key(
    "head_dim", "head_dim", lambda keys: keys.integer("hidden_size") // max(keys.integer("num_attention_heads"), 1)
)
BIASES = (  # on all projections of attention, or on none
    Key("attention_bias", "qkv_bias", False),
    Key("attention_bias", "out_bias", False),
)
WIDTHS = (
    Key("intermediate_size", "dense_dim"),
    Key("moe_intermediate_size", "moe.expert_dim"),
)
DEEPSEEK = (  # of the families that route as DeepSeek-V3; `norm_topk_prob` and the number of dense layers differ
    *WIDTHS,
    Key("n_routed_experts", "moe.num_experts", also=("num_local_experts",)),
    Key("n_shared_experts", "moe.num_shared_experts", 0),
    Key("num_experts_per_tok", "moe.num_experts_per_token"),
    Key("n_group", "moe.options.num_groups", 1),
    Key("topk_group", "moe.options.groups_per_token", 1),
    Key("routed_scaling_factor", "moe.options.scale", 1.0),
)
FIXED = {"hidden_act": ("silu",)}

ENDS = (
    Row("model.embed_tokens.weight", "embed_VD"),
    Row("model.norm.weight", "final_norm/scale"),
    Row("lm_head.weight", "head_DV"),
)
TIED = {"lm_head.weight": "model.embed_tokens.weight"}  # a head of its own in the file, although it is tied
NORMS = (
    Row(LAYER + "input_layernorm.weight", "attention_norm/scale"),
    Row(LAYER + "post_attention_layernorm.weight", "ffn_norm/scale"),
)
NORMS_AFTER = (
    Row(LAYER + "post_attention_layernorm.weight", "attention_norm/scale"),
    Row(LAYER + "post_feedforward_layernorm.weight", "ffn_norm/scale"),
)
ATTENTION = (
    Row(LAYER + "self_attn.q_proj.weight", "attention/query_DHd"),
    Row(LAYER + "self_attn.k_proj.weight", "attention/key_Dhd"),
    Row(LAYER + "self_attn.v_proj.weight", "attention/value_Dhd"),
    Row(LAYER + "self_attn.o_proj.weight", "attention/out_HdD"),
    Row(LAYER + "self_attn.q_proj.bias", "attention/query_bias_Hd"),
    Row(LAYER + "self_attn.k_proj.bias", "attention/key_bias_hd"),
    Row(LAYER + "self_attn.v_proj.bias", "attention/value_bias_hd"),
    Row(LAYER + "self_attn.o_proj.bias", "attention/out_bias_D"),
    Row(LAYER + "self_attn.sinks", "attention/sink_H"),
    Row(LAYER + "self_attn.q_norm.weight", "attention/query_norm/scale"),
    Row(LAYER + "self_attn.k_norm.weight", "attention/key_norm/scale"),
)


def swiglu(theirs: str, ours: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> tuple:
    """Returns the rows of a dense feed-forward, below a layer."""
    gate, up, down = (f"{LAYER}{theirs}.{name}.weight" for name in names)
    return (
        Row(gate, f"{ours}/gate_up_D2F:0"),
        Row(up, f"{ours}/gate_up_D2F:1"),
        Row(down, f"{ours}/down_FD"),
    )


def experts(theirs: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> tuple:
    """Returns the rows of routed experts, a tensor for each, below a layer."""
    gate, up, down = (f"{LAYER}{theirs}.experts.{{expert}}.{name}.weight" for name in names)
    return (
        Row(gate, "moe/gate_up_ED2F:0"),
        Row(up, "moe/gate_up_ED2F:1"),
        Row(down, "moe/down_EFD"),
    )


BLOCKS = (*ENDS, *NORMS, *ATTENTION)
DENSE = swiglu("mlp", "ffn")
ROUTER = (Row(LAYER + "mlp.gate.weight", "moe/router/kernel_DE"),)
DEEPSEEK_FFN = (
    *DENSE,
    *ROUTER,
    Row(LAYER + "mlp.gate.e_score_correction_bias", "moe/router_state/bias_E"),
    *experts("mlp"),
    *swiglu("mlp.shared_experts", "moe/shared"),
)
