"""Does the router choose well? The loss of a token if one of its slots had gone to another expert.

Letters: N tokens, K slots, E experts, I candidates of a slot: its own expert and those that the token does not have.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import track

from frugalmoe.analysis.lab.interventions import Nothing, Swap
from frugalmoe.analysis.lab.lab import TOKENS, Lab
from frugalmoe.analysis.measures.uncertainty import Estimate, mean
from frugalmoe.errors import UserError


class SwapGain(NamedTuple):
    """Nats per token. With hindsight: the best swap is chosen by the loss, so that it never costs anything."""

    gain: Estimate  # of the best single swap of any slot, or of none
    slot_K: Estimate  # of the best swap of each slot
    chance_K: Estimate  # the same for a slot whose expert was drawn from its candidates
    better_K: Estimate  # share of a slot's other candidates that would have been better; 1/2 by chance


def swap_gain(loss_N: np.ndarray, swapped_KEN: np.ndarray, unit_N: np.ndarray) -> SwapGain:
    """The oracle gain: loss less that with the best single swap, or none, mean over tokens.

    `swapped_KEN` is the loss of token n with slot k given to expert e, NaN where there is no such swap. With l_m the
    losses of the I candidates of a slot and l_0 that of its own, a slot's gain is l_0 - min_m l_m, and what chance
    gives mean_m l_m - min_m l_m. Their ratio is 0 for a router that always takes the best, 1 for one that draws.
    """
    there_KEN = np.isfinite(swapped_KEN)
    best_KN = np.minimum(loss_N, np.where(there_KEN, swapped_KEN, np.inf).min(1))
    mean_KN = (loss_N + np.where(there_KEN, swapped_KEN, 0).sum(1)) / (1 + there_KEN.sum(1))
    better_KN = np.full(best_KN.shape, np.nan)
    np.divide((swapped_KEN < loss_N).sum(1), there_KEN.sum(1), out=better_KN, where=there_KEN.any(1))
    return SwapGain(
        gain=mean(loss_N - best_KN.min(0), unit_N),
        slot_K=mean(loss_N - best_KN, unit_N),
        chance_K=mean(mean_KN - best_KN, unit_N),
        better_K=mean(better_KN, unit_N),
    )


def try_swaps(
    run: str | Path,
    layer: int,
    *,
    position: int = 16,
    checkpoint: int | None = None,
    tokens: int = TOKENS,
    progress: bool = True,
) -> SwapGain:
    """`swap_gain` of one layer of a run's checkpoint, of its held-out tokens at one position of their document.

    Only the token at `position` of each part of a document in a row is swapped, so that what it attends to is as it
    was: its loss is that of its own swap. Weights stay with the slots. Cost: 1 + K * E evaluations of `tokens` tokens,
    of which about one per row is measured.
    """
    lab = Lab(Path(run), checkpoint, tokens)
    moe, time = lab.config.model.moe, lab.config.data.sequence_length
    if not 0 <= position < time:
        raise UserError(f"position={position}: must be in 0 .. {time - 1}")
    swaps = [[Swap(layer, k, e, position) for e in range(moe.num_experts)] for k in range(moe.num_experts_per_token)]
    lab.check(swaps[0][0])
    before, l = lab.probe(Nothing()), lab.layers.index(layer)
    at_N = (before.positions_N == position) & np.isfinite(before.loss_N)
    if not at_N.any():
        raise UserError(f"position={position}: no held-out document is that long; choose a smaller one")
    swapped_KEN = np.full((len(swaps), moe.num_experts, int(at_N.sum())), np.nan)
    for swap in track([s for of_slot in swaps for s in of_slot], "swaps", disable=not progress):
        after = lab.probe(lab.bind(swap, before))
        moved_N = (after.selected_LNE[l, at_N] != before.selected_LNE[l, at_N]).any(-1)
        swapped_KEN[swap.slot, swap.expert] = np.where(moved_N, after.loss_N[at_N], np.nan)
    unit_N = np.unique(before.unit_ids_N[at_N], return_inverse=True)[1]
    return swap_gain(before.loss_N[at_N].astype(np.float64), swapped_KEN, unit_N)
