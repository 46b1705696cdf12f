"""What failures, preemption and checkpoints take of a run's time, in the plan of a run.

The closed forms are those of `cost.islands`, with the time between failures of n devices as that of one over n.
"""

import math
from typing import NamedTuple

from frugalmoe.cost.islands import best_interval, goodput

HOUR = 3600.0
# From a failure until steps are made again: mean time to full recovery in TorchFT's issue 329, 2026-06. With it 16,384
# H100 keep 89% of their time, and Llama 3 reports more than 90%.
DOWN = 948.0
WRITTEN = 3e9  # bytes per second of a node into a checkpoint while steps stand: one thread of PCache, 2503.05139 sec. 2
OF_PARAMETER = 12  # bytes in a checkpoint: float32 and AdamW's two moments


class Uptime(NamedTuple):
    between: float  # seconds between failures and preemptions of all devices
    saving: float  # seconds that a checkpoint stops the steps
    interval: float  # seconds of steps between two checkpoints: the best, by Young's formula
    checkpoint: float  # bytes
    goodput: float  # share of the time that makes steps which count


def uptime(
    parameters: int, devices: int, node: int, mtbf_hours: float, preemptions_per_hour: float = 0.0, down: float = DOWN
) -> Uptime:
    """Returns what is left of the time of `devices`, each failing every `mtbf_hours`, each taken away so often an hour.

    Failures and preemptions are independent: rates add up. All nodes write their part of the checkpoint at one time.
    """
    rate = devices * (1 / mtbf_hours + preemptions_per_hour) / HOUR
    checkpoint = OF_PARAMETER * parameters
    saving = checkpoint / (math.ceil(devices / node) * WRITTEN)
    between = 1 / rate
    interval = max(best_interval(between, saving), saving)
    return Uptime(between, saving, interval, checkpoint, goodput(between, down, interval, saving))
