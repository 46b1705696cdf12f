"""GLM-4.5 (2508.06471): grouped attention, half of each head rotated, routed as DeepSeek-V3. Ling 2.0 is the same model
under other names.
"""

from frugalmoe.convert.contract import Family, Key
from frugalmoe.convert.further import COPIES, FURTHER
from frugalmoe.convert.parts import BLOCKS, DEEPSEEK, DEEPSEEK_FFN, FIXED, HEAD_DIM, KEYS, TIED

FAMILY = Family(
    about="Zhipu AI: GLM-4.5, 4.6",
    architecture="Glm4MoeForCausalLM",
    keys=(
        *KEYS,
        HEAD_DIM,
        Key("attention_bias", "qkv_bias", False),
        *DEEPSEEK,
        Key("first_k_dense_replace", "num_dense_layers", 1),
        Key("norm_topk_prob", "moe.options.renormalize", True),
    ),
    settings={"rope_fraction": 0.5, "moe.router": "sigmoid_bias"},
    fixed=FIXED,
    inert={
        "num_nextn_predict_layers": "the files say it themselves",
        "num_mtp_layers": "the same, by another name",
    },
    more_ours=lambda keys: {"qk_norm": "head" if keys.flag("use_qk_norm") else "none"},
    more_theirs=lambda model: {"use_qk_norm": model.qk_norm == "head"},
    rows=(*BLOCKS, *DEEPSEEK_FFN, *FURTHER),
    same={**TIED, **COPIES},
)
