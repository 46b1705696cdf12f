"""The batch ramp: batches that begin small and grow, by whole micro-batches, to `train.batch_size`.

A batch is still a function of (config, seed, position): its size is one of its position, and so is its first row.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Ramp(NamedTuple):
    """Sizes of batches in sequences. Batch p of the first `batches` has `first` + the share p / `batches` of what is
    missing to `last`, rounded down to a multiple of `unit`; the others have `last`.
    """

    first: int
    last: int
    batches: int
    unit: int  # of a micro-batch

    def size(self, position: int) -> int:
        """Returns the sequences of the batch at a position."""
        if position >= self.batches:
            return self.last
        return self.first + self.unit * (self._stages * position // self.batches)

    def before(self, position: int) -> int:
        """Returns the sequences of all batches before a position."""
        inside = min(position, self.batches)
        grown = (
            0  # what the batches inside the ramp have beyond `first`, in micro-batches: stage j begins at ceil(j n / k)
        )
        for stage in range(1, self._stages + 1):
            begins = -(-stage * self.batches // self._stages)
            grown += max(inside - begins, 0)
        return inside * self.first + self.unit * grown + (position - inside) * self.last

    def cut(self, first: int, rows: Sequence[int]) -> list[list[int]]:
        """Returns rows as those of the batches at positions `first`, `first` + 1, ..., as many as they are for."""
        begins, batches, position = self.before(first), [], first
        while (begin := self.before(position) - begins) < len(rows):
            batches.append(list(rows[begin : begin + self.size(position)]))
            position += 1
        return batches

    @property
    def _stages(self) -> int:
        return (self.last - self.first) // self.unit


def of(train: Mapping[str, Any]) -> Ramp:
    """Returns the ramp of a plain section `train` of a config, of any age; without one all batches have one size."""
    last = train["batch_size"]
    first = train.get("ramp_from") or last
    return Ramp(first, last, train.get("ramp_batches", 0), last // train.get("accumulate_steps", 1))
