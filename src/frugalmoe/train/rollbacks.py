"""The lineage of a run: when it went back to which checkpoint, and what it read from there on.

rollbacks.jsonl is written before anything else of a rollback is done. So a kill at any moment leaves either a run that
has not gone back yet, or one whose next start sees that it is to, and does.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from frugalmoe.errors import UserError
from frugalmoe.train import distributed
from frugalmoe.train.rundir import write_rows
from frugalmoe.train.step import State

FILE = "rollbacks.jsonl"


class Rollback(NamedTuple):
    """A row of the lineage; `number` counts from 1."""

    number: int
    from_step: int
    to_step: int
    position: int | None  # of the next batch; None: that of the checkpoint
    lowered_until: int | None  # the step until which the learning rate is lowered; None: as in the checkpoint
    watched_until: int  # the step until which less counts as a spike
    why: str

    @property
    def batches(self) -> str:
        """What happens to the batches between."""
        if self.position is None:
            return f"the same batches come again, at the lowered rate until step {self.lowered_until}"
        return f"goes on with the batch at position {self.position}"

    def applied(self, state: State, put: Callable[[int], jax.Array]) -> State:
        """Returns the state of the checkpoint, as the run goes on from it."""
        none = {name: put(0) for name in ("skips", "broken")}
        clocks = {"since": put(-1), "watched_until": put(self.watched_until), "rollbacks": put(self.number)}
        remembered = state.guard._replace(**none, **clocks)
        if self.lowered_until is not None:
            remembered = remembered._replace(lowered_until=put(self.lowered_until))
        position = {} if self.position is None else {"position": put(self.position)}
        return state._replace(guard=remembered, **position)


def read(workdir: Path) -> list[Rollback]:
    """Returns the rollbacks of a run, the same in all processes. Raises `UserError` for a line that is none: no kill
    left it, for the file is written as a whole, and where the run is to go on is not known.
    """
    with distributed.together():
        found = _read(workdir / FILE) if distributed.is_main() else []
    return [Rollback(*row) for row in distributed.exchange([list(row) for row in found])[0]]


def _read(path: Path) -> list[Rollback]:
    rows = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return [_row(line, f"{path} line {number}") for number, line in enumerate(rows, 1)]


def _row(line: str, where: str) -> Rollback:
    try:
        row = Rollback(**json.loads(line))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: no row of a rollback ({type(error).__name__}); --fresh starts over") from error
    kinds = Rollback.__annotations__
    for name, value in row._asdict().items():
        if (
            not isinstance(value, kinds[name])
            or isinstance(value, bool)
            or (isinstance(value, int) and not _fits(value))
        ):
            raise UserError(f"{where}: {name} is not as a run writes it; --fresh starts over")
    return row


def _fits(number: int) -> bool:
    """Whether it is a step or a position, int32."""
    return 0 <= number < 2**31


def add(workdir: Path, rollback: Rollback) -> None:
    write_rows(workdir / FILE, [row._asdict() for row in [*_read(workdir / FILE), rollback]])


def unfinished(workdir: Path, state: State) -> Rollback | None:
    """Returns the rollback that a saved state, the newest, does not know of yet; None where there is none.

    A state from before the checkpoint that the run went back to will come to that by itself.
    """
    rows = [row for row in read(workdir) if row.to_step <= int(state.step)]
    return rows[-1] if rows and rows[-1].number > int(state.guard.rollbacks) else None
