"""DeepSeek-V3 (2412.19437): latent attention, sigmoid scores with a balance bias, modules that predict further ahead.

Its released weights rotate channel 2 i with 2 i + 1, ours i with i + r / 2: the rotated channels are put in another
order. The norms of its latents have an epsilon of 1e-6 always.

Letters: H heads, D model, P channels inside, n channels of a head without rotation, r with, e of its value.
"""

import numpy as np

from frugalmoe.convert.contract import Family, Form, Key
from frugalmoe.convert.further import COPIES, FURTHER
from frugalmoe.convert.pairs import halves, pairs
from frugalmoe.convert.parts import DEEPSEEK, DEEPSEEK_FFN, ENDS, FIXED, KEYS, LAYER, NORMS, TIED, Row
from frugalmoe.model.attention.kinds import options_of
from frugalmoe.model.attention.kinds.latent import Sizes, sizes
from frugalmoe.schema import Model

_LATENT = "attention_options.latent."


def _sizes(model: Model) -> Sizes:
    return sizes(model, options_of(model, "latent"))


def _turn_queries(tensor: np.ndarray, model: Model, turn) -> np.ndarray:
    heads = tensor.reshape(model.num_heads, -1, tensor.shape[-1])
    still = _sizes(model).still
    return np.concatenate([heads[:, :still], turn(heads[:, still:])], axis=1).reshape(tensor.shape)


QUERIES = Form(
    lambda tensor, model: (_turn_queries(tensor, model, halves),),
    lambda pieces, model: _turn_queries(pieces[0], model, pairs),
)


def _split_down(tensor: np.ndarray, model: Model) -> tuple[np.ndarray, np.ndarray]:
    rank = _sizes(model).rank
    return tensor[:rank], halves(tensor[rank:])


DOWN = Form(_split_down, lambda pieces, model: np.concatenate([pieces[0], pairs(pieces[1])]))


def _split_up(tensor: np.ndarray, model: Model) -> tuple[np.ndarray, np.ndarray]:
    still, width = _sizes(model).still, tensor.shape[-1]
    heads = tensor.reshape(model.num_heads, -1, width)
    return heads[:, :still].reshape(-1, width), heads[:, still:].reshape(-1, width)


def _join_up(pieces: tuple[np.ndarray, ...], model: Model) -> np.ndarray:
    width = pieces[0].shape[-1]
    heads = [piece.reshape(model.num_heads, -1, width) for piece in pieces]
    return np.concatenate(heads, axis=1).reshape(-1, width)


UP = Form(_split_up, _join_up)

SETTINGS = {"attention": "latent", _LATENT + "norm_eps": 1e-6}
ATTENTION = (
    Row(LAYER + "self_attn.q_proj.weight", "attention/query_DHd", QUERIES),
    Row(LAYER + "self_attn.q_a_proj.weight", "attention/query_down_DP"),
    Row(LAYER + "self_attn.q_a_layernorm.weight", "attention/query_norm/scale"),
    Row(LAYER + "self_attn.q_b_proj.weight", "attention/query_up_PHd", QUERIES),
    Row(
        LAYER + "self_attn.kv_a_proj_with_mqa.weight",
        ("attention/latent_DP", "attention/rotated_key_Dd"),
        DOWN,
    ),
    Row(LAYER + "self_attn.kv_a_layernorm.weight", "attention/latent_norm/scale"),
    Row(LAYER + "self_attn.kv_b_proj.weight", ("attention/key_PHd", "attention/value_PHd"), UP),
    Row(LAYER + "self_attn.o_proj.weight", "attention/out_HdD"),
)


def _ours(keys):
    """What only has to agree with what stands elsewhere."""
    heads, rotated = keys.integer("num_attention_heads"), keys.integer("qk_rope_head_dim")
    keys.fix("num_key_value_heads", (heads,))
    keys.fix("head_dim", (rotated,))
    keys.fix("qk_head_dim", (rotated + keys.integer("qk_nope_head_dim"),))
    return {}


def _theirs(model):
    size = _sizes(model)
    rest = {"qk_rope_head_dim": size.rotated, "v_head_dim": size.value, "kv_lora_rank": size.rank}
    return rest | {"q_lora_rank": size.query_rank or None, "num_key_value_heads": model.num_heads}


FAMILY = Family(
    about="DeepSeek-AI: DeepSeek-V3, R1",
    architecture="DeepseekV3ForCausalLM",
    keys=(
        *KEYS,
        Key("qk_nope_head_dim", "head_dim"),
        Key("qk_rope_head_dim", _LATENT + "rotary_dim"),
        Key("v_head_dim", _LATENT + "value_dim"),
        Key("kv_lora_rank", _LATENT + "rank"),
        Key("q_lora_rank", _LATENT + "query_rank", 0),
        *DEEPSEEK,
        Key("first_k_dense_replace", "num_dense_layers", 3),
        Key("norm_topk_prob", "moe.options.renormalize", True),
    ),
    settings={**SETTINGS, "moe.router": "sigmoid_bias"},
    fixed={
        **FIXED,
        "attention_bias": (False,),
        "rope_interleave": (True,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "moe_layer_freq": (1,),
    },
    inert={
        "num_nextn_predict_layers": "the files say it themselves",
        "num_mtp_layers": "the same, by another name",
        "pretraining_tp": "how it was trained",
        "ep_size": "how it is served",
        "seq_aux": "a loss of training",
        "aux_loss_alpha": "its coefficient",
    },
    more_ours=_ours,
    more_theirs=_theirs,
    rows=(*ENDS, *NORMS, *ATTENTION, *DEEPSEEK_FFN, *FURTHER),
    same={**TIED, **COPIES},
)
