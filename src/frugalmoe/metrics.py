"""Every metric of a run: its name, what it is called, its unit, which way is better, and what it is made from.

A name is that of `metrics.jsonl` without its layer: `router/entropy` for `router/entropy/layer_03`. One that ends in a
slash is a family, as `eval/loss/` of domains, `suite/accuracy/` of tasks, and `loss/` of auxiliary losses, which
strategies bring with them. The tables, pictures and studies read their words here, and a study may ask for whatever has
a row.
"""

import re
from typing import NamedTuple

HELD_OUT = "held-out documents at the end"
VALIDATION = "the validation set of one's own (data.validation.path) at the end"
TRAINING = "training batches, mean over the last tenth of the steps"
CLOCK = "the clock of the machine, with whatever else ran on it"
SHAPES = "the shapes of the model"
VIRTUAL = "the rounds of virtual islands (islands.virtual), whose clock is made up"
SUITE = "the suite that is ours, at the end"

LESS, MORE, NEITHER = "less", "more", ""
NATS = "nats per token"


class Metric(NamedTuple):
    name: str
    label: str
    unit: str  # empty for shares, ratios and plain numbers
    better: str  # less, more, or neither: what a comparison may call better
    source: str

    @property
    def title(self) -> str:
        """The label with its unit, as of an axis or a column."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


ROWS = (
    Metric("eval/loss/", "loss", NATS, LESS, HELD_OUT),
    Metric("eval/bits_per_byte/", "bits per byte", "", LESS, HELD_OUT),
    Metric("validation/loss/", "validation loss", NATS, LESS, VALIDATION),
    Metric("validation/bits_per_byte/", "validation bits per byte", "", LESS, VALIDATION),
    Metric("suite/accuracy/", "accuracy", "", MORE, SUITE),
    Metric("suite/margin/", "margin of the right choice", "nats", MORE, SUITE),
    Metric("train/loss", "training loss, last tenth", NATS, LESS, TRAINING),
    Metric("loss/ce", "training loss", NATS, LESS, TRAINING),
    Metric("loss/total", "training loss with all added losses", NATS, LESS, TRAINING),
    Metric("loss/logit_z", "squared log-normalizer of the output", "nats²", NEITHER, TRAINING),
    Metric("loss/load_balance", "load balance loss", "", LESS, TRAINING),
    Metric("loss/sequence_balance", "sequence balance loss", "", LESS, TRAINING),
    Metric("loss/z", "squared log-normalizer of the router", "nats²", NEITHER, TRAINING),
    Metric("loss/mtp", "loss of the tokens further ahead", NATS, LESS, TRAINING),
    Metric("loss/depth_predictor", "loss of the depth predictor", "nats", LESS, TRAINING),
    Metric("loss/", "auxiliary loss", "", NEITHER, TRAINING),
    Metric("optim/gradient_norm", "gradient norm", "", NEITHER, TRAINING),
    Metric("optim/parameter_norm", "parameter norm", "", NEITHER, TRAINING),
    Metric("optim/learning_rate", "learning rate", "", NEITHER, TRAINING),
    Metric("data/position", "batches taken from the data, where some were skipped", "", NEITHER, TRAINING),
    Metric("router/max_violation", "max violation", "", LESS, HELD_OUT),
    Metric("router/load_entropy", "load entropy", "nats", MORE, HELD_OUT),
    Metric("router/dead_experts", "dead experts", "", LESS, HELD_OUT),
    Metric("router/active_per_token", "experts per token", "", NEITHER, HELD_OUT),
    Metric("router/drop_rate", "drop rate", "", LESS, HELD_OUT),
    Metric("router/device_load", "load of the busiest device", "of the mean", LESS, HELD_OUT),
    Metric("router/overflow_rate", "share of experts beyond a token's slots", "", LESS, HELD_OUT),
    Metric("router/entropy", "router entropy", "nats", NEITHER, HELD_OUT),
    Metric("router/logit_lse", "log-normalizer of the router", "nats", NEITHER, HELD_OUT),
    Metric("router/tie_rate", "tie rate", "", LESS, HELD_OUT),
    Metric("depth/share", "share of tokens that pass", "", NEITHER, HELD_OUT),
    Metric("depth/predictor_accuracy", "accuracy of the depth predictor", "", MORE, HELD_OUT),
    Metric("speed/tokens_per_second", "training speed", "tokens per second", MORE, CLOCK),
    Metric("speed/step_seconds", "step time", "seconds", LESS, CLOCK),
    Metric("islands/seconds", "time of virtual islands", "virtual seconds", LESS, VIRTUAL),
    Metric("islands/tokens", "tokens that rounds merged", "", NEITHER, VIRTUAL),
    Metric("islands/tokens_per_second", "speed of virtual islands", "tokens per virtual second", MORE, VIRTUAL),
    Metric("islands/share_trained", "share of their time in which islands train", "", MORE, VIRTUAL),
    Metric("cost/active_flops", "active FLOPs per token", "forward pass", LESS, SHAPES),
    Metric("parameters/total", "parameters", "", NEITHER, SHAPES),
    Metric("parameters/active", "active parameters", "", NEITHER, SHAPES),
)
_BY_NAME = {metric.name: metric for metric in ROWS}


def find(name: str) -> Metric | None:
    """The row of a metric, with its own name; one of a family is called by what follows. None for an unknown name."""
    name = re.sub(r"/layer_\d+$", "", name)
    if name in _BY_NAME:
        return _BY_NAME[name]
    family = next((m for m in ROWS if m.name.endswith("/") and name.startswith(m.name) and name != m.name), None)
    if family is None:
        return None
    member = name.removeprefix(family.name)
    if family.name == "loss/":
        return family._replace(name=name, label=f"{member.replace('_', ' ')} loss")
    return family._replace(name=name, label=family.label if member == "mean" else f"{family.label} of {member}")


def titled(name: str) -> str:
    """What a table or an axis calls a metric: label and unit, or the name itself where it has no row."""
    metric = find(name)
    return metric.title if metric else name


def prefixed(prefix: str) -> list[Metric]:
    """The rows under `router/`, `depth/` and the like, families left out."""
    return [m for m in ROWS if m.name.startswith(prefix) and not m.name.endswith("/")]
