"""FlexOlmo (2507.07024): experts of OLMoE in the blocks of OLMo 2."""

import dataclasses

from frugalmoe.convert.contract import Family
from frugalmoe.convert.families import olmo2, olmoe
from frugalmoe.convert.parts import ATTENTION, ENDS, NORMS_AFTER, ROUTER, experts

FAMILY: Family = dataclasses.replace(
    olmoe.FAMILY,
    about="Ai2: FlexOlmo 7x7B",
    architecture="FlexOlmoForCausalLM",
    keys=tuple(key for key in olmoe.FAMILY.keys if key.theirs != "clip_qkv"),
    settings={**olmoe.FAMILY.settings, **olmo2.FAMILY.settings, "rope_theta": 500_000.0},
    fixed=olmo2.FAMILY.fixed,
    more_theirs=lambda model: {},
    rows=(*ENDS, *NORMS_AFTER, *ATTENTION, *ROUTER, *experts("mlp")),
)
