"""What it costs to train one model on islands: bytes, rounds in a day, work lost to failures and to waiting.

Closed forms, each with its derivation; bytes, seconds and tokens unless a name says otherwise. An island is a number of
devices that wait for each other in every step; islands wait for no other, and meet through files in a store.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

DAY = 86_400.0

# Bits that a value of a contribution takes. Codes come in blocks of 128 with one float32 step: 32 / 128 bits more.
BITS = {"float32": 32.0, "bfloat16": 16.0, "int8": 8.25, "int4": 4.25, "int2": 2.25}


class Traffic(NamedTuple):
    """Bytes of one round."""

    sent: float  # by an island: its contribution
    received: float  # by an island: the contributions of all others, since each island merges for itself
    stored: float  # by all islands together


def traffic(parameters: int, bits: str, islands: int, fragments: int = 1) -> Traffic:
    """Returns what one round moves, where it merges one of `fragments` equal parts of the parameters.

    There is no server that adds contributions up, so that an island reads M - 1 of them: all together M (M - 1) are
    read. Checksums, records and the header of a file (a line per tensor) are left out.
    """
    sent = parameters * BITS[bits] / 8 / fragments
    return Traffic(sent, (islands - 1) * sent, islands * sent)


def all_reduce(parameters: int, bits: str, workers: int) -> float:
    """Returns the bytes that each of `workers` sends in one step of synchronous data parallel training.

    A ring sends 2 (N - 1) / N of the gradient: its sum is formed in N - 1 parts and handed round in as many.
    """
    return 2 * (workers - 1) / workers * parameters * BITS[bits] / 8


def transfer_seconds(moved: Traffic, bandwidth: float) -> float:
    """Returns how long an island is busy with the files of a round, at `bandwidth` bytes per second in each direction.

    Others' contributions come after one's own went out: the two do not overlap.
    """
    return (moved.sent + moved.received) / bandwidth


def rounds_per_day(computing: float, transfer: float, overlapped: bool) -> float:
    """Returns rounds of `computing` seconds of steps each; a transfer goes on beside them, or the steps wait for it."""
    return DAY / (max(computing, transfer) if overlapped else computing + transfer)


def tokens_per_second(devices: int, peak: float, utilization: float, flops: float) -> float:
    """Returns an island's speed: `peak` FLOP/s of a device, of which it does `utilization`, at `flops` per token."""
    return devices * peak * utilization / flops


def kept_when_all_wait(speeds: Sequence[float]) -> float:
    """Returns the share of all speed that is left where unlike islands do equal steps and wait for the slowest.

    In the time of the slowest, M islands do M equal pieces of work, and could do sum(speeds) / min(speeds) of them.
    Rounds that end after a wall time keep all: an island does the steps that it can.
    """
    return len(speeds) * min(speeds) / sum(speeds)


# Failures.


def time_between_failures(of_device: float, devices: int, islands: int) -> float:
    """Returns an island's, where devices fail apart, each after `of_device` on average, and any one stops its island.

    Failures of n = devices / islands come n times as often as those of one.
    """
    return of_device / (devices / islands)


def goodput(between: float, down: float, interval: float, saving: float = 0.0) -> float:
    """Returns the share of time that makes steps which count, of an island and so of all of them.

    between: mean time at work until a failure, exponentially distributed; down: from a failure until steps are made
    again; interval: of steps between two checkpoints; saving: how long a checkpoint stops them.

    Between two failures an island works for `between` on average and is down for `down`. A failure forgets what came
    since the last checkpoint, and has no memory: each interval is finished with probability q = exp(-(interval +
    saving) / between), so that q / (1 - q) of them are, on average, before one is not:

        goodput = interval / (exp((interval + saving) / between) - 1) / (between + down)

    To first order this is 1 - saving / interval - (interval / 2 + down) / between, the known form (J. W. Young 1974).
    Since `between` is that of M times fewer devices, M islands have the goodput of one that has M times fewer devices,
    as Decoupled DiLoCo found; while one is down, 1 / M of the work is lost, where a synchronous run loses all.
    """
    return interval / math.expm1((interval + saving) / between) / (between + down)


def best_interval(between: float, saving: float) -> float:
    """Returns about the interval of the largest goodput: sqrt(2 saving between) (Young 1974)."""
    return math.sqrt(2 * saving * between)


# Stragglers.


def step_seconds(fast: float, slow: float, probability: float, workers: int) -> float:
    """Returns the mean time of a step in which `workers` wait for each other, each slow with `probability`, apart.

    The step is fast if none is slow, (1 - p)^N of the time: E = fast + (slow - fast) (1 - (1 - p)^N). Read off the
    figure of EDiT in the Ling report (arXiv 2503.05139 section 2.2): with slow / fast = 1.661 and p = 0.4% it gives all
    points.
    """
    return fast + (slow - fast) * (1 - (1 - probability) ** workers)


# Storage.


class Prices(NamedTuple):
    """Of a store, in dollars; where they were read, and when."""

    stored: float  # for a byte that lies there for a second
    received: float  # for a byte that leaves it
    written: float  # for a request that writes
    read: float  # for a request that reads
    source: str


LARGEST_OBJECT = 5 * 2**30  # bytes of one request that writes


def storage_per_day(moved: Traffic, rounds: float, kept: float, prices: Prices) -> tuple[float, float]:
    """Returns dollars per day for what lies there and for what is moved; `kept`: bytes that lie there on average.

    All islands together read (M - 1) times what they write; a file of more than LARGEST_OBJECT is several requests.
    """
    islands = round(moved.stored / moved.sent)
    written = islands * math.ceil(moved.sent / LARGEST_OBJECT)
    requests = written * prices.written + (islands - 1) * written * prices.read
    return kept * DAY * prices.stored, rounds * (islands * moved.received * prices.received + requests)


# Loss.

# What training apart cost: nats per token more than together, with the half width of its interval, by (islands, steps
# of a round). experiments/islands/RESULTS.md: 391 k parameters, the first 400 steps, three seeds; large models that are
# trained longer lose less (DiLoCo, 2311.08105, has nothing to tell at 8 workers and 500 steps).
LOSSES = {
    (2, 10): (0.1572, 0.0317),
    (2, 50): (0.1920, 0.0361),
    (2, 200): (0.2332, 0.0406),
    (4, 10): (0.3532, 0.0697),
    (4, 50): (0.4292, 0.0747),
    (4, 200): (0.5383, 0.1152),
    (8, 10): (0.5981, 0.0595),
    (8, 50): (0.7043, 0.1491),
    (8, 200): (0.9080, 0.1929),
}


def loss(islands: int, round_steps: int) -> tuple[tuple[int, int], float, float]:
    """Returns the measured arm that is nearest, (islands, steps of a round), and what it lost: nats, half width."""
    far = lambda arm: (abs(math.log(arm[0] / islands)), abs(math.log(arm[1] / round_steps)))
    arm = min(LOSSES, key=far)
    return arm, *LOSSES[arm]
