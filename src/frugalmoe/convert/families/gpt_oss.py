"""gpt-oss (OpenAI, 2508.10925): biases everywhere, sinks, a window in every other layer, experts with clamped SwiGLU.

Its experts keep gate and up side by side, unit by unit, ours one after the other; and inputs come first. Only weights
in 16 or 32 bits are read: released ones are in mxfp4, four bits, and `transformers` makes bfloat16 of them.

Letters: E experts, D model, F expert hidden.
"""

import numpy as np

from frugalmoe.convert import window
from frugalmoe.convert.contract import Family, Form, Key
from frugalmoe.convert.pairs import halves, pairs
from frugalmoe.convert.parts import BIASES, BLOCKS, FIXED, HEAD_DIM, KEYS, LAYER, TIED, Row
from frugalmoe.experts.activations import ALPHA, LIMIT
from frugalmoe.model import pattern
from frugalmoe.schema import Model

GATE_UP = Form(  # [E, D, 2 F]
    lambda tensor, model: (halves(np.swapaxes(tensor, 1, 2)),),
    lambda pieces, model: np.swapaxes(pairs(pieces[0]), 1, 2),
)
DOWN = Form(  # [E, F, D]
    lambda tensor, model: (np.swapaxes(tensor, 1, 2),),
    lambda pieces, model: np.swapaxes(pieces[0], 1, 2),
)


def _by_expert(flat: np.ndarray, model: Model) -> np.ndarray:
    return flat.reshape(model.moe.num_experts, -1)


GATE_UP_BIAS = Form(  # [E, 2 F]
    lambda tensor, model: (halves(tensor[..., None]).reshape(-1),),
    lambda pieces, model: pairs(_by_expert(pieces[0], model)[..., None])[..., 0],
)
DOWN_BIAS = Form(  # [E, D]
    lambda tensor, model: (tensor.reshape(-1),),
    lambda pieces, model: _by_expert(pieces[0], model),
)


def _ours(keys):
    types = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(keys.layers())]
    found = window.by_layer_ours(keys, types)
    keys.require("rope_parameters", ("rope_scaling",))  # where there are none, `transformers` stretches by 32
    kinds = pattern.attention_names(found["attention"])
    return found | {f"attention_options.{kind}.sinks": True for kind in kinds}


def _theirs(model: Model) -> dict:
    """`transformers` asks for a width, also where no layer has a window."""
    found = window.by_layer_theirs(model)
    return {"sliding_window": found["sliding_window"] or 128, "layer_types": found["layer_types"]}


FAMILY = Family(
    about="OpenAI: gpt-oss 20B, 120B, in 16 bits",
    architecture="GptOssForCausalLM",
    keys=(
        *KEYS,
        HEAD_DIM,
        *(key._replace(default=True) for key in BIASES),
        Key("intermediate_size", "moe.expert_dim"),
        Key("num_local_experts", "moe.num_experts", also=("num_experts",)),
        Key("num_experts_per_tok", "moe.num_experts_per_token", also=("experts_per_token",)),
    ),
    settings={
        "rope_theta": 150_000.0,
        "moe.router": "topk_softmax",
        "moe.options.softmax": "after",
        "moe.options.logit_bias": True,
        "moe.activation": "clamped_swiglu",
        "moe.expert_bias": True,
    },
    fixed={**FIXED, "swiglu_alpha": (ALPHA,), "swiglu_limit": (LIMIT,)},
    inert={"initial_context_length": "the same as original_max_position_embeddings"},
    more_ours=_ours,
    more_theirs=_theirs,
    rows=(
        *BLOCKS,
        Row(LAYER + "mlp.router.weight", "moe/router/kernel_DE"),
        Row(LAYER + "mlp.router.bias", "moe/router/bias_E"),
        Row(LAYER + "mlp.experts.gate_up_proj", "moe/gate_up_ED2F", GATE_UP),
        Row(LAYER + "mlp.experts.gate_up_proj_bias", "moe/gate_up_bias_E2F", GATE_UP_BIAS),
        Row(LAYER + "mlp.experts.down_proj", "moe/down_EFD", DOWN),
        Row(LAYER + "mlp.experts.down_proj_bias", "moe/down_bias_ED", DOWN_BIAS),
    ),
    same=TIED,
)
