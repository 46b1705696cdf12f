"""The text model of Llama 4 (Meta, 2025): most layers rotate and see their own chunk, the others see all and rotate
nothing; one expert and a shared one in every layer (Scout) or every other (Maverick).

It rotates channel 2 i with 2 i + 1, ours i with i + d / 2: queries and keys have their channels in another order.

Letters: E experts, D model, F expert hidden.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from frugalmoe.convert import dense
from frugalmoe.convert.contract import Family, Form, Key
from frugalmoe.convert.keys import Keys
from frugalmoe.convert.pairs import HEADS
from frugalmoe.convert.parts import ATTENTION, BIASES, ENDS, FIXED, HEAD_DIM, KEYS, LAYER, NORMS, TIED, Row, swiglu
from frugalmoe.model import pattern
from frugalmoe.model.attention.kinds import options_of
from frugalmoe.schema import Model

TURNED = Form(  # [E, D, 2 F] and [E, F, D]: inputs come first
    lambda tensor, model: (np.swapaxes(tensor, 1, 2),),
    lambda pieces, model: np.swapaxes(pieces[0], 1, 2),
)
ROTATED = re.compile(r"\.[qk]_proj\.")  # of the rows of attention
_CHUNKED, _WHOLE = "chunked_attention", "full_attention"
# (whether a layer rotates, what it sees) -> kind of attention.
_KINDS = {(1, _CHUNKED): "chunked", (1, _WHOLE): "grouped", (0, _WHOLE): "nope"}


def _flag(keys: Keys, name: str) -> bool:
    """True where the key is absent."""
    return keys.flag(name) if name in keys else True


def _list(keys: Keys, name: str, default: list) -> list:
    """An entry for each layer; an empty list is none."""
    value = keys.get(name) or default
    if not isinstance(value, list) or len(value) != keys.layers():
        raise keys.refused(name, value, f"must have an entry for each of the {keys.layers()} layers")
    return value


def _attention(keys: Keys) -> dict[str, Any]:
    """The kind of each layer, and their options."""
    interval = keys.integer("no_rope_layer_interval", 4)
    if not interval:
        raise keys.refused("no_rope_layer_interval", interval, "must be positive")
    rotates = _list(keys, "no_rope_layers", [int((n + 1) % interval != 0) for n in range(keys.layers())])
    types = _list(keys, "layer_types", [_CHUNKED if rotated else _WHOLE for rotated in rotates])
    kinds = []
    for rotated, name in zip(rotates, types):
        if type(rotated) not in (int, bool) or rotated not in (0, 1):
            raise keys.refused("no_rope_layers", rotated, "must be 1 for a layer that rotates, 0 for one that does not")
        if not isinstance(name, str) or (rotated, name) not in _KINDS:
            rule = f"is not implemented of a layer with no_rope_layers={rotated}"
            raise keys.refused("layer_types", name, rule)
        kinds.append(_KINDS[rotated, name])
    found: dict[str, Any] = {"attention": ",".join(kinds)}
    chunk, floor = keys.get("attention_chunk_size", 8192), keys.get("floor_scale", 8192)
    tuned, scale = _flag(keys, "attn_temperature_tuning"), keys.get("attn_scale", 0.1)
    if "chunked" in kinds:
        found["attention_options.chunked.chunk"] = chunk
    if "nope" in kinds:
        found |= {"attention_options.nope.temperature": scale if tuned else 0.0, "attention_options.nope.floor": floor}
    return found


def _sparse(keys: Keys) -> dict[str, int]:
    """Which layers have experts: `moe_layers`, else the last of each `interleave_moe_layer_step`."""
    layers, step = keys.layers(), keys.integer("interleave_moe_layer_step", 1)
    if not step:
        raise keys.refused("interleave_moe_layer_step", step, "must be positive")
    sparse = keys.get("moe_layers", list(range(step - 1, layers, step)))
    if not isinstance(sparse, list) or not all(type(layer) is int and 0 <= layer < layers for layer in sparse):
        raise keys.refused("moe_layers", sparse, f"must be a list of layers, from 0 to {layers - 1}")
    return dense.layers_ours(keys, sorted({*sparse}), "moe_layers", sparse)


def _ours(keys: Keys) -> dict[str, Any]:
    return {"qk_norm": "unit" if _flag(keys, "use_qk_norm") else "none", **_attention(keys), **_sparse(keys)}


def _theirs(model: Model) -> Mapping[str, Any]:
    """`transformers` asks for the size of chunks also where no layer has any."""
    names, kinds = {own: theirs for theirs, own in _KINDS.items()}, pattern.layers(model)
    both = [names.get(kind.attention, (1, kind.attention)) for kind in kinds]
    chunked, nope = (options_of(model, name) for name in ("chunked", "nope"))
    return {
        "no_rope_layers": [rotated for rotated, _ in both],
        "layer_types": [name for _, name in both],
        "attention_chunk_size": chunked.chunk if "chunked" in model.attention else 8192,
        "attn_temperature_tuning": nope.temperature != 0,
        "attn_scale": nope.temperature or 0.1,
        "floor_scale": nope.floor,
        "use_qk_norm": model.qk_norm == "unit",
        "moe_layers": pattern.moe_layers(model),
        "interleave_moe_layer_step": model.moe_every,
    }


FAMILY = Family(
    about="Meta: Llama 4 Scout, Maverick, of text",
    architecture="Llama4ForCausalLM",
    keys=(
        *KEYS,
        HEAD_DIM,
        *BIASES,
        Key("intermediate_size", "moe.expert_dim"),
        Key("intermediate_size_mlp", "dense_dim"),
        Key("num_local_experts", "moe.num_experts", also=("num_experts",)),
        Key("num_experts_per_tok", "moe.num_experts_per_token", 1),
    ),
    settings={"rope_theta": 500_000.0, "moe.router": "llama4", "moe.num_shared_experts": 1},
    fixed=FIXED,
    inert={"router_jitter_noise": "noise of training alone", "for_llm_compressor": "how weights are quantized"},
    more_ours=_ours,
    more_theirs=_theirs,
    rows=(
        *ENDS,
        *NORMS,
        *(row._replace(form=HEADS) if ROTATED.search(row.theirs) else row for row in ATTENTION),
        *swiglu("feed_forward", "ffn"),
        Row(LAYER + "feed_forward.router.weight", "moe/router/kernel_DE"),
        Row(LAYER + "feed_forward.experts.gate_up_proj", "moe/gate_up_ED2F", TURNED),
        Row(LAYER + "feed_forward.experts.down_proj", "moe/down_EFD", TURNED),
        *swiglu("feed_forward.shared_expert", "moe/shared"),
    ),
    same=TIED,
)
