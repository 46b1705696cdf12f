"""What does the price of a model depend on, and can unlike devices give the 20% of the Ling report?

Command:   python experiments/ling_cost.py
Cost:      seconds; nothing is trained. It prints every assumption, and writes experiments/ling_cost/RESULTS.md.
Expected:  the totals of the report, 6.35M and 5.08M RMB for 1T tokens, need no more than 21% and 18 to 36% of the
           peaks; only device A is cheaper per FLOP than D, so that the saving rests on A, or on the others'
reaching a
           larger share of their peaks.
"""

import math
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from frugalmoe.ablate import load_comparison
from frugalmoe.config import load
from frugalmoe.cost import TRAIN_FACTOR, device_catalogue, forward_flops, islands, planning
from frugalmoe.cost.laws import published
from frugalmoe.files import write_generated
from frugalmoe.model.transformer import count_parameters
from frugalmoe.schema import Model

PAGE = Path(__file__).parent / "ling_cost/RESULTS.md"
SEQUENCE = 4096


class Device(NamedTuple):
    """A row of table 1 of the Ling report (arXiv 2503.05139), from the device catalogue."""

    name: str
    peak: float  # FLOP/s, bfloat16
    memory: int  # GB
    rate: float  # RMB an hour: what the report calls a fair cost
    likely: str  # which device it is taken for; the report does not say


def _device(name: str) -> Device:
    entry = device_catalogue.read().get(f"ling-{name.lower()}")
    peak, memory, rate = (entry.value(cell) for cell in ("bf16_tflops", "memory_gb", "price_per_hour"))
    return Device(name, peak, round(memory / 1e9), rate, entry.title.partition(", ")[2])


DEVICES = tuple(map(_device, "ABCDE"))
BY_NAME = {device.name: device for device in DEVICES}
TOKENS = 1e12
COUNT = 2048  # devices that the planner is asked about
DEAR, CHEAP = 6.35e6, 5.08e6  # RMB for 1T tokens of Ling-Plus: on D, and on "a lower-specification hardware system"
ACTIVE = 28.8e9  # parameters of Ling-Plus, as the report counts them
RMB_PER_DOLLAR = 7.25

# model -> its config and what is published: total and active parameters, in billions
LING = {
    "Ling-Lite": ("ling_1:lite", {}, 16.8, 2.75),
    "Ling-Plus": ("ling_1:plus", {}, 290, 28.8),
    "Ling-mini-2.0": ("ling_2:mini", {}, 16.26, 1.43),
    "Ling-flash-2.0": ("ling_2:flash", {}, 103, 6.1),
    "Ling-1T": ("ling_2:1t", {}, 1000, 51.0),
}
# The pair of arXiv 2507.17702, whose counts leave the vocabulary out.
LEVERAGE_PAIR = {
    "Ling-mini-beta": ("ling_2:mini", {"num_experts": 384, "num_experts_per_token": 12, "expert_dim": 384}, 17.5, 0.85),
    "Dense-6.1B": ("llama", {}, 6.11, 6.11),
}

# DeepSeek-V3 (arXiv 2412.19437 table 1; ISCA 2025 "Insights" for what was measured on 2,048 H800)
H800_HOURS = {"pre-training": 2_664e3, "longer context": 119e3, "post-training": 5e3}
H800_RATE, H800_PEAK, V3_FLOPS, V3_TOKENS = 2.0, 989.5e12, 250e9, 14.8e12  # dollars; FLOP/s; FLOPs of a token


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows))


def six_n() -> float:
    """Returns the FLOPs of 1T tokens that the report's figures are compared with: 6 for each active parameter."""
    return 6 * ACTIVE * TOKENS


def relative(device: Device) -> float:
    """Returns a peak FLOP's price over that of device D."""
    return device.rate / device.peak / (BY_NAME["D"].rate / BY_NAME["D"].peak)


def saving() -> float:
    return 1 - CHEAP / DEAR


def text() -> str:
    parts = [
        _question(),
        _devices(),
        _conventions(),
        _mixes(),
        _planned(),
        _parameters(),
        _deepseek(),
        _hyper_parameters(),
    ]
    parts += [_leverage(), _reliability(), _percentages()]
    return "\n\n".join(map(_wrapped, "\n\n".join(parts).split("\n\n")))


def _wrapped(paragraph: str) -> str:
    if paragraph.startswith(("|", "#", "```", "- ")):
        return paragraph
    return textwrap.fill(paragraph, 118, break_on_hyphens=False, break_long_words=False)


def _question() -> str:
    return f"""\
# ling_cost

What does the price of a model depend on, and can unlike devices give the 20% of the Ling report?

**Assumed.** Peaks, memory and prices are those of table 1 of the Ling report (arXiv 2503.05139), as
`cost/devices.toml` has them; it calls the price a fair cost, and says neither what the devices are nor what is in it.
{six_n():.4g} FLOPs for 1T tokens: 6 for each of {ACTIVE / 1e9:.1f}B active parameters. No failures, no idle time, one
utilization for the whole run; {RMB_PER_DOLLAR} RMB are a dollar. The report discloses no utilization, no number of
devices, no mix and no precision: what is said of them here is solved for, not measured.

**Found.** The two totals, {DEAR / 1e6:.2f}M and {CHEAP / 1e6:.2f}M RMB for 1T tokens
({DEAR / RMB_PER_DOLLAR / 1e6:.3f}M and {CHEAP / RMB_PER_DOLLAR / 1e6:.3f}M dollars), are {saving():.1%} apart."""


def _devices() -> str:
    flops, rows = six_n(), []
    for device in DEVICES:
        at_peak = published.device_hours(flops, device.peak, 1.0) * device.rate
        dear, cheap = (published.utilization_for(flops, device.peak, device.rate, total) for total in (DEAR, CHEAP))
        hours = CHEAP / device.rate
        rows.append((
            device.name, f"{device.peak / 1e12:.0f}", f"{device.memory}", f"{device.rate:g}", device.likely,
            f"{1e15 * device.rate / device.peak:.2f}", f"{relative(device):.3f}", f"{at_peak / 1e6:.3f}M",
            f"{dear:.1%}", f"{cheap:.1%}", f"{hours:,.0f}", f"{TOKENS / hours / 3600:,.0f}",
        ))  # fmt: skip
    columns = (
        "device", "peak TFLOP/s", "GB", "RMB/h", "taken for", "RMB per peak PFLOP-hour", "of D's",
        "1T tokens at the peak, RMB", f"utilization for {DEAR / 1e6:.2f}M", f"for {CHEAP / 1e6:.2f}M",
        f"device-hours at {CHEAP / 1e6:.2f}M", "tokens/s of a device",
    )  # fmt: skip
    d = BY_NAME["D"]
    hours = DEAR / d.rate
    return f"""\
## The five devices

{table(columns, rows)}

price = FLOPs / (peak x utilization x 3600 s) x RMB an hour, solved for the utilization. At {DEAR / 1e6:.2f}M
RMB device
D works {hours:,.0f} hours for 1T tokens: {TOKENS / hours / 3600:,.0f} tokens/s,
{flops / hours / 3600 / 1e12:.0f} TFLOP/s. The 9T tokens of the whole run would cost {9 * DEAR / 1e6:.1f}M RMB
on D and
{9 * CHEAP / 1e6:.1f}M on the other system."""


def conventions() -> dict[str, float]:
    """Returns the FLOPs of 1T tokens of Ling-Plus, by who counts."""
    model = load("ling_1:plus").model
    head = forward_flops(model, SEQUENCE)["head"]
    return {
        "6 per active parameter": six_n(),
        "attention of a causal model, and the head (`cost/flops.py`)": TRAIN_FACTOR
        * TOKENS
        * sum(forward_flops(model, SEQUENCE).values()),
        "attention not masked, and the head": TRAIN_FACTOR
        * TOKENS
        * (published.nonembedding_flops(model, SEQUENCE) + head),
    }


def _conventions() -> str:
    d, rows = BY_NAME["D"], []
    for name, flops in conventions().items():
        found = published.utilization_for(flops, d.peak, d.rate, DEAR)
        rows.append((name, f"{flops:.4g}", f"{flops / six_n():.2f}", f"{found:.1%}"))
    return f"""\
The same run has other utilizations where other FLOPs are counted:

{table(("counted", "FLOPs of 1T tokens", "of the first", "utilization of D"), rows)}"""


def _mixes() -> str:
    wanted = 1 - saving()
    single = [
        (device.name, f"{relative(device):.3f}", f"{relative(device) / wanted:.2f}",
         f"{published.utilization_for(six_n(), device.peak, device.rate, CHEAP):.1%}",
         "yes" if relative(device) <= wanted else "no")
        for device in DEVICES
    ]  # fmt: skip
    pairs = []
    a = BY_NAME["A"]
    for device in (d for d in DEVICES if d is not a):
        share = published.share_needed(relative(a), relative(device), wanted)
        hours = [tokens / d.peak for tokens, d in ((share, a), (1 - share, device))]
        pairs.append((f"A and {device.name}", f"{share:.1%}", f"{hours[0] / sum(hours):.1%}"))
    others = [d for d in DEVICES if d is not a]
    cheapest = min(map(relative, others))
    return f"""\
## Which mixes give the 20%, and which cannot

If every device reached the utilization that D needs for {DEAR / 1e6:.2f}M
({published.utilization_for(six_n(), BY_NAME["D"].peak, BY_NAME["D"].rate, DEAR):.1%}), 1T tokens would cost this much
of the price on D; the saving needs {wanted:.2f}, and so this factor on a device's utilization over D's:

{table(("device alone", "of D's price", "factor on utilization", "that is", "20% at equal utilization"), single)}

**Mixes with A.** At equal utilization the share of tokens (and of the devices' hours) that A must do for the 20%:

{table(("mix", "tokens on A", "device-hours on A"), pairs)}

**Mixes without A cannot**, at equal utilization: the cheapest of {", ".join(d.name for d in others)} is
{cheapest:.2f} of D's price, and a mix is never cheaper than its cheapest part. They need the factors
above, weighted by tokens. For E that means
{published.utilization_for(six_n(), BY_NAME["E"].peak, BY_NAME["E"].rate, CHEAP):.0%} of a small peak beside a
large memory
bandwidth: not out of reach, since DeepSeek-V3 measured 39% on H800, but nothing that the report says. A alone may be
at {relative(a) / wanted:.2f} of D's utilization."""


def _planned() -> str:
    config, rows, prices = load("ling_1:plus"), [], {}
    ask = planning.Ask(config, TOKENS, currency="CNY")
    for device in DEVICES:
        entry = device_catalogue.read().get(f"ling-{device.name.lower()}")
        part = planning.part(ask, planning.Offer(entry, COUNT, device.rate), COUNT)
        hours = TOKENS / part.speed / 3600 * COUNT
        prices[device.name] = hours * device.rate
        lacking = ", ".join(cell for cell in entry.borrowed if cell in ("bandwidth_gb_s", "link_gb_s", "network_gb_s"))
        rows.append([
            device.name, f"{part.fit.mfu:.1%}", f"{part.uptime.goodput:.1%}", f"{hours:,.0f}",
            f"{prices[device.name] / 1e6:.2f}M", "", lacking,
        ])  # fmt: skip
    for row in rows:
        row[5] = f"{prices[row[0]] / prices['D']:.2f}"
    columns = ("device", "utilization", "goodput", "device-hours", "RMB for 1T tokens", "of D's", "not known of it")
    return f"""\
## What our own planner says

`frugalmoe plan` for `configs/ling_1.py:plus` on {COUNT:,} of each, bfloat16, with failures (8,900 hours between two
of a device) and this project's layouts, which have no pipelines. What is not known of a device is another's, so that
the column of prices is no better than these cells; none of it was in the report.

{table(columns, rows)}"""


def overridden(name: str, changes: dict) -> Model:
    """Returns a model of a config with other fields of its experts; `llama` is a dense model of the pair's sizes."""
    if name == "llama":
        plain = load("ling_2:mini").model
        return replace(
            plain, dim=4096, num_layers=28, num_dense_layers=28, dense_dim=14_336, num_heads=32, num_kv_heads=8
        )
    model = load(name).model
    return replace(model, moe=replace(model.moe, **changes))


def _parameters() -> str:
    rows = []
    for name, (config, changes, total, active) in LING.items():
        found = count_parameters(overridden(config, changes))
        rows.append((
            name, f"{found['total'] / 1e9:.3f}B", f"{total:g}B", f"{found['active'] / 1e9:.3f}B", f"{active:g}B",
            f"{(found['active'] - found['embedding'] - found['head']) / 1e9:.3f}B",
        ))  # fmt: skip
    for name, (config, changes, total, active) in LEVERAGE_PAIR.items():
        found = count_parameters(overridden(config, changes))
        vocabulary = found["embedding"] + found["head"]
        without = [(found[kind] - vocabulary) / 1e9 for kind in ("total", "active")]
        rows.append((f"{name}, no vocabulary", f"{without[0]:.3f}B", f"{total:g}B", f"{without[1]:.3f}B",
                     f"{active:g}B", f"{without[1]:.3f}B"))  # fmt: skip
    columns = ("model", "parameters", "published", "active", "published", "active, no embedding and head")
    return f"""\
## Parameters

From `configs/ling_1.py`, `configs/ling_2.py` and the pair of arXiv 2507.17702 (1 dense layer of 20 taken), counted by
shapes. Digests that give Ling-Plus 256 routed experts are wrong: only 64 make 290B.

{table(columns, rows)}"""


def _deepseek() -> str:
    total = sum(H800_HOURS.values())
    per_trillion = H800_HOURS["pre-training"] / V3_TOKENS * 1e12
    done = V3_FLOPS * TOKENS / (180e3 * 3600)
    on_d = 180e3 * BY_NAME["D"].rate
    config = load("deepseek_v3").model
    ours = TRAIN_FACTOR * sum(forward_flops(config, SEQUENCE).values())
    module = TRAIN_FACTOR * forward_flops(config, SEQUENCE)["multi-token prediction"]
    return f"""\
## DeepSeek-V3

{" + ".join(f"{hours / 1e3:,.0f}K ({name})" for name, hours in H800_HOURS.items())} =
{total / 1e3:,.0f}K hours of H800; at {H800_RATE:.0f} dollars each {total * H800_RATE / 1e6:.3f}M dollars.
{per_trillion / 1e3:.0f}K hours for 1T tokens are {180e3 / 2048 / 24:.1f} days of 2,048. With the
{V3_FLOPS / 1e9:.0f} GFLOP a token that its authors count, that is
{done / 1e12:.1f} TFLOP/s: {done / H800_PEAK:.1%} of the bfloat16 peak, where they measured 38.94%.
`cost/flops.py` counts {ours / 1e9:.2f} GFLOP a token from `configs/deepseek_v3.py`, {module / 1e9:.2f} of them for
the module that predicts a second token.

At the price of device D, 180K hours are {on_d / 1e6:.2f}M RMB for 37B active parameters,
{on_d / 1e6 * ACTIVE / 37e9:.2f}M for as many as Ling-Plus has: {DEAR / (on_d * ACTIVE / 37e9):.2f} times less
than the
{DEAR / 1e6:.2f}M of the report. A better-tuned run on D (DeepSeek's, in FP8) is worth more than the mix."""


def _hyper_parameters() -> str:
    rows = []
    plus = load("ling_1:plus")
    compute = published.training_compute(plus.model, SEQUENCE, 9e12)
    law = published.LING_1
    rows.append(("Ling-Plus, 9T", "Ling 1", f"{compute:.3e}", f"{law.rate.at(compute):.3e}", "2.4e-4",
                 f"{law.batch.at(compute) / SEQUENCE:,.0f}", "8,960"))  # fmt: skip
    law = published.LEVERAGE_PAPER
    for size, name in (("mini", "Ling-mini-2.0"), ("flash", "Ling-flash-2.0"), ("1t", "Ling-1T")):
        config = load(f"ling_2:{size}")
        compute = published.training_compute(config.model, SEQUENCE, 20e12)
        rows.append((f"{name}, 20T", "leverage paper", f"{compute:.3e}", f"{law.rate.at(compute):.3e}",
                     f"{config.optim.learning_rate:.2e}", f"{law.batch.at(compute) / SEQUENCE:,.0f}",
                     f"{config.train.batch_size:,}"))  # fmt: skip
    columns = ("run", "law", "C", "learning rate by law", "used", "batch by law (sequences)", "used")
    lines = [f"- {name}: learning rate {law.rate.coefficient:g} C^{law.rate.exponent:g}, batch in tokens "
             f"{law.batch.coefficient:g} C^{law.batch.exponent:g} ({law.source})"
             for name, law in (("Ling 1", published.LING_1), ("leverage paper", published.LEVERAGE_PAPER))]  # fmt: skip
    product = [f"{law.size.coefficient * law.tokens.coefficient:.3f}" for law in (published.MOE, published.DENSE)]
    return f"""\
## Laws of learning rate and batch

{chr(10).join(lines)}

{table(columns, rows)}

C counts three forward passes without embedding and head, attention not masked; with it the learning rates that
Ling 2.0 used follow from the law to 0.2%, which fixes the convention. The laws of allocation of the same
paper, forward FLOPs per
token M and tokens D of a compute C = M D, multiply to {product[0]} (experts) and {product[1]} (dense) times C."""


def _leverage() -> str:
    columns = ("A", *(f"1e{e}, G = {g}" for e in (18, 20, 22, 24) for g in (2, 8, 12)))
    rows = [(f"{a:.1%}", *(f"{published.leverage(a, g, 10.0**e):.2f}" for e in (18, 20, 22, 24) for g in (2, 8, 12)))
            for a in (0.008, 0.031, 0.10, 0.50, 1.0)]  # fmt: skip
    beta = published.leverage(13 / 385, 2 * 2048 / 384, 1e22)
    plus = [published.leverage(5 / 65, 3.5, c) for c in (1e21, 1e24)]
    return f"""\
## Efficiency leverage

How many times as much compute a dense model needs for the same loss, by the law of arXiv 2507.17702, in the
activation
ratio A, the granularity G = 2 D / F and the compute. The paper does not say which logarithms it takes: log10
of C with
log2 of G gives {published.leverage(0.031, 12, 1e22):.2f} at A = 3.1%, G = 12, C = 1e22, where it prints more than 7,
and a best granularity of {published.best_granularity():.1f}, where it prints about 12. Natural logarithms give
neither.

{table(columns, rows)}

Measured by us: what a mixture of experts needs of the FLOPs of a dense model to reach its final loss, in two studies of
0.85M active parameters, beside the law where it was never fitted, a million times below its range. Seeds that do not
reach it are left out, which flatters.

{table(("study, arm", "A", "G", "C", "reach it", "leverage measured", "by law"), _measured())}

Ling-mini-beta (13 of 385, G = 10.7) has {beta:.2f} at 1e22. Ling-Plus (5 of 65, G = 3.5) has {plus[0]:.1f} at 1e21,
where the Ling report's own figure 13 has about 3, and {plus[1]:.1f} at 1e24, where it has more than 3.5: the
two papers
agree at 1e21 and not on the growth."""


def _measured() -> list[tuple[str, ...]]:
    """Returns the arms of our studies: leverage is 1 / the share of FLOPs, mean over the seeds that reach the loss."""
    rows = []
    for study in ("moe_vs_dense", "moe_vs_dense_mixed"):
        c = load_comparison(Path(__file__).parent / study)
        for arm in c.arms[1:]:
            experts = c.study["arms"][arm]["model.moe.num_experts"]
            ratio = c.study["experts_per_token"][arm] / experts
            shares = [share for share in c.cost_to_target(arm)["flops"] if math.isfinite(share)]
            found = f"{len(shares) / sum(shares):.2f}" if shares else "below 1"
            by_law = published.leverage(ratio, 2.0, c.training_flops(arm))
            rows.append((f"{study}, {arm}", f"{ratio:.1%}", "2", f"{c.training_flops(arm):.1e}",
                         f"{len(shares)} of {len(c.final(c.metric, arm))}", found, f"{by_law:.2f}"))  # fmt: skip
    return rows


def _reliability() -> str:
    minutes = islands.best_interval(1440 / 0.625, 0.5)
    hour = 3600.0
    rows = []
    for name, of_device in (("50,700 h (Llama 3, H100)", 50_700 * hour), ("8,900 h (DLRover's fleet)", 8_900 * hour)):
        between = islands.time_between_failures(of_device, 2048, 1)
        young = islands.best_interval(between, 90.0)
        longest = published.best_interval_with_recovery(between, 90.0, 1200.0)
        rows.append((name, f"{between / hour:.1f} h", f"{young / 60:.0f} min", f"{longest / 60:.0f} min",
                     f"{islands.goodput(between, 1200.0, young, 90.0):.1%}"))  # fmt: skip
    columns = ("a device fails after", "2,048 of them after", "Young's interval", "with recovery", "goodput")
    fast = islands.step_seconds(1, 1.661, 0.004, 4096)
    return f"""\
## Checkpoints, failures, stragglers

Taken: a checkpoint stops the run for 90 s, a failure for 20 minutes.

{table(columns, rows)}

Young's sqrt(2 T save); with recovery, save + sqrt(2 (T + recovery) save + save^2) (arXiv 2410.18124). The rule of
Ling 2.0, s = sqrt(2880 C / F) minutes with C minutes for a save and F failures a day, is Young's: C = 0.5 and
F = 0.625 give
the {minutes:.0f} minutes that it used. If 0.27% of devices fail in a day, a run on 1,000 has a failure on
{published.any_fails(0.0027, 1000):.1%} of days, as DLRover says.

Stragglers (the report's figure of EDiT): with each of N workers slow in 0.4% of steps, by 1.661, a step of
4,096 takes
{fast:.3f} of an undisturbed one. The 66.1% of the report is a gain in throughput; time falls by
{1 - 1 / 1.661:.1%}."""


FLOOD = {"Ling-Lite, 1x E": (4355, 5869, 1.35), "Ling-Lite, 1x C": (3576, 5451, 1.52),
         "Ling-Plus, 16x B": (2331, 4857, 2.08), "Ling-Plus FP8, 8x E": (2742, 6569, 2.40)}  # fmt: skip
# tokens/s of 8, 16 and 32 devices of 80 GB (README of Ling-V2)
LLAMA = (81_222, 161_319, 321_403)
MINI = {"with the module": ((109_532, 221_585, 448_726), (34.9, 37.4, 39.6)),
        "without": ((128_298, 307_264, 611_466), (58.0, 90.5, 90.2))}  # fmt: skip
SAFETY = {"Ling-Plus": ((89.50, 96.09, 98.40, 90.24), 93.56), "DeepSeek-V2.5": ((75.50, 96.26, 97.20, 91.96), 90.23),
          "Qwen2.5-72B": ((92.50, 96.26, 96.26, 77.15), 91.18), "Llama-3.1-70B": ((80.50, 93.52, 100, 60.11), 83.53),
          }  # fmt: skip
BABEL = (6 * 60, 10, 36)  # minutes to list 190M files before and after, and the factor that is printed


def _percentages() -> str:
    rows = [(f"Flood, {name}", f"{new:,} / {old:,} tokens/s", f"{new / old:.2f}", f"{printed:.2f}")
            for name, (old, new, printed) in FLOOD.items()]  # fmt: skip
    for name, (speeds, gains) in MINI.items():
        found = ", ".join(f"+{100 * (new / old - 1):.1f}%" for new, old in zip(speeds, LLAMA))
        rows.append((f"Ling-mini {name}, over Llama 3.1 8B", "8, 16, 32 devices", found,
                     ", ".join(f"+{gain}%" for gain in gains)))  # fmt: skip
    rows += [(f"safety, {name}", "mean of 4", f"{sum(scores) / 4:.2f}", f"{printed:.2f}")
             for name, (scores, printed) in SAFETY.items()]  # fmt: skip
    rows.append(("Babel, listing 190M files", f"{BABEL[0]} / {BABEL[1]} min", f"{BABEL[0] / BABEL[1]:.0f}",
                 f"{BABEL[2]}"))  # fmt: skip
    return f"""\
## Figures that follow from others

{table(("figure", "from", "found", "printed"), rows)}

All do but one: the four scores of Qwen2.5-72B, as they were noted down, have another mean than the one that is
printed.

## Again

```bash
python experiments/ling_cost.py
```"""


def main() -> int:
    PAGE.parent.mkdir(exist_ok=True)
    write_generated(PAGE, text())
    print(text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
