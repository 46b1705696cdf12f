"""The learned routers of `transformers` beside ours: what each computes, and both on the same logits.

Letters: N tokens, D model, E experts, X choices, K choices of a token, G groups of experts.
"""

import dataclasses
import functools
import importlib
import inspect
import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import conftest  # noqa: F401  its environment of JAX, for the command too
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers as hf
from torch.nn.functional import softplus

from frugalmoe.routing import strategies
from frugalmoe.routing.contract import Inputs, arrays, combine_matrix, selection_matrix
from frugalmoe.schema import MoE

E, K, Z = 16, 3, 4
MODELS = Path(hf.__file__).parent / "models"
_ROUTERS = re.compile(r"^class (\w+(?:Router|Gate|Gating|CDMoE))\b.*?(?=^\S|\Z)", re.M | re.S)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k", "top_k_experts")
_OF_EXPERTS = re.compile(r"num_(local_|moe_)?experts|n_routed_experts")


@functools.cache
def found() -> dict[str, str]:
    """Class -> family of every learned router in the source of the installed `transformers`."""
    routers = {}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if "xpert" in source:
            routers |= {m[1]: path.parent.name for m in _ROUTERS.finditer(source) if _OF_EXPERTS.search(m[0])}
    return routers


class Key(str):
    """An option of ours that is a key of their config."""


class Logits(NamedTuple):
    """What both are given: the logits [N, X], made by a kernel that is the identity, and a bias [X]."""

    logits_NX: np.ndarray
    bias_X: np.ndarray


class Decision(NamedTuple):
    chosen_NX: np.ndarray  # bool
    weight_NX: np.ndarray  # float32, 0 where not chosen


Score = Callable[[torch.Tensor, torch.Tensor, SimpleNamespace], torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """How some families route: in words, in ours, and what the test needs to know."""

    score: str
    bias: str = ""
    groups: str = ""
    weights: str
    strategy: str = ""  # of ours
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the strategy; `Key` where theirs says it
    note: str = ""
    settings: tuple[Mapping[str, Any], ...] = ({},)  # of their config, for the test
    compared: Score = lambda z, b, c: z  # the K largest of it are chosen
    best: int = 0  # a group's score is the sum of so many
    closed: float = -np.inf  # what stands for experts of other groups
    k: int = K
    experts: int = E
    others: int = 0  # choices that are no experts
    call: Callable[..., Decision] | None = None  # where a module is not called as most are
    more: Callable[..., Decision] | None = None  # where our decision is more than the plan
    in_layers: bool = False  # one layer's decision needs those before: held to by a test of its own
    kernel: float = 1.0  # what our kernel is times the identity
    low: float = -100.0  # logits of this size alone; further down float32 has no digits of theirs
    cell: str = ""  # of the option that is a number for K alone

    def ours(self) -> str:
        """The strategy and its options for the page."""
        named = {"scale": self.cell} if self.cell else {}
        said = [f"{name}={value}" for name, value in (self.options | named).items()]
        return f"`{self.strategy}`" + (f": {', '.join(said)}" if said else "")


def softmax(z, b, c):
    return torch.softmax(z, -1)


def softmax_and_bias(z, b, c):
    return torch.softmax(z, -1) + b


def sigmoid_and_bias(z, b, c):
    return torch.sigmoid(z) + b


def _capped(z, cap):
    return cap * torch.tanh(z / cap) if cap else z


def score_fn(z, b, c):
    return (softplus(z).sqrt() if c.scoring_func == "sqrtsoftplus" else torch.sigmoid(z)) + b


GROUPS = {"num_groups": Key("n_group"), "groups_per_token": Key("topk_group")}
SCALE, RENORMALIZE = {"scale": Key("routed_scaling_factor")}, {"renormalize": Key("norm_topk_prob")}
OF_GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
EITHER = ({"norm_topk_prob": True}, {"norm_topk_prob": False})
OVER_SUM, PLAIN = "over their sum", "as they are"
TINY, FIXED_BIAS = {"epsilon": 1e-20}, {"update_rate": 0}


def variant(form: Form, **changes: Any) -> Form:
    return dataclasses.replace(form, **changes)


DEEPSEEK_V3 = Form(
    score="sigmoid",
    bias="on scores",
    groups="two best, others -inf",
    weights="over their sum + 1e-20, or as they are; x scale",
    strategy="sigmoid_bias",
    options={**GROUPS, **RENORMALIZE, **SCALE, **TINY},
    settings=(
        OF_GROUPS | {"norm_topk_prob": True},
        {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 2.5},
    ),
    compared=sigmoid_and_bias,
    best=2,
)
SIGMOID = variant(
    DEEPSEEK_V3,
    groups="",
    weights="over their sum + 1e-20; x scale",
    options={"scale": Key("router_scaling_factor"), **TINY},
    settings=({"router_scaling_factor": 2.5},),
    best=0,
)
SOFTMAX = Form(
    score="softmax",
    weights=f"{OVER_SUM}, or {PLAIN}",
    strategy="topk_softmax",
    options=RENORMALIZE,
    settings=EITHER,
    compared=softmax,
)
RENORMALIZED = variant(SOFTMAX, weights=OVER_SUM, options={}, settings=({},))
CHOSEN = variant(
    RENORMALIZED, weights="softmax over the chosen", options={"softmax": "after"}, compared=lambda z, b, c: z
)
BIASED = variant(
    CHOSEN,
    bias="learned, on logits",
    options={"softmax": "after", "logit_bias": True},
    compared=lambda z, b, c: z + b,
)
MISTRAL = Form(
    score="softmax",
    groups="two best, others 0",
    weights="over their sum + 1e-20, or as they are; x scale",
    strategy="sigmoid_bias",
    options={"score": "softmax", **GROUPS, **RENORMALIZE, **SCALE, **TINY, **FIXED_BIAS},
    settings=tuple(OF_GROUPS | norm for norm in EITHER),
    compared=softmax,
    best=2,
    closed=0.0,
)

# How a module is called that is not called as most are.


def _dense(experts_NK: torch.Tensor, weights_NK: torch.Tensor, choices: int) -> Decision:
    experts_NK, weights_NK = experts_NK.reshape(len(experts_NK), -1), weights_NK.reshape(len(weights_NK), -1)
    weight_NX = torch.zeros(len(experts_NK), choices).scatter(1, experts_NK, weights_NK.float())
    chosen_NX = torch.zeros(len(experts_NK), choices).scatter(1, experts_NK, torch.ones(experts_NK.shape))
    return Decision(chosen_NX.numpy() > 0, weight_NX.numpy())


def call_dbrx(module, x_ND, bias_X, config):
    experts = vars(importlib.import_module(type(module).__module__))["DbrxFFN"]
    weights, chosen = experts.route_tokens_to_experts(config, module(x_ND))
    return _dense(chosen, weights, E)


def call_jetmoe(module, x_ND, bias_X, config):
    """It gives the slots sorted by expert: slot s is of token s // K."""
    order, _, gates, counts, _ = module(x_ND)
    expert, k = torch.repeat_interleave(torch.arange(E), torch.tensor(counts)), config.top_k
    slot_experts, slot_gates = torch.empty_like(order), torch.empty_like(gates)
    slot_experts[order], slot_gates[order] = expert, gates
    return _dense(slot_experts.reshape(-1, k), slot_gates.reshape(-1, k), E)


def call_llama4(module, x_ND, bias_X, config):
    """The weight stands for the scale of the expert's input."""
    scores, logits = module(x_ND)
    return _dense(logits.topk(config.num_experts_per_tok, -1)[1], scores.max(-1, keepdim=True)[0], E)


def more_llama4(routing, config, x_ND):
    chosen = np.asarray(selection_matrix(routing.plan, len(x_ND), E))
    return Decision(chosen, chosen * np.asarray(routing.input_scale_BT).reshape(-1, 1))


def call_switch(module, x_ND, bias_X, config):
    one_hot, probs, _ = module(x_ND[None])
    return _dense(one_hot[0].argmax(-1, keepdim=True), probs[0], E)


def call_nllb(module, x_ND, bias_X, config):
    _, probs, logits = module(x_ND.clone())
    first = logits.argmax(-1, keepdim=True)
    experts_NK = torch.cat([first, logits.scatter(1, first, -torch.inf).argmax(-1, keepdim=True)], dim=1)
    return _dense(experts_NK, probs.gather(1, experts_NK), E)


def more_longcat(routing, config, x_NX):
    """What is added is the input times the weights of all identity choices: their sum stands in a further column."""
    n = len(x_NX)
    weight_NE, chosen_NE = (np.asarray(f(routing.plan, n, E)) for f in (combine_matrix, selection_matrix))
    added_NX = np.asarray(routing.added_BTD).reshape(n, -1)
    share_N1 = (added_NX * x_NX).sum(-1, keepdims=True) / np.square(x_NX).sum(-1, keepdims=True)
    return Decision(chosen_NE, np.concatenate([weight_NE, share_N1], axis=1))


def call_longcat(module, x_NX, bias_X, config):
    _, weights_NK, experts_NK = module(x_NX)
    chosen_NX, weight_NX = _dense(experts_NK, weights_NK, E + Z)
    return Decision(chosen_NX[:, :E], np.concatenate([weight_NX[:, :E], weight_NX[:, E:].sum(1, keepdims=True)], 1))


def call_inkling(module, x_NE, bias_E, config):
    """Its learned scale is 1/2 here, as `theirs` sets it."""
    _, weights_NK, experts_NK, shared = module(x_NE)
    every = torch.arange(E, E + shared.shape[1]).expand(shared.shape)
    return _dense(torch.cat([experts_NK, every], 1), torch.cat([weights_NK, shared], 1), E + shared.shape[1])


FORMS = {
    "deepseek_v3": DEEPSEEK_V3,
    "axk2": variant(
        DEEPSEEK_V3,
        groups="none, or two best, others 0",
        options={**DEEPSEEK_V3.options, "group_mask": "zero"},
        closed=0.0,
    ),
    "beam": variant(
        DEEPSEEK_V3,
        weights="over their sum + 1e-20, or as they are",
        options={**GROUPS, **RENORMALIZE, **TINY},
        note="the layer scales the sum of the experts, as `scale` does here",
    ),
    "sigmoid": SIGMOID,
    "afmoe": variant(SIGMOID, options={"scale": Key("route_scale"), **TINY}, settings=({"route_scale": 2.5},)),
    "nemotron_h": variant(
        DEEPSEEK_V3, note="experts in a smaller space, where there is moe_latent_size, are no matter of routing"
    ),
    "muse_spark": variant(
        SIGMOID,
        score="sigmoid of logits x multiplier",
        weights="over their sum + 1e-15; x scale",
        options={**SCALE, "epsilon": 1e-15},
        settings=({"output_multiplier": 0.25, "routed_scaling_factor": 2.5},),
        kernel=0.25,
        compared=lambda z, b, c: torch.sigmoid(c.output_multiplier * z) + b,
        note="the multiplier in the gate's kernel; its experts work in a smaller space, which is no matter of routing",
    ),
    "lfm2_moe": variant(
        SIGMOID,
        bias="on scores, or none",
        weights="over their sum + 1e-6, or as they are; x scale",
        options={**RENORMALIZE, **SCALE, "epsilon": 1e-6},
        settings=tuple(norm | {"routed_scaling_factor": 2.5, "use_expert_bias": True} for norm in EITHER),
    ),
    "minimax_m2": variant(
        SIGMOID,
        weights=OVER_SUM,
        options={},
        settings=({},),
        note="a scale of the sum of experts, where there is one, is `scale` here",
    ),
    "laguna": variant(
        SIGMOID,
        score="sigmoid of capped logits, c tanh(z / c)",
        weights=OVER_SUM,
        options={"softcap": Key("moe_router_logit_softcapping")},
        settings=({"moe_router_logit_softcapping": 5.0}, {"moe_router_logit_softcapping": 0.0}),
        compared=lambda z, b, c: torch.sigmoid(_capped(z, c.moe_router_logit_softcapping)) + b,
        note="`scale`=moe_routed_scaling_factor; without the option that scales the input of the experts",
    ),
    "kolibri1": variant(
        SIGMOID,
        bias="on logits",
        weights=f"{OVER_SUM}, or {PLAIN}",
        options={**RENORMALIZE, "bias_on": "logit"},
        settings=EITHER,
        compared=lambda z, b, c: z + b,
    ),
    "cohere2_moe": variant(
        CHOSEN,
        settings=({"expert_selection_fn": "softmax", "norm_topk_prob": True},),
        note="with expert_selection_fn=softmax",
    ),
    "cohere2_moe_sigmoid": variant(
        SIGMOID,
        bias="",
        weights=f"{OVER_SUM}, or {PLAIN}",
        options={**RENORMALIZE, "bias_on": "logit", **FIXED_BIAS},
        settings=tuple(norm | {"expert_selection_fn": "sigmoid"} for norm in EITHER),
        compared=lambda z, b, c: z,
        note="with expert_selection_fn=sigmoid",
    ),
    "flint": variant(
        SIGMOID,
        bias="",
        weights=f"{OVER_SUM}, or {PLAIN}",
        options={**RENORMALIZE, **FIXED_BIAS},
        settings=EITHER,
        compared=lambda z, b, c: torch.sigmoid(z),
    ),
    "deepseek_v4": variant(
        SIGMOID,
        score="sqrt(softplus) or sigmoid",
        options={"score": Key("scoring_func"), **SCALE, **TINY},
        settings=tuple({"scoring_func": name, "routed_scaling_factor": 1.5} for name in ("sqrtsoftplus", "sigmoid")),
        low=-80.0,
        compared=score_fn,
    ),
    "ernie": variant(
        SOFTMAX,
        bias="on scores",
        weights="over their sum, of 1e-12 at least",
        strategy="sigmoid_bias",
        options={"score": "softmax", "least_sum": Key("moe_norm_min")},
        settings=({"moe_norm_min": 1e-12, "moe_layer_start_index": 0, "moe_layer_end_index": 0},),
        compared=softmax_and_bias,
    ),
    "softmax": SOFTMAX,
    "renormalized": RENORMALIZED,
    "jamba": variant(RENORMALIZED, weights=PLAIN, options={"renormalize": False}),
    "chosen": CHOSEN,
    "gpt_oss": BIASED,
    "privacy_filter": variant(
        BIASED,
        weights="softmax over the chosen / k",
        options={"softmax": "after", "logit_bias": True, "scale": 1 / K},
        cell="1 / k",
    ),
    "jetmoe": variant(CHOSEN, call=call_jetmoe, note="its attention, which routes too, is not ours"),
    "dbrx": variant(
        SOFTMAX,
        weights="over their p-norm, or as they are",
        options={"renormalize": Key("moe_normalize_expert_weights")},
        settings=tuple({"moe_normalize_expert_weights": p, "moe_jitter_eps": None} for p in (1.0, None)),
        call=call_dbrx,
        note="p = 1 alone, as released",
    ),
    "mistral": MISTRAL,
    "mistral_large": variant(
        MISTRAL,
        weights="over their sum + 1e-20; x scale",
        options={"score": "softmax", **GROUPS, **SCALE, **TINY, **FIXED_BIAS},
        settings=(OF_GROUPS,),
    ),
    "deepseek_v2": variant(
        SOFTMAX,
        groups="best one, others 0",
        weights="as they are; x scale",
        options={"renormalize": False, **GROUPS, **SCALE},
        settings=(
            OF_GROUPS | {"topk_method": "group_limited_greedy"},
            {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 3.0},
        ),
        best=1,
        closed=0.0,
    ),
    "llama4": Form(
        score="sigmoid",
        weights="1; the score scales the expert's input",
        strategy="llama4",
        note="one expert per token alone, as released",
        call=call_llama4,
        more=more_llama4,
        k=1,
    ),
    "switch": Form(
        score="softmax",
        weights=PLAIN,
        strategy="switch_top1",
        note="its limit per expert is `executor=capacity` here",
        settings=(
            {
                "expert_capacity": 1000,
                "router_bias": False,
                "router_jitter_noise": 0.0,
                "router_dtype": "float32",
                "router_ignore_padding_tokens": False,
            },
        ),
        compared=softmax,
        call=call_switch,
        k=1,
    ),
    "nllb": variant(
        RENORMALIZED,
        note="in evaluation, where no expert is full; a limit per expert is `executor=capacity` here",
        settings=(
            dict(
                expert_capacity=1000,
                router_bias=False,
                router_dtype="float32",
                router_ignore_padding_tokens=False,
                second_expert_policy="all",
                normalize_router_prob_before_dropping=True,
                batch_prioritized_routing=False,
                moe_eval_capacity_token_fraction=1.0,
            ),
        ),
        compared=lambda z, b, c: z,
        call=call_nllb,
        k=2,
    ),
    "phimoe": Form(
        score="softmax of those near the largest, slot by slot",
        weights=PLAIN,
        strategy="sparsemixer",
        options={"epsilon": Key("router_jitter_noise")},
        settings=({"router_jitter_noise": 0.01, "input_jitter_noise": 0.0},),
        k=2,
    ),
    "deepseek_v4_hash": Form(
        score="sqrt(softplus) or sigmoid",
        weights="over their sum + 1e-20; x scale",
        note="experts by a table of token ids; `sigmoid_bias` with hash_layers has a hash in its place, not a table",
    ),
    "longcat": Form(
        score="softmax, of experts and identity choices",
        bias="on scores",
        weights="as they are; x scale",
        strategy="longcat",
        options={"num_identity": Key("zero_expert_num"), **SCALE},
        note="of the biases, those of identity choices stay 0 here",
        settings=({"zero_expert_num": Z, "routed_scaling_factor": 6.0, "router_bias": False},),
        compared=softmax_and_bias,
        others=Z,
        call=call_longcat,
        more=more_longcat,
    ),
    "gemma4": Form(
        score="softmax, of the normalised input",
        weights="over their sum; x a learned scale per expert",
        strategy="gemma4",
        settings=({"rms_norm_eps": 1e-6},),
        compared=lambda z, b, c: z / z.square().sum(-1, keepdim=True).sqrt() * torch.linspace(0.5, 1.5, z.shape[-1]),
        note="the gate sees what its experts see, not the stream before their norm",
    ),
    "inkling": variant(
        SIGMOID,
        score="sigmoid, shared experts too",
        weights="over their sum with the shared; x scale x a learned scale",
        options={"shared": Key("n_shared_experts"), "scale": Key("both_scales")},
        cell="route_scale x global_scale",
        note="shared experts are experts that every token has",
        settings=(
            dict(n_routed_experts=E, n_shared_experts=2, num_experts_per_tok=K, route_scale=8.0, both_scales=4.0),
        ),
        experts=E + 2,
        k=K + 2,
        compared=lambda z, b, c: torch.sigmoid(z) + b + 1e3 * (torch.arange(E + 2) >= E),
        call=call_inkling,
    ),
    "zaya": Form(
        score="softmax of an MLP over the layers, of experts and a skip choice",
        bias="on scores",
        weights=PLAIN,
        strategy="zaya",
        options={"hidden": Key("router_hidden_size"), "norm_eps": Key("rms_norm_eps")},
        in_layers=True,
    ),
    "doge": Form(
        score="sum of two softmaxed halves (product keys)",
        weights="softmax over the chosen",
        note="thousands of experts of one neuron each, and a token's choice depends on later ones: no experts of ours",
    ),
}

ROUTERS = {
    "deepseek_v3": """AXK1TopkRouter BailingHybridTopkRouter DeepseekV3TopkRouter DeepseekV32TopkRouter Dots1TopkRouter
        Dots3NoteTextTopkRouter ExaoneMoeTopkRouter Glm4MoeTopkRouter Glm4MoeLiteTopkRouter Glm4vMoeTextTopkRouter
        Glm5NextTextTopkRouter GlmMoeDsaTopkRouter HYV4TopkRouter KimiLinearTopkRouter MiMoV2FlashTopkRouter
        SolarOpenTopkRouter""",
    "nemotron_h": "NemotronHTopkRouter",
    "beam": "BeamTopKRouter",
    "sigmoid": "Dots3NoteVisionTopKRouter HYV3TopKRouter",
    "afmoe": "AfmoeTokenChoiceRouter",
    "minimax_m2": "MiniMaxM2TopKRouter MiniMaxM3VLTopKRouter Step3p7TopKRouter",
    "flint": "FlintTopKRouter",
    "deepseek_v4": "DeepseekV4TopKRouter Inkling2TopKRouter",
    "softmax": """FlexOlmoTopKRouter MellumTopKRouter OlmoeTopKRouter Qwen2MoeTopKRouter Qwen3MoeTopKRouter
        Qwen3NextTopKRouter Qwen3OmniMoeThinkerTextTopKRouter Qwen3OmniMoeTalkerTextTopKRouter
        Qwen4ExpTextTopKRouter""",
    "renormalized": """HunYuanMoEV1Gate MiniMaxTopKRouter MixtralTopKRouter Qwen3_5MoeTopKRouter
        Qwen3VLMoeTextTopKRouter Qwen3OmniMoeTextTopKRouter""",
    "jamba": "JambaTopKRouter",
    "chosen": """AriaTextTopKRouter GraniteMoeTopKRouter GraniteMoeSWATopKRouter GraniteMoeHybridTopKRouter
        GraniteMoeSharedTopKRouter""",
    "jetmoe": "JetMoeTopKGating",
    "dbrx": "DbrxRouter",
    "axk2": "AXK2TopkRouter",
    "muse_spark": "MuseSparkTopkRouter",
    "lfm2_moe": "Lfm2MoeTopKRouter",
    "laguna": "LagunaTopKRouter",
    "kolibri1": "Kolibri1TopKRouter",
    "cohere2_moe": "Cohere2MoeTopKRouter",
    "cohere2_moe_sigmoid": "Cohere2MoeTopKRouter",
    "ernie": "Ernie4_5_MoeTopKRouter Ernie4_5_VLMoeMoeTopKRouter",
    "gpt_oss": "GptOssTopKRouter",
    "privacy_filter": "OpenAIPrivacyFilterTopKRouter",
    "longcat": "LongcatFlashTopkRouter",
    "gemma4": "Gemma4TextRouter DiffusionGemmaTextRouter",
    "inkling": "InklingTopkRouter",
    "zaya": "ZayaRouter",
    "mistral": "Mistral4TopkRouter",
    "mistral_large": "MistralLarge4TextTopkRouter",
    "deepseek_v2": "DeepseekOcr2TextTopkRouter DeepseekV2TopkRouter UnlimitedOcrTextTopkRouter",
    "llama4": "Llama4Router",
    "switch": "SwitchTransformersTop1Router",
    "nllb": "NllbMoeTop2Router",
    "phimoe": "PhimoeTopKRouter",
    "deepseek_v4_hash": "DeepseekV4HashRouter",
    "doge": "DogeCDMoE",
}
PAIRS = [(form, name) for form, names in ROUTERS.items() for name in names.split()]


def theirs(form: Form, name: str, settings: Mapping[str, Any], given: Logits) -> Decision:
    """What the module of this class decides, in evaluation."""
    choices = form.experts + form.others
    config = _config(form, settings)
    module = _made(_class(name), config).eval()
    bias_X = torch.from_numpy(given.bias_X)
    with torch.no_grad():
        for name, parameter in [*module.named_parameters(), *module.named_buffers()]:
            if parameter.shape == (choices, choices):
                parameter.copy_(torch.eye(choices))
            elif "bias" in name:
                parameter.copy_(bias_X[: parameter.numel()].reshape(parameter.shape))
            elif name.endswith("scale"):
                parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()).reshape(parameter.shape))
        x_ND = torch.from_numpy(given.logits_NX)
        if form.call:
            return form.call(module, x_ND, bias_X, config)
        given_too = (bias_X,) if len(inspect.signature(module.forward).parameters) > 1 else ()
        try:
            _, weights_NK, experts_NK = module(x_ND, *given_too)[:3]
        except ValueError:  # of those that unpack three axes
            _, weights_NK, experts_NK = module(x_ND[None], *given_too)[:3]
        return _dense(experts_NK, weights_NK, choices)


def _class(name: str) -> type:
    family = found()[name]
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


def _config(form: Form, settings: Mapping[str, Any]) -> SimpleNamespace:
    """A config with every name that families have for the numbers of experts and choices."""
    numbers = dict.fromkeys(_EXPERTS, form.experts) | dict.fromkeys(_TOP, form.k)
    return SimpleNamespace(**{"hidden_size": form.experts + form.others, **numbers, **settings})


def _made(cls: type, config: SimpleNamespace) -> torch.nn.Module:
    names = list(inspect.signature(cls.__init__).parameters)[1:]
    if names[0] != "config":
        return cls(config.hidden_size, config.num_experts, config.top_k)
    return cls(config, *([0] if "layer_idx" in names and cls.__name__ != "HunYuanMoEV1Gate" else []))


def ours(form: Form, settings: Mapping[str, Any], given: Logits) -> Decision:
    """What our strategy decides, in evaluation."""
    router, width = strategies.get(form.strategy), given.logits_NX.shape[1]
    config = _our_config(form, settings)
    assert router.check(config) is None
    made = arrays(router.new_params(jax.random.key(0), width, config))
    bias = {"bias_E": jnp.asarray(given.bias_X[: form.experts])}
    params = {name: _ours_is(name, p, form, bias) for name, p in made.items()}
    begun = router.init_state(width, config)
    state = {n: jnp.where(s > 0, s, bias.get(n, s)) for n, s in begun.items()}  # what begins high stays
    n, zeros = len(given.logits_NX), jnp.zeros((1, len(given.logits_NX)), jnp.int32)
    inputs = Inputs(
        jnp.asarray(given.logits_NX)[None],
        zeros,
        zeros + 1,
        jnp.arange(n, dtype=jnp.int32)[None],
        jax.random.split(jax.random.key(0), 1),
        jnp.int32(0),
        jnp.int32(0),
        carry=router.init_carry(config, 1, n),
    )
    routing = router.route(params, state, inputs, config)
    if form.more:
        return form.more(routing, config, given.logits_NX)
    return Decision(*(np.asarray(f(routing.plan, n, form.experts)) for f in (selection_matrix, combine_matrix)))


def _ours_is(name: str, made: jax.Array, form: Form, bias: Mapping[str, jax.Array]) -> jax.Array:
    """A parameter as `theirs` sets its own."""
    if name.startswith("kernel"):
        return form.kernel * jnp.eye(*made.shape)
    return jnp.linspace(0.5, 1.5, made.size) if "scale" in name else bias.get(name, made)


_OUR_VALUES = {"sqrtsoftplus": "sqrt_softplus"}


def _our_config(form: Form, settings: Mapping[str, Any]) -> MoE:
    def value(v: Any) -> Any:
        said = settings[v] if isinstance(v, Key) else v
        return _OUR_VALUES.get(said, said) if isinstance(said, str) else said

    options = {name: value(v) for name, v in form.options.items()}
    if "renormalize" in options:
        options["renormalize"] = bool(options["renormalize"])
    made = strategies.get(form.strategy).options(**options)
    return MoE(num_experts=form.experts, num_experts_per_token=form.k, router=form.strategy, options=made)


def is_valid(chosen_E: np.ndarray, compared_E: np.ndarray, form: Form, settings: Mapping[str, Any]) -> bool:
    """Whether the chosen are K largest of what is compared, in best groups, whatever the order of ties."""
    if chosen_E.sum() != form.k:
        return False
    num, most = settings.get("n_group", 1), settings.get("topk_group", 1)
    if not form.best or num == most:
        return _largest(chosen_E, compared_E)
    of_group_Gg = compared_E.reshape(num, -1)
    score_G = -np.sort(-of_group_Gg, axis=1)[:, : form.best].astype(np.float32).sum(1)
    for groups in itertools.combinations(range(num), most):
        picked_G = np.isin(np.arange(num), groups)
        if _largest(picked_G, score_G):
            open_E = np.where(picked_G[:, None], of_group_Gg, form.closed).reshape(-1)
            if _largest(chosen_E, open_E):
                return True
    return False


def _largest(chosen: np.ndarray, score: np.ndarray) -> bool:
    return chosen.all() or score[chosen].min() >= score[~chosen].max()


def has_tie(compared_E: np.ndarray, form: Form, settings: Mapping[str, Any]) -> bool:
    """Whether more than one choice is valid."""
    cut = lambda score, k: k < len(score) and (s := np.sort(score)[::-1])[k - 1] == s[k]
    num, most = settings.get("n_group", 1), settings.get("topk_group", 1)
    if not form.best or num == most:
        return cut(compared_E, form.k)
    of_group_Gg = compared_E.reshape(num, -1)
    score_G = -np.sort(-of_group_Gg, axis=1)[:, : form.best].astype(np.float32).sum(1)
    picked_G = np.isin(np.arange(num), np.argsort(-score_G, kind="stable")[:most])
    return cut(score_G, most) or cut(np.where(picked_G[:, None], of_group_Gg, form.closed).reshape(-1), form.k)


def compared(form: Form, settings: Mapping[str, Any], given: Logits) -> np.ndarray:
    """Of what the K largest are chosen. What is too small for a normal number is 0: not all devices have others."""
    z, b = torch.from_numpy(given.logits_NX), torch.from_numpy(given.bias_X)
    found_NX = form.compared(z, b, _config(form, settings)).numpy()
    return np.where(np.abs(found_NX) < np.finfo(np.float32).tiny, 0, found_NX)


# The table of the page.

COLUMNS = ("family", "experts", "score", "bias", "groups", "weights", "ours")


def rows() -> list[tuple[str, ...]]:
    """A row per family, and per router of those with several."""
    lines, families = [], list(found().values())
    by_name = sorted(PAIRS, key=lambda pair: (list(found()).index(pair[1]), pair[0]))
    for key, name in by_name:
        form, family = FORMS[key], found()[name]
        several = families.count(family) > 1
        held = f"{form.ours()}{'; ' if form.note else ''}{form.note}" if form.strategy else f"no: {form.note}"
        cells = (form.score, form.bias, form.groups, form.weights, held)
        lines.append((f"`{family}`" + (f" ({name})" if several else ""), _sizes(form, name), *cells))
    return lines


def _sizes(form: Form, name: str) -> str:
    """E / K of the config class's defaults; nothing where it has none."""
    family = found()[name]
    module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    made = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    alike = lambda other: sum(itertools.takewhile(bool, map(str.__eq__, name, other)))  # letters at the front
    nearest = sorted(made, key=lambda c: (-alike(c.__name__), c.__name__))
    for cls in nearest:
        config = cls()
        config.allow_global_per_layer_attribute_access = True
        said = {name: getattr(config, name, None) for name in (*_EXPERTS, *_TOP)}
        experts, chosen = (
            next((said[n] for n in names if isinstance(said.get(n), int)), 0) for names in (_EXPERTS, _TOP)
        )
        if experts:
            chosen = chosen or form.k * (form.k < K)
            return f"{experts} / {chosen}" if chosen else str(experts)
    return ""
