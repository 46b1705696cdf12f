"""Laws of the losses that a router returns: their names, values and direction.

Letters: B batch, T time, E experts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from frugalmoe.laws.cases import WEIGHT, B, Case, T, make_inputs, make_params, probe, route
from frugalmoe.routing.contract import Loss, Routing, TokenPlan
from frugalmoe.schema import FrozenDict


def law_declared_losses(case: Case) -> None:
    """A router returns the losses that it declares, no others, if the config names them; each finite, not negative."""
    routing = route(with_all_losses(case), make_inputs())
    returned, declared = sorted(routing.losses), sorted(case.router.about.losses)
    assert returned == declared, f"route returns the losses {returned}, About(losses=...) declares {declared}"
    for name, loss in routing.losses.items():
        assert loss.sum.shape == () and np.isfinite(loss.sum) and loss.sum >= 0, f"{name} is {loss.sum}"


def law_loss_values(case: Case) -> None:
    """A loss of gates has the value that its definition gives it: 1 for a balance loss at uniform probabilities."""
    check_equal_logits(with_all_losses(case))
    check_equal_sequences(with_all_losses(case))


def law_balance_direction(case: Case) -> None:
    """One step down the load-balance loss lowers the probability of the most loaded expert."""
    if "load_balance" not in case.router.about.losses:
        return
    inputs = make_inputs(padded=False)
    inputs = inputs._replace(x_BTD=inputs.x_BTD[:1, :1] + 0.01 * inputs.x_BTD)  # tokens alike: one expert overloaded
    before = probe(case, inputs, np.zeros_like(WEIGHT), load_balance=1.0)
    params = jax.tree.map(lambda p, g: p - 1e-2 * g, make_params(case)[0], before.params)
    after = route(case, inputs, params).stats["prob_sum"]
    before = before.routing.stats
    loaded = int(jnp.argmax(before["counts"] * 1e6 + before["prob_sum"]))
    drop = float(before["prob_sum"][loaded] - after[loaded])
    assert drop > 1e-6, f"a step down load_balance changes the busiest expert's probability by {-drop:.3g}"


def with_all_losses(case: Case) -> Case:
    """The case with every loss that its router declares named in the config."""
    names = FrozenDict.fromkeys(case.router.about.losses, 1.0)
    return case._replace(config=dataclasses.replace(case.config, losses=names, load_balance_devices=2))


# What a loss is when all choices of a token have equal probabilities, whatever the load; X choices.
AT_EQUAL_LOGITS = {
    "load_balance": lambda num_choices: 1.0,
    "sequence_balance": lambda num_choices: 1.0,
    "device_balance": lambda num_choices: 1.0,
    "marginal_entropy": lambda num_choices: 0.0,
    "token_entropy": np.log,
    "mutual_information": np.log,
}


def check_equal_logits(case: Case) -> None:
    """Tokens of zeros, for which a gate without offsets has equal logits and so every balance loss its least value."""
    inputs = make_inputs(padded=False)
    routing = route(case, inputs._replace(x_BTD=jnp.zeros_like(inputs.x_BTD)))
    if not {"entropy_sum", "lse_sum"} <= routing.stats.keys():
        return
    num_choices = round(float(np.exp(routing.stats["lse_sum"] / routing.stats["tokens"])))
    if not np.isclose(routing.stats["entropy_sum"] / routing.stats["tokens"], np.log(num_choices), rtol=1e-5):
        return
    for name in AT_EQUAL_LOGITS.keys() & routing.losses.keys():
        loss = routing.losses[name]
        assert_value(name, float(loss.sum) / units(loss), AT_EQUAL_LOGITS[name](num_choices))


def check_equal_sequences(case: Case) -> None:
    """A sequence and its twin, against what the statistics say; of probabilities only where all are of experts."""
    inputs = make_inputs(padded=False)
    twins = inputs.of_sequences(lambda a: jnp.stack([a[0], a[0]]))
    routing = route(case, twins)
    stats = routing.stats
    if "z" in routing.losses and "lse_sq_sum" in stats:
        assert_value("z", float(routing.losses["z"].sum) / (B * T), float(stats["lse_sq_sum"]) / (B * T))
    if "entropy_sum" not in stats or not np.isclose(stats["prob_sum"].sum(), stats["tokens"], rtol=1e-5):
        return
    for name, forms in from_stats(routing).items():
        if name not in routing.losses:
            continue
        value = float(routing.losses[name].sum) / units(routing.losses[name])
        if name == "load_balance" and not np.any(np.isclose(value, forms, rtol=1e-4)):
            # f may count what the gate alone would choose, as it does in evaluation.
            forms += of_load(route(case, twins._replace(train=False)).stats["counts"], stats)
        assert_value(name, value, *forms)


def from_stats(routing: Routing) -> dict[str, tuple[float, ...]]:
    """What each loss of a gate is for equal sequences, by its definition from the statistics; some have two forms."""
    stats = {name: np.asarray(value, np.float64) for name, value in routing.stats.items()}
    mean_E, num_experts = np.maximum(stats["prob_sum"] / stats["tokens"], 1e-20), stats["counts"].size
    marginal = np.log(num_experts) + np.sum(mean_E * np.log(mean_E))
    first_E = np.bincount(np.asarray(routing.plan[0])[:, 0], minlength=num_experts)[:num_experts]
    variation = lambda amount_E: (np.var(amount_E) / np.mean(amount_E) ** 2,)
    return {
        # f counts all choices, or the first alone (GShard).
        "load_balance": (*of_load(stats["counts"], stats), *of_load(first_E, stats)),
        # Of probabilities, or of weights (Shazeer et al.).
        "importance": (*variation(mean_E), *variation(weight_of_experts(routing.plan, num_experts))),
        "marginal_entropy": (marginal,),
        "token_entropy": (stats["entropy_sum"] / stats["tokens"],),
        "mutual_information": (marginal + stats["entropy_sum"] / stats["tokens"],),
    }


def of_load(counts_E: Any, stats: Mapping[str, Any]) -> tuple[float]:
    """E * sum_e f_e P_e, with f from these counts."""
    counts_E, mean_E = (np.asarray(a, np.float64) for a in (counts_E, stats["prob_sum"] / stats["tokens"]))
    return (counts_E.size * np.dot(counts_E / counts_E.sum(), mean_E),)


def weight_of_experts(plan: TokenPlan, num_experts: int) -> np.ndarray:
    """The weights that each expert has over all tokens [E]."""
    ids, weights = (np.asarray(a).reshape(-1) for a in plan)
    return np.bincount(ids, np.float64(weights), minlength=num_experts)[:num_experts]


def units(loss: Loss) -> int:
    """How many of the units that it is divided by the test inputs hold, without padding."""
    return {"token": B * T, "sequence": B, "group": B, "batch": 1}[loss.per]


def assert_value(name: str, value: float, *forms: float) -> None:
    close = np.isclose(value, forms, rtol=1e-4, atol=1e-5)
    assert np.any(close), f"{name} is {value:.6g}, by its definition {forms[0]:.6g}"
