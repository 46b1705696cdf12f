"""What a run shows, in sentences made from its numbers. A verdict names the value, the reference and the evidence."""

from collections.abc import Callable

import numpy as np

from frugalmoe import metrics
from frugalmoe.analysis.measures import coactivation
from frugalmoe.analysis.measures.dynamics import beyond_chance
from frugalmoe.analysis.measures.evenness import effective_experts, gini
from frugalmoe.analysis.measures.specialisation import Specialisation
from frugalmoe.analysis.measures.vocabulary import vocabulary_specialisation
from frugalmoe.analysis.pages import plots
from frugalmoe.analysis.stored.probe import Probe
from frugalmoe.analysis.stored.runs import Run
from frugalmoe.analysis.stored.trace import Trace
from frugalmoe.analysis.wording import count, listed, number, p_value, percent, spread
from frugalmoe.config import RECORD, runnable
from frugalmoe.config.load import typed
from frugalmoe.errors import UserError
from frugalmoe.train import objective

ALPHA = 0.05  # of a verdict, over all layers together


def loss(run: Run) -> str:
    train = run.metrics.get("loss/ce")
    parts = []
    if train is not None:
        parts.append(f"Training loss ended at {number(train.tail(), 4)} nats per token (mean of the last tenth).")
    final = {d: run.metrics[f"eval/loss/{d}"] for d in run.domains if f"eval/loss/{d}" in run.metrics}
    if broken := [d for d, s in final.items() if not np.isfinite(s.values[-1])]:
        parts.append(f"Validation loss on {listed(broken)} is not a number at the end: the run broke.")
    final = {d: s for d, s in final.items() if d not in broken}
    if not final:
        return " ".join(parts if broken else [*parts, "The run has no evaluation yet."])
    last = {d: s.values[-1] for d, s in final.items()}
    order = sorted(last, key=last.get)
    if len(order) == 1:
        parts.append(f"Validation loss on {order[0]} ended at {number(last[order[0]], 4)}.")
    else:
        parts.append(
            f"Of {len(order)} domains {order[0]} is the easiest ({number(last[order[0]], 4)} nats per token) "
            f"and {order[-1]} the hardest ({number(last[order[-1]], 4)})."
        )
    rising = [d for d, s in final.items() if s.values[-1] > s.values.min() * 1.01]
    if rising:
        parts.append(f"Validation loss on {listed(rising)} ended more than 1% above its lowest value: overfitting.")
    return " ".join(parts)


def speed(run: Run) -> str:
    values = run.series("speed/tokens_per_second").values
    low, middle, high = np.nanquantile(values, [0.1, 0.5, 0.9])
    return (
        f"The median was {number(middle, 3)} tokens per second; "
        f"eight tenths of the intervals lie between {number(low, 3)} and {number(high, 3)}."
    )


def goodput(run: Run) -> str:
    """Says how much of the wall time were useful steps, what took the most beside them, and what faults cost."""
    found = run.goodput
    others = sorted((kind for kind in found.seconds if kind != "step"), key=lambda kind: -found.seconds[kind])
    share = lambda kind: percent(found.seconds[kind] / found.wall)
    said = (
        f"{percent(found.useful)} of {number(found.wall, 3)} s of wall time in {len(found.by_start)} "
        f"{'start' if len(found.by_start) == 1 else 'starts'} were training steps that the run still has"
    )
    said += f"; beside them {listed([f'{kind} took {share(kind)}' for kind in others[:3]])}." if others else "."
    if found.recoveries:
        deaths = "one death" if len(found.recoveries) == 1 else f"each of {len(found.recoveries)} deaths"
        median = number(float(np.median(found.recoveries)), 3)
        said += f" From {deaths} to the first step after it: {median} s (median)."
    return said


def optimization(run: Run) -> str:
    parts = []
    norm = run.metrics.get("optim/gradient_norm")
    if norm is not None and np.isfinite(norm.values).any():
        top = int(np.nanargmax(norm.values))
        parts.append(
            f"The gradient norm was {number(float(np.nanmedian(norm.values)))} in the median, at most "
            f"{number(norm.values[top])} (step {norm.steps[top]:,}), and {number(norm.tail())} over the last tenth."
        )
    rate = run.metrics.get("optim/learning_rate")
    if rate is not None and np.isfinite(rate.values).any():
        rates = rate.values[np.isfinite(rate.values)]
        parts.append(f"The learning rate went up to {rates.max():.3g} and ended at {rates[-1]:.3g}.")
    return " ".join(parts)


def auxiliary_losses(run: Run) -> str:
    """Says what each loss ended at, and what the training loss multiplies it with."""
    names = sorted(n for n in run.metrics if n.startswith("loss/") and n not in ("loss/ce", "loss/total"))
    role = _role_of_losses(run)
    each = [
        f"{metrics.find(name).label} {number(run.metrics[name].tail())}{role(name.removeprefix('loss/'))}"
        for name in names
    ]
    return f"Over the last tenth of the logged steps: {listed(each)}."


def _role_of_losses(run: Run) -> Callable[[str], str]:
    """Returns what to say behind the value of a loss; nothing where the config is of other code than this."""
    try:
        coefficients = objective.coefficients(typed(runnable(run.path / RECORD)))
    except UserError:
        return lambda name: ""
    return lambda name: f" (times {c:g})" if (c := coefficients.get(name)) else " (watched only)"


def vocabulary(probe: Probe) -> str:
    """Says in which layer experts follow the token that is read most, and in which least."""
    known_N = probe.token_ids_N >= 0
    shares = [vocabulary_specialisation(s[known_N], probe.token_ids_N[known_N], shuffles=3) for s in probe.selected_LNE]
    value_L, floor_L = np.array(shares).T
    most, least = int(np.nanargmax(value_L - floor_L)), int(np.nanargmin(value_L - floor_L))
    said = [
        f"{percent(value_L[l])} in layer {probe.layers_L[l]} (shuffled: {percent(floor_L[l])})"
        for l in dict.fromkeys((most, least))
    ]
    return f"Of a token's occurrences its favourite expert gets {listed(said)}, the most and the least above chance."


def load(run: Run) -> str:
    counts_SLE = run.loads.counts_SLE
    tail_LE = counts_SLE[-max(1, len(counts_SLE) // 10) :].sum(0)
    ratio_LE = tail_LE / tail_LE.mean(-1, keepdims=True)
    effective_L = effective_experts(tail_LE)
    effective = spread(number(effective_L.min()), number(effective_L.max()))
    busy = np.unravel_index(ratio_LE.argmax(), ratio_LE.shape)
    idle = np.unravel_index(ratio_LE.argmin(), ratio_LE.shape)
    layers = run.loads.layers_L
    return (
        f"Over the last tenth of the logged steps the busiest expert is {busy[1]} of layer {layers[busy[0]]} with "
        f"{number(ratio_LE[busy])} times the uniform load, the least busy {idle[1]} of layer {layers[idle[0]]} with "
        f"{number(ratio_LE[idle], 2)} times. The load spreads over "
        f"{effective} effective experts of {ratio_LE.shape[1]} (exp of the load entropy, by layer); "
        f"the Gini coefficient is at most {number(gini(tail_LE).max(), 2)}."
    )


def rounds(run: Run) -> str:
    found = run.rounds
    trained, waited = found.trained_R.sum(), found.waited_R.sum()
    of_all = spread(str(found.islands_R.min()), str(found.islands_R.max()))
    written, read = (f"{count(float(np.median(bytes_R)))}B" for bytes_R in (found.written_R, found.read_R))
    share = f"It trained {percent(trained / (trained + waited))} of the time. " if trained + waited > 0 else ""
    return (
        f"{found.merged_R.sum()} of {len(found.round_R)} rounds merged what it found, with {of_all} contributions "
        f"each. {share}A round wrote {written} and read {read} (medians). The outer parameters hold "
        f"{count(int(found.tokens_of_all_R[-1]))} tokens, of which this island handed in "
        f"{count(int(found.tokens_R[found.merged_R].sum()))}."
    )


def island_loads(run: Run) -> str:
    found = run.island_loads
    share_MLE = found.counts_MLE / np.maximum(found.counts_MLE.sum(-1, keepdims=True), 1)
    apart_LE = share_MLE.max(0) - share_MLE.min(0)
    layer, expert = np.unravel_index(apart_LE.argmax(), apart_LE.shape)
    most, least = share_MLE[:, layer, expert].argmax(), share_MLE[:, layer, expert].argmin()
    said = (
        f"Rounds {found.first} to {found.last}. The busiest expert of any island has "
        f"{number(share_MLE.max() * share_MLE.shape[-1])} times the uniform load."
    )
    if len(found.islands) == 1:
        return said
    return (
        f"{said} Islands differ most about expert {expert} of layer {found.layers_L[layer]}: it gets "
        f"{percent(share_MLE[most, layer, expert])} of {plots.short(found.islands[most])} and "
        f"{percent(share_MLE[least, layer, expert])} of {plots.short(found.islands[least])}."
    )


def balance(run: Run) -> str:
    parts, floor = [], plots.noise_floor(run)
    violation = {layer: s.tail() for layer, s in run.layers("max_violation").items()}
    if violation:
        worst = max(violation, key=violation.get)
        above = [layer for layer, v in violation.items() if v > 2 * floor]
        verdict = f"above twice the sampling noise in {len(above)} of {len(violation)} layers"
        parts.append(
            "In the last tenth of the run max violation is "
            f"{spread(number(min(violation.values()), 2), number(violation[worst], 2))} by layer "
            f"(largest in layer {worst}), where a uniform random router would "
            f"show about {number(floor, 2)}: {verdict if above else 'no layer is above twice the sampling noise'}."
        )
    entropy = {layer: s.tail() for layer, s in run.layers("entropy").items()}
    experts = run.config["model"]["moe"]["num_experts"]
    if entropy and experts > 1:
        most = np.log(experts)
        ends = spread(percent(min(entropy.values()) / most), percent(max(entropy.values()) / most))
        parts.append(f"Router entropy ends at {ends} of ln E by layer.")
    return " ".join(parts)


def verdicts(found: Specialisation) -> list[bool]:
    """Per layer: does routing depend on the domain more than shuffled labels explain (Bonferroni over layers)?"""
    return [bool(p <= ALPHA / len(found.p_L)) for p in found.p_L]


def specialisation(found: Specialisation, layers: np.ndarray, domains: list[str]) -> str:
    l, g, e = found.top
    low, high = found.low_LGE[found.top], found.high_LGE[found.top]
    interval = (
        f"95% bootstrap interval {percent(low)} to {percent(high)}"
        if np.isfinite(low)
        else "too few documents for an interval"
    )
    sentence = (
        f"The most specialised pair is expert {e} of layer {layers[l]} with domain {domains[g]}: it gets "
        f"{percent(found.share_LGE[found.top])} of that domain's tokens ({interval}; "
        f"chance {percent(found.chance_L[l])}; mean over domains "
        f"{percent(np.nanmean(found.share_LGE[l, :, e]))})."
    )
    if found.p_top <= ALPHA:
        sentence += f" Shuffled domain labels do not give such an excess ({p_value(found.p_top)})."
    else:
        sentence += (
            f" This is not above the shuffled baseline ({p_value(found.p_top)}): the best of so many pairs is as "
            "large when the domain labels mean nothing."
        )
    passing = [int(layer) for layer, ok in zip(layers, verdicts(found)) if ok]
    if not passing:
        return sentence + " In no layer does routing depend on the domain more than shuffled labels explain."
    names = f"layer{'s' * (len(passing) > 1)} {_ranges(passing)}" if len(passing) < len(layers) else "every MoE layer"
    return sentence + f" Routing depends on the domain, beyond shuffled labels, in {names}."


def saturation(trace: Trace) -> str:
    """How early routing settles, with the chance level that a collapsed router would raise."""
    found, chance_SL = trace.saturation()
    s = int(np.argmin(np.abs(trace.steps_S - 0.5 * trace.steps_S[-1])))
    beyond_L = beyond_chance(found.value[s], chance_SL[s])
    slow, fast = int(beyond_L.argmin()), int(beyond_L.argmax())
    step = f"At step {trace.steps_S[s]:,} of {trace.steps_S[-1]:,}"
    each = [f"{percent(found.value[s, l])} in layer {trace.layers_L[l]}" for l in dict.fromkeys((slow, fast))]
    return (
        f"{step}, tokens already go to {' and '.join(each)} of the experts that they have at the end, the slowest and "
        f"the fastest layer; unrelated routing at the same loads would give "
        f"{spread(percent(chance_SL[s].min()), percent(chance_SL[s].max()))}. Corrected for that chance, "
        f"{spread(percent(beyond_L[slow]), percent(beyond_L[fast]))} of the way is done."
    )


def _ranges(numbers: list[int]) -> str:
    """[1, 3, 4, 5] -> "1 and 3 to 5"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return listed([spread(str(a), str(b)) for a, b in zip(starts, ends)])


def co_activation(probe: Probe) -> str:
    best = (0.0, 0, 0, 0, 0.0, 0.0)
    for layer, selected_NE in zip(probe.layers_L, probe.selected_LNE):
        observed_EE, expected_EE = coactivation.co_activation(selected_NE)
        count_E = selected_NE.sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio_EE = np.where(np.minimum.outer(count_E, count_E) >= 100, observed_EE / expected_EE, np.nan)
        if np.isfinite(ratio_EE).any() and np.nanmax(ratio_EE) > best[0]:
            i, j = np.unravel_index(np.nanargmax(ratio_EE), ratio_EE.shape)
            best = (ratio_EE[i, j], layer, i, j, observed_EE[i, j], expected_EE[i, j])
    ratio, layer, i, j, observed, expected = best
    if not ratio:
        return "No pair of experts has 100 probe tokens each."
    return (
        f"The strongest pair is in layer {layer}: {percent(observed)} of the tokens of expert {i} also go to expert "
        f"{j}, {number(ratio)} times what independent choices would give ({percent(expected)}); "
        "pairs with fewer than 100 tokens each are left out."
    )
