"""DeepSeek-V2 (2405.04434): the attention of DeepSeek-V3, softmax over all experts, in the groups of the best."""

import dataclasses

from frugalmoe.convert.contract import Family
from frugalmoe.convert.families import deepseek_v3
from frugalmoe.convert.keys import Keys
from frugalmoe.schema import Model

_GROUPS = ("moe.options.num_groups", "moe.options.groups_per_token", "moe.options.renormalize")


def _ours(keys: Keys) -> dict:
    method = keys.get("topk_method", "greedy")
    keys.fix("topk_method", ("greedy", "group_limited_greedy"))
    groups, chosen = keys.integer("n_group", 1), keys.integer("topk_group", 1)
    limited = {"moe.options.num_groups": groups, "moe.options.groups_per_token": chosen}
    return {**deepseek_v3.FAMILY.more_ours(keys), **(limited if method != "greedy" else {})}


def _theirs(model: Model) -> dict:
    options = model.moe.options
    groups = {"n_group": getattr(options, "num_groups", 1), "topk_group": getattr(options, "groups_per_token", 1)}
    method = {"topk_method": "greedy" if groups["n_group"] == 1 else "group_limited_greedy"}
    return {**deepseek_v3.FAMILY.more_theirs(model), **groups, **method}


FAMILY: Family = dataclasses.replace(
    deepseek_v3.FAMILY,
    about="DeepSeek-AI: DeepSeek-V2, V2-Lite",
    architecture="DeepseekV2ForCausalLM",
    keys=tuple(
        key._replace(default=0) if key.theirs == "first_k_dense_replace" else key
        for key in deepseek_v3.FAMILY.keys
        if key.ours not in _GROUPS
    ),
    settings={**deepseek_v3.SETTINGS, "moe.router": "topk_softmax", "moe.options.renormalize": False},
    fixed={
        **{name: values for name, values in deepseek_v3.FAMILY.fixed.items() if name != "topk_method"},
        "mlp_bias": (False,),
        "norm_topk_prob": (False,),
        "scoring_func": ("softmax",),
    },
    more_ours=_ours,
    more_theirs=_theirs,
)
