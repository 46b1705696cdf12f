"""Ling-Plus on unlike devices, on paper: what `make paper` writes into docs/islands.md, from sizes and closed forms."""

import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import conftest  # noqa: F401  its environment of JAX, for the command too

from frugalmoe.config import load
from frugalmoe.cost import device_catalogue, islands
from frugalmoe.cost.flops import TRAIN_FACTOR, forward_flops
from frugalmoe.files import write_generated
from frugalmoe.model.transformer import count_parameters

PAGE = Path(__file__).parents[1] / "docs/islands.md"
CONFIG = "ling_1:plus"
HOUR = 3600.0


class Device(NamedTuple):
    """A row of table 1 of the Ling report (arXiv 2503.05139), from the device catalogue."""

    name: str
    peak: float  # FLOP/s, bfloat16
    price: float  # RMB per hour


def _device(name: str) -> Device:
    entry = device_catalogue.read().get(f"ling-{name.lower()}")
    return Device(name, entry.value("bf16_tflops"), entry.value("price_per_hour"))


DEVICES = tuple(map(_device, "ABD"))
COUNT, UTILIZATION = 512, 0.3  # devices of an island, and the share of the peak that they reach: taken, for all alike
RMB_PER_DOLLAR = 7.25
SPEEDS = (1e9, 10e9, 100e9)  # bits per second between an island and the store
FRAGMENTS = 24
BITS = ("float32", "bfloat16", "int8", "int4")
STATE = 8  # bytes of a parameter in the outer state: itself and its momentum, float32

GIB = 2**30
PRICES = {
    "R2": islands.Prices(
        0.015 / 1e9 / (30 * islands.DAY), 0.0, 4.5e-6, 0.36e-6,
        "Cloudflare R2 (developers.cloudflare.com/r2/pricing, as of 13 June 2026): $0.015 per GB and month, $4.50 and "
        "$0.36 per million requests that write and that read, nothing for bytes that leave it.",
    ),
    "Google": islands.Prices(
        2.7397e-5 / GIB / HOUR, 0.12 / GIB, 5e-6, 0.4e-6,
        "Google Cloud Storage in one region (cloud.google.com/storage/pricing, as of 20 September 2026): $0.000027397 "
        "per GiB and hour, $0.005 and $0.0004 per thousand requests, $0.12 per GiB that goes to the internet: that of "
        "a month's first 10 TiB, and so more than such amounts would cost.",
    ),
}  # fmt: skip
KEPT_ROUNDS = 2

FLEETS = {"8,900 h": 8_900 * HOUR, "50,700 h": 50_700 * HOUR}  # mean time until a device fails
ALL_DEVICES, DOWN, SAVING = 16_384, 20 * 60.0, 90.0

FAST, SLOW_FACTOR, PROBABILITY = 1 / 0.0912, 1.661, 0.004
PRINTED = {1: 0.091, 256: 0.064, 1024: 0.055, 2048: 0.055, 4096: 0.055}  # steps per second


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows))


def large(value: float, unit: str = "B") -> str:
    """With three digits and a prefix; without one if there is no unit."""
    if not unit:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size * 0.9995:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def text() -> str:
    config = load(CONFIG)
    size, length = count_parameters(config.model)["total"], config.data.sequence_length
    flops = TRAIN_FACTOR * sum(forward_flops(config.model, length).values())
    batch = config.train.batch_size * length / len(DEVICES)
    speeds = [islands.tokens_per_second(COUNT, device.peak, UTILIZATION, flops) for device in DEVICES]
    parts = [_devices(speeds, batch, flops, size), _bytes(size, speeds, batch), _rounds(size)]
    parts += [_storage(size), _goodput(), _stragglers()]
    return "\n\n".join(map(_wrapped, "\n\n".join(parts).split("\n\n")))


def _wrapped(paragraph: str) -> str:
    """A table stays as it is."""
    return paragraph if paragraph.startswith("|") else textwrap.fill(paragraph, 118, break_on_hyphens=False)


def _devices(speeds: Sequence[float], batch: float, flops: float, size: int) -> str:
    rows = [
        (
            device.name, f"{device.peak / 1e12:.0f}", f"{speed:,.0f}", f"{batch / speed:.1f} s",
            f"{HOUR * speed / batch:.0f}", f"{islands.DAY * speed / 1e9:.1f}B", f"{100 * speed / sum(speeds):.0f}%",
            f"{1e12 / speed / HOUR * COUNT * device.price / 1e6:.2f}M",
        )
        for device, speed in zip(DEVICES, speeds)
    ]  # fmt: skip
    columns = ("device", "peak TFLOP/s", "tokens/s", "a step", "steps an hour", "tokens a day", "share", "RMB per 1T")
    kept = islands.kept_when_all_wait(speeds)
    day = islands.DAY * sum(speeds)
    return f"""\
`configs/ling_1.py:plus` has {size / 1e9:.1f}B parameters, and a token of a sequence of 4,096 costs
{flops / 1e9:.1f} GFLOP to train on (`cost/flops.py`). Three islands of {COUNT} devices each, of kinds A, B and
D of the Ling report (table 1: peak and price; the report says neither what the devices are nor how many). Every
device is taken to reach {UTILIZATION:.0%} of its peak, and every island makes steps of a third of the published
batch, {batch / 1e6:.1f}M tokens.

{table(columns, rows)}

Together {day / 1e9:.0f}B tokens a day: the published 9T take {9e12 / day:.0f} days. In rounds that end after a
wall time each island does the steps that it can. If all three made equal steps and waited for the slowest,
{kept:.0%} of that would be left."""


def _bytes(size: int, speeds: Sequence[float], batch: float) -> str:
    rounds, rows = 24, []
    for bits in BITS:
        moved = islands.traffic(size, bits, len(DEVICES))
        part = islands.traffic(size, bits, len(DEVICES), FRAGMENTS)
        day = rounds * (moved.sent + moved.received)
        rows.append((
            bits, *map(large, (moved.sent, moved.received, part.sent, day)),
            *(large(8 * rounds * moved_of / islands.DAY, "bit/s") for moved_of in (moved.sent, moved.received)),
        ))  # fmt: skip
    columns = ("", "sent", "received", f"sent of 1 of {FRAGMENTS}", "both, a day", "sending", "receiving")
    gradient = islands.all_reduce(size, "bfloat16", len(DEVICES))
    step = batch * len(DEVICES) / sum(speeds)
    return f"""\
### Bytes

Of one island in one round, and of one day with {rounds} rounds. Every island merges for itself, so it reads
what the two others sent: M islands move M (M - 1) contributions. int8 and int4 include a float32 step for each
128 values.

{table(columns, rows)}

With P = {FRAGMENTS} fragments, one in flight at a time, a round of the whole model is {FRAGMENTS} small ones: a
day moves the same bytes, in pieces of a {FRAGMENTS}th. Synchronous training with the same islands would send
{large(gradient)} per island in every step of {step:.1f} s (gradients in bfloat16, a ring):
{large(8 * gradient / step, "bit/s")}."""


def _rounds(size: int) -> str:
    rows = []
    for bits in BITS:
        moved = islands.traffic(size, bits, len(DEVICES))
        seconds = [islands.transfer_seconds(moved, speed / 8) for speed in SPEEDS]
        most = [large(islands.rounds_per_day(0, s, True), "") for s in seconds]
        waiting = [f"{islands.rounds_per_day(HOUR, s, False) / 24:.1%}" for s in seconds]
        rows.append((bits, *most, *waiting))
    names = [large(speed, "bit/s") for speed in SPEEDS]
    columns = ("", *(f"rounds a day, {name}" for name in names), *(f"computing, {name}" for name in names))
    return f"""\
### Rounds in a day

How many rounds of the whole model a link can carry in a day when it is always busy: that many cost no time, if
the transfer goes on beside the steps. And which share of time is left for steps if each hour of them is
followed by a transfer that they wait for.

{table(columns, rows)}"""


def _storage(size: int) -> str:
    rounds, rows, largest = 24, [], islands.LARGEST_OBJECT // GIB
    devices = sum(device.price for device in DEVICES) * COUNT * 24 / RMB_PER_DOLLAR
    for bits in BITS:
        moved = islands.traffic(size, bits, len(DEVICES))
        kept, found = KEPT_ROUNDS * moved.stored + STATE * size, []
        for prices in PRICES.values():
            lying, moving = islands.storage_per_day(moved, rounds, kept, prices)
            found += [f"${lying:,.0f}", f"${moving:,.0f}", f"{(lying + moving) / devices:.2%}"]
        rows.append((bits, large(kept), *found))
    columns = ["", "kept", *(f"{name}: {what}" for name in PRICES for what in ("lying", "moving", "of the devices"))]
    sources = "\n\n".join(prices.source for prices in PRICES.values())
    return f"""\
### What storage costs

In dollars a day, with {rounds} rounds a day, the contributions of {KEPT_ROUNDS} rounds and one outer state
(parameters and momentum in float32) kept, beside {len(DEVICES)} x {COUNT} devices at the prices of the report,
${devices:,.0f} a day at {RMB_PER_DOLLAR} RMB to the dollar.

{table(columns, rows)}

{sources}

What leaves a store costs, not what lies there. One request of S3 writes {largest} GiB at most, so that a
contribution of the whole model is many files."""


def _goodput() -> str:
    rows = []
    for count in (1, 2, 4, 8, 16, 32):
        found = []
        for of_device in FLEETS.values():
            between = islands.time_between_failures(of_device, ALL_DEVICES, count)
            interval = islands.best_interval(between, SAVING)
            share = islands.goodput(between, DOWN, interval, SAVING)
            found += [f"{between / HOUR:.1f} h", f"{interval / 60:.0f} min", f"{share:.1%}"]
        rows.append((str(count), f"{1 / count:.1%}", *found))
    columns = ["islands", "lost while one is down"]
    columns += [f"{fleet}: {what}" for fleet in FLEETS for what in ("between failures", "checkpoint every", "goodput")]
    return f"""\
### Goodput and the number of islands

{ALL_DEVICES:,} devices in all. A device fails after 50,700 hours on average (Llama 3 on H100, arXiv 2407.21783:
419 unexpected interruptions of 16,384 in 54 days) or after 8,900 (8% of cards a month, as DLRover's authors
say). Taken: an island is down for {DOWN / 60:.0f} minutes after a failure, a checkpoint stops it for
{SAVING:.0f} s (as on 512 accelerators in the Ling report), and is made at Young's interval.

{table(columns, rows)}

The goodput is that of one run with M times fewer devices, as Decoupled DiLoCo (arXiv 2604.21428) says of its
learners: in its simulations, a failure per chip and year, 8 on 1.2M chips have 88%, 16 on 2.4M 86%."""


def _stragglers() -> str:
    def steps(workers: int) -> float:
        return 1 / islands.step_seconds(FAST, SLOW_FACTOR * FAST, PROBABILITY, workers)

    rows = [(f"{n:,}", f"{steps(n):.4f}", f"{printed:.3f}") for n, printed in PRINTED.items()]
    split = [(str(m), f"{4096 // m:,}", f"{steps(4096 // m):.4f}", f"{steps(4096 // m) / steps(4096) - 1:.0%}")
             for m in (1, 8, 16, 32, 64)]  # fmt: skip
    return f"""\
### Stragglers

A step waits for the slowest of N workers. If each is slow with probability p, by a factor s, apart from the
others, the mean step takes t (1 + (s - 1) (1 - (1 - p)^N)). The report's figure of EDiT prints steps per
second; s = {SLOW_FACTOR} and p = {PROBABILITY:.1%} of steps give all of them.

{table(("workers", "steps/s, formula", "steps/s, printed"), rows)}

By the same formula 4,096 workers in islands, which wait for their own only, each at the same work per step:

{table(("islands", "workers of each", "steps/s", "more than in one"), split)}"""


def main() -> int:
    write_generated(PAGE, text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
