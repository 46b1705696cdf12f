"""The saves of a run that trains, and its logs, on a disk that may be full: what fails is told, and tried again.

A checkpoint of a step is saved only when the rows up to it are on the disk, so that a run that goes on from it has all
of them. Nothing that is whole is ever deleted to make room.
"""

import shutil
import time
from collections.abc import Callable, Sequence, Set
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from frugalmoe.errors import UserError, of_disk
from frugalmoe.schema import Checkpoint
from frugalmoe.train import checkpoint, distributed, saved, watch
from frugalmoe.train.rundir import Log
from frugalmoe.train.step import State

CONTINUE, STOP = "continue", "stop"
WAIT = 300.0  # seconds that the last save of a run waits for space
_LOOK = 1.0  # seconds between two looks


class NotSaved(UserError):
    """The disk has no space for a checkpoint or for rows of logs; the last whole checkpoint is kept."""


class Saves:
    """The checkpoints that a run saves.

    Where a save fails for want of space, or of a disk that can be written, `tell(kind, what, step)` says so at the step
    of that save; with `on_error` continue the run goes on and the next save tries again, with stop it raises
    `NotSaved`. Of a run of several processes, which cannot leave a save that others are in, one that fails while it is
    written ends the run; that there is no space is seen by all before they begin.
    """

    def __init__(self, workdir: Path, config: Checkpoint, kept: Set[int], tell: Callable[[str, str, int], None]):
        self._workdir, self._config, self._kept, self._tell = workdir, config, kept, tell
        self._saving: int | None = None
        self._told: int | None = None  # the last step that was told not to be saved
        self._behind = False  # whether rows wait
        self.logs: Callable[[], Sequence[Log]] = lambda: ()  # those that the run has open
        self.manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        return checkpoint.open_manager(self._workdir, self._config, cleanup=True, kept=self._kept)

    def save(self, step: int, state: State, must: bool = False) -> bool:
        """Begins to save a state; returns whether it did, or had. must: raises `NotSaved` where it could not."""
        self._settle(must)
        if step in self.manager.all_steps():
            return True
        why = distributed.exchange(self._why_not(state) if distributed.is_main() else "")[0]
        if not why:
            try:
                checkpoint.save(self.manager, step, state)
                self._saving = step
                return True
            except Exception as error:
                why = self._renewed_after(error)
        self._failed(step, why, must)
        return False

    def settled(self, step: int, must: bool = False) -> bool:
        """Waits for what is being saved; returns whether the step is there then, or raises `NotSaved` with `must`."""
        self._settle(must)
        return step in self.manager.all_steps()

    def last(self, step: int, state: State) -> bool:
        """Saves the last state of a run, waits until it is there, and returns True.

        Where there is no space it waits for some, `WAIT` seconds long; then it raises `NotSaved`.
        """
        end = time.monotonic() + (WAIT if self._config.on_error == CONTINUE else 0)
        told = must = False
        while not (self.save(step, state, must) and self.settled(step, must)):
            if not told:
                self._tell("checkpoint", f"the run waits up to {WAIT:g} s for space, for this is its last step", step)
            told, must = True, distributed.exchange(time.monotonic() > end)[0]
            watch.doing(watch.SAVE, step)  # to wait is not to be stuck
            _pause(_LOOK)
        return True

    def look(self, step: int) -> None:
        """Tells of a save, or of logs, that failed meanwhile. Costs next to nothing."""
        behind = next((log for log in self.logs() if log.trouble), None)
        if behind is not None and not self._behind:
            self._tell("log", f"{behind.trouble}; rows wait in memory, and are tried again with each new one", step)
        if behind is None and self._behind:
            self._tell("log", "the rows that waited are written", step)
        self._behind = behind is not None
        if self._saving is not None and not self.manager.is_saving_in_progress():
            self._settle(must=False)

    def close(self) -> None:
        self.manager.close()

    def _settle(self, must: bool) -> None:
        """Waits for the save before, and tells where it failed."""
        step, self._saving = self._saving, None
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            why = self._renewed_after(error)
            if step is not None:
                self._failed(step, why, must)

    def _why_not(self, state: State) -> str:
        """Why process 0 cannot save now; "" for nothing."""
        try:
            checkpoint.check_space(Path(self.manager.directory), state)
        except UserError as error:
            return str(error)
        return next((log.trouble for log in self.logs() if log.flush()), "")

    def _renewed_after(self, error: Exception) -> str:
        """What to tell of an error of the disk, once the manager, which still counts the step that failed, is a new one
        and the part that was written is gone. Raises any other error.
        """
        if jax.process_count() > 1 or not of_disk(error):
            raise error
        old, place = self.manager, Path(self.manager.directory)
        for part in (old._checkpointer, old._non_blocking_metadata_store, old._blocking_metadata_store):
            try:
                part.close()
            except Exception as again:  # the same one
                if not of_disk(again):
                    raise
        for left in place.glob(f"*{saved.UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        self.manager = self._open()
        return f"{place}: {of_disk(error)} while a checkpoint was written"

    def _failed(self, step: int, why: str, must: bool) -> None:
        whole = [each for each in self.manager.all_steps() if each < step]
        kept = f"the last checkpoint is {max(whole)}" if whole else "nothing is saved yet"
        if must or self._config.on_error == STOP:
            rule = "the same command goes on from there once there is space"
            raise NotSaved(f"{why}; step {step} is not saved, {kept}; {rule}")
        if self._told != step:
            self._tell("checkpoint", f"{why}; step {step} is not saved, {kept}; the next save tries again", step)
        self._told = step


def _pause(seconds: float) -> None:
    time.sleep(seconds)
