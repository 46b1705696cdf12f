"""Changes of a routing plan at evaluation, for any router: they see the plan alone, not who made it.

What takes the place of a choice that is taken away (`instead`):

| instead | the slot gets | weights |
|---|---|---|
| nothing | nobody: the token has one expert less | the others keep theirs |
| rest | nobody | the token's other experts share it, in proportion |
| random | a random expert that the token does not have | kept |
| next | the router's next best expert: re-routing | as the router gives them to the K that remain |

A plan does not name its next best. `intervene` asks the strategy for K + 1 choices instead, of which all layers use the
first K; it refuses a router for which those are not what K choices give (expert choice, a fixed K).

What a strategy itself adds to the output (`Routing.added_BTD`: copies and constants of choices that are no experts,
averages of experts) is not in the plan and stays as it is. So a router that adds is refused what depends on the order
of all its choices: `Demote`, and re-routing.

Letters: N tokens, E experts, K choices (one more where the plan has a spare).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.errors import UserError
from frugalmoe.routing.contract import Inputs, Plan, TokenPlan, token_major
from frugalmoe.routing.select import token_keys

INSTEAD = ("nothing", "rest", "random", "next")
_static = lambda default: dataclasses.field(default=default, metadata={"static": True})
_SALT = 0x5EED  # another stream than that of a router that is random itself


@dataclasses.dataclass(frozen=True)
class _Intervention:
    """A pytree whose numbers are traced: all experts of all layers share one compiled evaluation."""

    layer: Any = None  # index in the whole network; None: every MoE layer
    seed: int = dataclasses.field(default=0, kw_only=True)  # of random experts
    spare: bool = dataclasses.field(default=False, kw_only=True, metadata={"static": True})  # plans name K + 1
    total: float | None = dataclasses.field(
        default=None, kw_only=True, metadata={"static": True}
    )  # of a token's weights

    def __call__(self, plan: Plan, inputs: Inputs, num_experts: int, adds: bool = False) -> TokenPlan:
        """The plan to execute instead; `adds`: the strategy has an output of its own beside the experts'."""
        if adds and self.ranks:
            rule = "the router itself adds to the output (choices that are no experts), which a plan does not show"
            valid = "RandomChoice, or Mask with instead= nothing, rest, random"
            what = "instead='next'" if self.spare else type(self).__name__
            raise UserError(f"{what}: {rule}; valid: {valid}")
        plan = token_major(plan, inputs.token_ids_BT.size, num_experts)
        here = True if self.layer is None else inputs.layer == self.layer
        return self.change(plan, here, inputs, num_experts)

    @property
    def ranks(self) -> bool:
        """Whether it depends on the order of all choices of a token."""
        return self.spare

    @property
    def where(self) -> str:
        return "all layers" if self.layer is None else f"layer {self.layer}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nothing(_Intervention):
    """Leaves the routing as it is; with a spare it drops that, which must give the same."""

    def change(self, plan: TokenPlan, here: Array | bool, inputs: Inputs, num_experts: int) -> TokenPlan:
        return _keep_first(plan, jnp.zeros(plan.expert_NK.shape, bool), num_experts, self.total) if self.spare else plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask(_Intervention):
    """Takes an expert away from all tokens."""

    expert: Any = 0
    instead: str = _static("nothing")

    def change(self, plan: TokenPlan, here: Array | bool, inputs: Inputs, num_experts: int) -> TokenPlan:
        return _replace(plan, (plan.expert_NK == self.expert) & here, inputs, num_experts, self)

    def __str__(self) -> str:
        return f"{self.where}, expert {self.expert} gives way to {self.instead}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Demote(_Intervention):
    """Takes the first choice away from every token; with instead="next", a token goes to its choices 2 .. K + 1."""

    instead: str = _static("nothing")
    ranks = True

    def change(self, plan: TokenPlan, here: Array | bool, inputs: Inputs, num_experts: int) -> TokenPlan:
        first_NK = jnp.arange(plan.expert_NK.shape[1]) == 0
        return _replace(plan, first_NK & (plan.expert_NK < num_experts) & here, inputs, num_experts, self)

    def __str__(self) -> str:
        return f"{self.where}, first choice gives way to {self.instead}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RandomChoice(_Intervention):
    """Gives every token as many distinct random experts as it has, with the weights that it has."""

    def change(self, plan: TokenPlan, here: Array | bool, inputs: Inputs, num_experts: int) -> TokenPlan:
        _, drawn_NK = jax.lax.top_k(_draw(inputs, num_experts, self.seed), plan.expert_NK.shape[1])
        changed_NK = (plan.expert_NK < num_experts) & here
        return plan._replace(expert_NK=jnp.where(changed_NK, drawn_NK.astype(jnp.int32), plan.expert_NK))

    def __str__(self) -> str:
        return f"{self.where}, random experts"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Swap(_Intervention):
    """Gives one slot to another expert, with the weight that it has.

    An empty slot, and a token that has the expert already, stay as they are.
    """

    slot: Any = 0  # in the router's order, best first
    expert: Any = 0
    position: Any = None  # of the tokens that are swapped in their part of a document; None: all

    def change(self, plan: TokenPlan, here: Array | bool, inputs: Inputs, num_experts: int) -> TokenPlan:
        has_N1 = jnp.any(plan.expert_NK == self.expert, axis=-1, keepdims=True)
        hit_NK = (jnp.arange(plan.expert_NK.shape[1]) == self.slot) & (plan.expert_NK < num_experts) & ~has_N1 & here
        if self.position is not None:
            hit_NK &= inputs.positions_BT.reshape(-1, 1) == self.position
        return plan._replace(expert_NK=jnp.where(hit_NK, self.expert, plan.expert_NK))

    def __str__(self) -> str:
        where = "" if self.position is None else f", position {self.position}"
        return f"{self.where}{where}, choice {self.slot} gives way to expert {self.expert}"


Intervention = Mask | Demote | RandomChoice | Swap


def _replace(plan: TokenPlan, hit_NK: Array, inputs: Inputs, num_experts: int, how: Mask | Demote) -> TokenPlan:
    if how.instead == "next":
        return _keep_first(plan, hit_NK, num_experts, how.total)
    if how.instead == "random":
        other_N1, possible = _other(plan.expert_NK, inputs, num_experts, how.seed)
        plan = plan._replace(expert_NK=jnp.where(hit_NK, other_N1, plan.expert_NK))
        hit_NK = hit_NK & (not possible)  # a token that has all experts loses the slot
    left_NK = jnp.where(hit_NK, 0, plan.weight_NK)
    if how.instead == "rest":
        left_NK = _scaled(left_NK, plan.weight_NK.sum(-1, keepdims=True))
    return TokenPlan(jnp.where(hit_NK, num_experts, plan.expert_NK), left_NK)


def _keep_first(plan: TokenPlan, hit_NK: Array, num_experts: int, total: float | None) -> TokenPlan:
    """The first K of the K + 1 choices that are not hit."""
    keep_NK = ~hit_NK & (jnp.cumsum(~hit_NK, axis=-1) < plan.expert_NK.shape[1])
    weight_NK = jnp.where(keep_NK, plan.weight_NK, 0)
    if total is not None:
        weight_NK = _scaled(weight_NK, total)
    return TokenPlan(jnp.where(keep_NK, plan.expert_NK, num_experts), weight_NK)


def _scaled(weight_NK: Array, total: Array | float) -> Array:
    """Weights that sum to `total`, in the same proportions; none where there are none."""
    sum_N1 = weight_NK.sum(-1, keepdims=True)
    return weight_NK * jnp.where(sum_N1 > 0, total / jnp.where(sum_N1 > 0, sum_N1, 1), 0)


def _draw(inputs: Inputs, num_experts: int, seed: Array | int) -> Array:
    """Uniform numbers [N, E], a function of the token's place, the layer and the seed."""
    keys_N = token_keys(inputs).reshape(-1)
    one = lambda key: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, _SALT), seed), (num_experts,))
    return jax.vmap(one)(keys_N)


def _other(expert_NK: Array, inputs: Inputs, num_experts: int, seed: Array | int) -> tuple[Array, bool]:
    """A random expert [N, 1] that the token does not have; False where K = E leaves none."""
    has_NE = jnp.any(expert_NK[..., None] == jnp.arange(num_experts), axis=1)
    other_N = jnp.argmax(jnp.where(has_NE, -1.0, _draw(inputs, num_experts, seed)), axis=-1)
    return other_N[:, None].astype(jnp.int32), expert_NK.shape[1] < num_experts
