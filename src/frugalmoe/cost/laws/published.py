"""Laws that others have published, each with its source, in the units that it was fitted in.

C is the training compute of a run in FLOPs: three times the forward pass, without embedding and head, times the tokens
(`training_compute`). Laws are powers of C, and hold for the models and the data that they were fitted on.
"""

import math
from typing import NamedTuple

from frugalmoe.cost.flops import TRAIN_FACTOR, forward_flops
from frugalmoe.schema import Model


class Power(NamedTuple):
    """coefficient * x ** exponent."""

    coefficient: float
    exponent: float

    def at(self, x: float) -> float:
        """Returns the law's value at x > 0."""
        return self.coefficient * x**self.exponent


class HyperParameters(NamedTuple):
    """The learning rate and the batch that are best at a compute C."""

    rate: Power  # of C: peak learning rate of AdamW
    batch: Power  # of C: tokens of an optimizer step
    source: str


# The two agree on the form and differ in the constants: other data, other shapes, another range of C.
LING_1 = HyperParameters(
    Power(1.5552, -0.1579), Power(0.2008, 0.3447), "arXiv 2503.05139 figure 12; searched at C = 1e18 to 6e20"
)
LEVERAGE_PAPER = HyperParameters(
    Power(1.1576, -0.1529), Power(0.0694, 0.3644), "arXiv 2507.17702 section 3; searched at C = 3e17 to 3e20"
)


class Allocation(NamedTuple):
    """How a compute C = M D is best spent: M forward FLOPs per token, D tokens."""

    size: Power  # M of C
    tokens: Power  # D of C
    source: str


DENSE = Allocation(Power(0.0655, 0.5422), Power(15.2582, 0.4578), "arXiv 2507.17702, dense")
MOE = Allocation(Power(0.1915, 0.5095), Power(5.2232, 0.4905), "arXiv 2507.17702, experts with A = 7.8%, G = 2")


def nonembedding_flops(model: Model, sequence_length: int) -> float:
    """Returns M: FLOPs of one token's forward pass without head and multi-token prediction, attention not masked.

    The convention of the Ling papers: each query is multiplied with all `sequence_length` keys, where `forward_flops`
    counts a causal model's mean of (T + 1) / 2. Attention that sees all of a sequence of 2 T - 1 has a mean of T. With
    it the learning rates of table 1 of Ling 2.0 (arXiv 2510.22115) follow from the law to 0.2%, with the causal count
    they are up to 3% off.
    """
    parts = dict(forward_flops(model, sequence_length))
    parts["attention products"] = forward_flops(model, 2 * sequence_length - 1)["attention products"]
    return sum(flops for part, flops in parts.items() if part not in ("head", "multi-token prediction"))


def training_compute(model: Model, sequence_length: int, tokens: float) -> float:
    """Returns C in FLOPs, the argument of the laws here."""
    return TRAIN_FACTOR * nonembedding_flops(model, sequence_length) * tokens


class Leverage(NamedTuple):
    """Constants of the law of efficiency leverage (arXiv 2507.17702)."""

    base: float = 1.23
    per_decade: float = -7.61e-2  # the text calls it positive; with the sign that its table has leverage grows with C
    curvature: float = 1.67e-2
    slope: float = -1.17e-1
    start: float = 1.63e-2  # activation ratio at which leverage saturates
    most: float = 5.28e16


LEVERAGE = Leverage()


def activation_ratio(model: Model) -> float:
    """Returns A: the share of a layer's experts, shared ones included, that a token goes through."""
    moe = model.moe
    return (moe.num_experts_per_token + moe.num_shared_experts) / (moe.num_experts + moe.num_shared_experts)


def granularity(model: Model) -> float:
    """Returns G = 2 D / F: into how many parts a feed-forward of width 2 D is cut."""
    return 2 * model.dim / model.moe.expert_dim


def leverage(activation: float, granularity: float, compute: float, constants: Leverage = LEVERAGE) -> float:
    """Returns how many times as much compute a dense model needs for the loss of a mixture of experts.

        EL = Ahat ^ (a + d log10 C + gamma (log2 G)^2 + beta log2 G),
        1 / Ahat = 1 / (A + (1 / A_start - 1 / A_max)^-1) + 1 / A_max          (arXiv 2507.17702)

    The paper does not say which logarithms. log10 of C with log2 of G gives what it prints: more than 7 at A = 3.1%,
    G = 12, C = 1e22, and a best G of about 12. Natural logarithms give thousands, or a best G of 33.
    """
    c = constants
    saturated = 1 / (1 / (activation + 1 / (1 / c.start - 1 / c.most)) + 1 / c.most)
    parts = math.log2(granularity)
    return saturated ** (c.base + c.per_decade * math.log10(compute) + c.curvature * parts**2 + c.slope * parts)


def best_granularity(constants: Leverage = LEVERAGE) -> float:
    """Returns the G of the largest leverage, where the exponent's parabola in log2 G has its vertex."""
    return 2 ** (-constants.slope / (2 * constants.curvature))


# Failures; goodput, Young's interval and stragglers are in `cost/islands.py`.


def best_interval_with_recovery(between: float, saving: float, recovery: float) -> float:
    """Returns the seconds between two checkpoints that keep a run available longest (arXiv 2410.18124).

    between: until a failure, on average; saving: how long a checkpoint stops the run; recovery: until it steps again.
    Ts + sqrt(2 (Tf + Tr) Ts + Ts^2): Young's sqrt(2 Tf Ts) where saving and recovery are short beside `between`.
    """
    return saving + math.sqrt(2 * (between + recovery) * saving + saving**2)


def any_fails(probability: float, count: int) -> float:
    """Returns the probability that at least one of `count` fails, each with `probability`, apart from the others."""
    return -math.expm1(count * math.log1p(-probability))


# Money.


def device_hours(flops: float, peak: float, utilization: float) -> float:
    """Returns the hours of one device that `flops` take at `utilization` of its `peak` FLOP/s."""
    return flops / (peak * utilization) / 3600


def utilization_for(flops: float, peak: float, rate: float, total: float) -> float:
    """Returns which share of `peak` FLOP/s must be reached for `flops` to cost `total`, at `rate` per device-hour."""
    return device_hours(flops, peak, 1.0) * rate / total


def share_needed(cheap: float, dear: float, wanted: float) -> float | None:
    """Returns the share of tokens on the cheaper of two for a mix that costs `wanted`; None if no mix does.

    Each costs so much for all tokens alone, so that a mix costs x cheap + (1 - x) dear.
    """
    if cheap > wanted:
        return None
    return 0.0 if dear <= wanted else (dear - wanted) / (dear - cheap)
