"""What a run that is one of several islands wrote of its rounds: rounds.jsonl and island_load.jsonl.

Letters: R rows, M contributions of islands, L MoE layers, E experts.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from frugalmoe.errors import UserError

Row = tuple[str, dict[str, Any]]  # (where it stands, what it holds)
_NUMBERS = {
    "round": int, "merged": bool, "islands": int, "tokens": int, "tokens_of_all": int,
    "seconds/trained": float, "seconds/waited": float, "bytes/written": int, "bytes/read": int,
}  # fmt: skip


class Rounds(NamedTuple):
    """Of each round that the run handed something in for, in order; of itself unless said otherwise."""

    round_R: np.ndarray
    merged_R: np.ndarray  # whether its contribution was
    islands_R: np.ndarray  # contributions of all that were merged
    tokens_R: np.ndarray  # that it handed in
    tokens_of_all_R: np.ndarray  # in the outer parameters after the round, since the beginning
    trained_R: np.ndarray  # seconds
    waited_R: np.ndarray  # seconds
    written_R: np.ndarray  # bytes
    read_R: np.ndarray  # bytes


class IslandLoads(NamedTuple):
    """Token slots that each expert received on each island, in merged contributions of the later half of the rounds."""

    islands: list[str]
    layers_L: np.ndarray  # index in the whole network
    counts_MLE: np.ndarray
    first: int  # round
    last: int


def read_rounds(rows: Iterable[Row]) -> Rounds | None:
    """Returns the columns; None for no rows. Raises `UserError` that names the line of one that is none."""
    found = []
    for where, row in rows:
        for name, kind in _NUMBERS.items():
            if type(row.get(name)) not in ((int, float) if kind is float else (kind,)):
                raise UserError(f"{where}: {name}={row.get(name)!r}: expected a {kind.__name__}")
        found.append([row[name] for name in _NUMBERS])
    return Rounds(*map(np.array, zip(*found))) if found else None


def read_island_loads(rows: Iterable[Row]) -> IslandLoads | None:
    """Returns the sums; None for no rows. What an island says of itself may be wrong: counts of another shape than the
    run's own layers and experts are left out.
    """
    found = list(rows)
    if not found:
        return None
    found, counts, layers = found[len(found) // 2 :], {}, found[0][1].get("layers")
    for where, row in found:
        try:
            each = [(str(island), np.array(of_island)) for island, of_island in row["loads"]]
            sound = type(row["round"]) is int and len(layers) > 0 and row["layers"] == layers
        except (KeyError, ValueError, TypeError):  # numpy raises ValueError for ragged lists
            sound = False
        if not sound:
            raise UserError(f"{where}: expected 'round', the 'layers' of the other lines, and 'loads' of each island")
        for island, counts_LE in each:
            if counts_LE.dtype.kind == "i" and counts_LE.ndim == 2 and len(counts_LE) == len(layers):
                counts.setdefault(island, []).append(counts_LE)
    experts = max((of_island[0].shape[1] for of_island in counts.values()), default=0)
    sums = {
        island: sum(same)
        for island, of_island in sorted(counts.items())
        if (same := [counts_LE for counts_LE in of_island if counts_LE.shape[1] == experts])
    }
    if not experts or not sums:
        return None
    rounds = [row["round"] for _, row in found]
    return IslandLoads(list(sums), np.array(layers), np.stack(list(sums.values())), rounds[0], rounds[-1])
