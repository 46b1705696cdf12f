"""Ling 1 (2503.05139): softmax over all experts, and NormHead. Granite-MoE with shared experts is the same model under
other names, but for NormHead.

Names and meanings as in its published code, github.com/inclusionAI/Ling, models/modeling_bailing_moe.py.
"""

from frugalmoe.convert.bailing import BLOCKS, FIXED, INERT, KEYS
from frugalmoe.convert.contract import Family, Key
from frugalmoe.convert.parts import DENSE, ROUTER, experts, swiglu

FAMILY = Family(
    about="inclusionAI: Ling-lite, Ling-plus, Ling-lite 1.5",
    architecture="BailingMoeForCausalLM",
    keys=(
        *KEYS,
        Key("norm_head", "norm_head", False),
        Key("norm_topk_prob", "moe.options.renormalize", True),
    ),
    settings={"moe.router": "topk_softmax"},
    fixed={**FIXED, "use_sliding_window": (False,), "norm_softmax": (False,)},
    inert={**INERT, "sliding_window": "off", "max_window_layers": "off"},
    rows=(*BLOCKS, *DENSE, *ROUTER, *experts("mlp"), *swiglu("mlp.shared_experts", "moe/shared")),
)
