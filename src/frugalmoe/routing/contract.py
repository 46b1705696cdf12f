"""The contract between a routing strategy, the MoE layer and the executors.

Letters: B batch, T time, N tokens (B*T), D model, E experts, X choices (the E experts, then what is no expert),
K choices of a token, C slots per expert, R rows of any origin.

A strategy is one file in `strategies/` that ends with `ROUTER = Router(...)`. Its `route` is a pure function

    route(params, state, inputs, config) -> Routing(plan, losses, stats, carry, added, input_scale)

The layer executes the plan without knowing who made it. The meaning of a plan is its combine matrix `G[N, E]`
(`combine_matrix`): y_n = sum_e G[n, e] * expert_e(s_n * x_n) + a_n, where most strategies have s = 1 and a = 0. Every
executor is tested against that matrix.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from frugalmoe.errors import UserError
from frugalmoe.routing import merging
from frugalmoe.schema import FrozenDict, MoE, Named
from frugalmoe.sharding import broken_rule, declaration

ROUTER_ROLE = "router"  # of every parameter of a strategy

Params = Mapping[str, Array]
NewParams = Mapping[str, nnx.Param]  # each made by `declare`
State = Mapping[str, Array]
Carry = Mapping[str, Array] | None  # arrays [B, T, ...], each named with its letters


class TokenPlan(NamedTuple):
    """Token-major: each token names K experts. Expert id E is the null expert (empty or dropped slot, weight 0)."""

    expert_NK: Array  # int32
    weight_NK: Array  # float32

    @property
    def ids(self) -> Array:
        """Whom each slot names, in either form of a plan."""
        return self.expert_NK

    @property
    def weights(self) -> Array:
        return self.weight_NK

    def with_weights(self, weights: Array) -> "TokenPlan":
        return self._replace(weight_NK=weights)


class ExpertPlan(NamedTuple):
    """Expert-major: each expert names C tokens. Token id N is the null token (empty slot, weight 0)."""

    token_EC: Array  # int32
    weight_EC: Array  # float32

    @property
    def ids(self) -> Array:
        return self.token_EC

    @property
    def weights(self) -> Array:
        return self.weight_EC

    def with_weights(self, weights: Array) -> "ExpertPlan":
        return self._replace(weight_EC=weights)


Plan = TokenPlan | ExpertPlan


class Inputs(NamedTuple):
    """Everything that a strategy may look at. Sequences stay apart (B, T), so that a pool of tokens is one sequence.

    Most strategies need the activations and what `linear_logits` and the modules beside this one do with the rest.
    """

    x_BTD: Array  # activations, compute dtype
    token_ids_BT: Array  # int32
    segment_ids_BT: Array  # int32, 0 = padding; documents packed into one sequence have different ids
    positions_BT: Array  # int32, position inside the document
    # Typed PRNG keys, one per sequence and new in each step: noise does not depend on batching, accumulation or mesh.
    # A strategy takes its noise from `select.token_keys`, which folds in layer, segment and position.
    keys_B: Array
    step: Array  # int32 []
    layer: Array  # int32 [], index among the MoE layers
    train: bool = False  # static; False: no exploration noise

    # What few strategies need.
    carry: Carry = None  # what the previous MoE layer's `Routing.carry` held: it crosses layers, never time
    axis_names: tuple[str, ...] = ()  # static; mesh axes that hold other sequences of the batch
    # The layer's experts on rows of the strategy's choice: (plan over R rows, rows[R, D]) -> y[R, D], at the cost that
    # the plan's rows have in the layer. No row is dropped. Gradients reach the plan's weights and the rows alone.
    run_experts: Callable[[ExpertPlan, Array], Array] | None = None
    logit_map: Callable[[Array], Array] | None = None  # how a wrapper changes the gate's logits; see `linear_logits`

    @property
    def valid_BT(self) -> Array:
        return self.segment_ids_BT > 0

    def of_tokens(self, change: Callable[[Array], Array]) -> "Inputs":
        """The same with each array [B, T, ...] changed, the carry's too: other tokens, or another order of them."""
        names = ("x_BTD", "token_ids_BT", "segment_ids_BT", "positions_BT", "carry")
        return self._replace(**{name: jax.tree.map(change, getattr(self, name)) for name in names})

    def of_sequences(self, change: Callable[[Array], Array]) -> "Inputs":
        """The same with each array [B, ...] changed, keys too: other sequences."""
        return self.of_tokens(change)._replace(keys_B=change(self.keys_B))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
    """An unscaled auxiliary loss of one layer as a sum; `losses.total` divides by the step's number of `per` units.

    Sums are added over shards and micro-batches, so that a loss over the whole batch is this shard's share of it.
    """

    sum: Array  # float32 []
    per: Literal["token", "sequence", "group", "batch"] = dataclasses.field(metadata={"static": True})


class Routing(NamedTuple):
    plan: Plan
    losses: Mapping[str, Loss]
    stats: Mapping[str, Array]  # additive over micro-batches and shards; see `stats.py`
    carry: Carry = None
    added_BTD: Array | None = None  # float32; what the strategy itself adds to the output, 0 at padding; gradients pass
    input_scale_BT: Array | None = None  # float32; the experts see x * scale (Llama 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What a strategy claims. The laws check each claim, the catalogue (`frugalmoe routers`) prints it.

    A claim that varies with the options is a function of the config; read claims through `Router.claim`.
    """

    year: int
    paper: str  # "Authors, title, arXiv id, equation or section"
    score: str  # softmax | sigmoid | none | ...
    selection: str  # one line
    weights: str  # one line
    balance: str  # one line
    causal: Literal["safe", "batch", "leak"] = "safe"  # leak: a token's routing depends on later tokens of its sequence
    causal_in_evaluation: str | Callable[[MoE], str] | None = None  # the same, where evaluation has another rule
    form: Literal["token", "expert"] = "token"
    weight_sum: float | str | Callable[[MoE], float | str] = "free"  # of a valid token: a number, at_most_one, or free
    learned: bool | Callable[[MoE], bool] = True  # the language-model loss reaches the router's parameters
    estimated_gradient: bool = False  # by design the gate's gradient is an estimate, not the slope of the output
    stateful: bool = False  # has state, updated once per optimizer step
    random: bool | Callable[[MoE], bool] = False  # uses keys
    losses: tuple[str, ...] = ()  # names that `route` returns and `model.moe.losses` may weigh


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """A strategy without options."""


def no_params(key: Array, dim: int, config: MoE) -> NewParams:
    return {}


def no_state(dim: int, config: MoE) -> State:
    return {}


def keep_state(state: State, stats: Mapping[str, Array], config: MoE) -> State:
    return state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router(Named):
    """A routing strategy. `config` is always the layer's `MoE` with `config.options` an instance of `options`."""

    about: About
    route: Callable[[Params, State, Inputs, MoE], Routing]
    options: type = NoOptions  # frozen dataclass with defaults
    init: Callable[[Array, int, MoE], NewParams] = no_params  # (key, dim, config) -> a layer's float32 parameters
    init_shared: Callable[[Array, int, MoE], NewParams] = (
        no_params  # one set for all layers; `route` gets both in `params`
    )
    init_state: Callable[[int, MoE], State] = no_state  # (dim, config); float32, no gradient, checkpointed
    update: Callable[[State, Mapping[str, Array], MoE], State] = keep_state  # once per step, stats of the whole batch
    init_carry: Callable[[MoE, int, int], Carry] = lambda config, batch, time: None  # before the first MoE layer
    # Entry of the state -> its rule of `merging.RULES`.
    merges: Mapping[str, str] = dataclasses.field(default=FrozenDict(), compare=False)
    # Where the entries do not merge one by one: (states, weights, config) -> State, of host arrays that were checked.
    merge_state: Callable[[Sequence[State], Sequence[float], MoE], State] | None = None
    check: Callable[[MoE], str | None] = lambda config: None  # the rule that a config breaks, or None
    # (K, options of 8 experts), beside the defaults, that the laws run with.
    cases: tuple[tuple[int, Mapping[str, Any]], ...] = dataclasses.field(default=(), compare=False)
    name: str = ""  # set by `strategies.get` to the file's name

    def new_params(self, key: Array, dim: int, config: MoE, shared: bool = False) -> NewParams:
        """What `init` makes, or `init_shared`; raises `UserError` naming an array that is not as `declare` makes it."""
        made = (self.init_shared if shared else self.init)(key, dim, config)
        for name, value in made.items():
            rule = broken_rule(value, name)
            if rule is None and declaration(value).role != ROUTER_ROLE:
                rule = f"its role is {declaration(value).role!r}; a strategy declares with contract.declare"
            if rule:
                where = "init_shared" if shared else "init"
                raise UserError(f"model.moe.router={self.name!r}: {where} returned {name!r}: {rule}")
        return made

    def merge(self, states: Sequence[State], weights: Sequence[float], config: MoE) -> State:
        """One state of replicas that trained apart, as host arrays: see `merging`. Leading axes (layers) are kept.

        `weights`: what each replica counts for, say its tokens; a common factor changes nothing. Raises `UserError`
        for no states, for weights that are no weights, and for states that differ in form or are not finite.
        """
        held = merging.checked(states, weights)
        if self.merge_state is not None:
            return self.merge_state(held, weights, config)
        return merging.by_rules(self.merges, held, weights)

    def claim(self, field: str, config: MoE) -> Any:
        """The value of a field of `about` under this config."""
        value = getattr(self.about, field)
        return value(config) if callable(value) else value

    def causality(self, config: MoE, train: bool) -> str:
        """What is claimed about causality in training, or in evaluation and generation."""
        evaluation = None if train else self.claim("causal_in_evaluation", config)
        return evaluation or self.claim("causal", config)


def combine_matrix(plan: Plan, num_tokens: int, num_experts: int) -> Array:
    """The dense G[N, E] float32 that a plan means. Cost N*E; the oracle of the tests."""
    if isinstance(plan, TokenPlan):
        n_NK = jnp.broadcast_to(jnp.arange(num_tokens)[:, None], plan.expert_NK.shape)
        e_NK, w_NK = plan.expert_NK, plan.weight_NK
    else:
        n_NK = plan.token_EC
        e_NK, w_NK = jnp.broadcast_to(jnp.arange(num_experts)[:, None], n_NK.shape), plan.weight_EC
    g_NE = jnp.zeros((num_tokens + 1, num_experts + 1), jnp.float32).at[n_NK, e_NK].add(w_NK)
    return g_NE[:num_tokens, :num_experts]


def selection_matrix(plan: Plan, num_tokens: int, num_experts: int) -> Array:
    """Which expert got which token, bool [N, E], whatever the weights."""
    ones = jnp.ones(plan.ids.shape, jnp.float32)
    return combine_matrix(plan.with_weights(ones), num_tokens, num_experts) > 0


def token_major(plan: Plan, num_tokens: int, num_experts: int) -> TokenPlan:
    """The same plan with experts named per token; an expert-major one gets K = E columns, the heaviest first."""
    if isinstance(plan, TokenPlan):
        return plan
    g_NE = combine_matrix(plan, num_tokens, num_experts)
    g_NE = jnp.where(selection_matrix(plan, num_tokens, num_experts), g_NE, -jnp.inf)
    weight_NK, expert_NK = jax.lax.top_k(g_NE, num_experts)
    empty_NK = weight_NK == -jnp.inf
    return TokenPlan(jnp.where(empty_NK, num_experts, expert_NK), jnp.where(empty_NK, 0, weight_NK))


def declare(value: Array, letters: str) -> nnx.Param:
    """A float32 parameter of a strategy, as `Router.init` returns it, with one letter per axis: see `sharding.LETTERS`.

    It is looked at where the array's name is known too: see `Router.new_params`.
    """
    return nnx.Param(value, letters=letters, role=ROUTER_ROLE)


def normal(key: Array, letters: str, shape: tuple[int, ...], std: float) -> nnx.Param:
    """As `declare`, drawn from a normal distribution."""
    return declare(jax.random.normal(key, shape, jnp.float32) * std, letters)


def arrays(params: NewParams) -> Params:
    """New parameters as `route` is given them: float32 arrays."""
    return {name: parameter[...] for name, parameter in params.items()}


def linear_init(key: Array, dim: int, config: MoE) -> NewParams:
    """A float32 linear gate, normal with std 1/sqrt(D): logits of about unit variance for RMS-normalized inputs."""
    return {"kernel_DE": normal(key, "DE", (dim, config.num_experts), dim**-0.5)}


def linear_init_with_bias(key: Array, dim: int, config: MoE) -> NewParams:
    """As `linear_init`, and a bias of zeros on the logits where the strategy's option `logit_bias` asks for it."""
    made = linear_init(key, dim, config)
    return made | {"bias_E": declare(jnp.zeros(config.num_experts), "E")} if config.options.logit_bias else made


LINEAR = (linear_init, linear_init_with_bias)  # what makes the parameters of one linear gate


def clean(inputs: Inputs) -> Array:
    """x[B, T, D] in float32, zeros at padding, so that garbage there reaches no gradient (MaxText PR 3699)."""
    return jnp.where(inputs.valid_BT[..., None], inputs.x_BTD, 0).astype(jnp.float32)


def project(x_BTI: Array, kernel_IJ: Array) -> Array:
    """x @ kernel in full float32, whatever a device's default precision."""
    return jnp.einsum("bti,ij->btj", x_BTI, kernel_IJ, precision=jax.lax.Precision.HIGHEST)


def linear_logits(params: Params, inputs: Inputs) -> Array:
    """Router logits [B, T, E] in float32 whatever the activation dtype (bf16 scores tie: Megatron PR 7081).

    A wrapper's `inputs.logit_map` applies here: a strategy that calls this once can be wrapped. A parameter `bias_E` is
    added, where there is one.
    """
    projected = lambda x_BTD, kernel_DE: project(clean(inputs._replace(x_BTD=x_BTD)), kernel_DE)
    if inputs.x_BTD.dtype.itemsize < 4:  # else float32 activations would be kept for the gradient
        projected = jax.checkpoint(projected, prevent_cse=False)
    logits_BTE = projected(inputs.x_BTD, params["kernel_DE"])
    if "bias_E" in params:
        logits_BTE = logits_BTE + params["bias_E"]
    return logits_BTE if inputs.logit_map is None else inputs.logit_map(logits_BTE)
