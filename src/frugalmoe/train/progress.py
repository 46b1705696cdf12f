"""A progress bar with loss, tokens/s and ETA on a terminal; a plain line now and then elsewhere."""

import time
from datetime import timedelta

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from frugalmoe.console import Console
from frugalmoe.schema import Config
from frugalmoe.train.distributed import is_main

_SECONDS_BETWEEN_LINES = 15.0
_COMPILING = "compiling the training step"


class Progress:
    """What the training loop tells a user: that it compiles until the first step is done, then how it goes."""

    def __init__(self, config: Config, start: int):
        self.console = Console(quiet=not is_main())
        self.steps, self.last_line = config.train.steps, 0.0
        self.speed = 0.0  # smoothed tokens/s
        self.seconds_per_step = 0.0  # smoothed
        self.bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}", markup=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task(_COMPILING, total=self.steps, completed=start, numbers="", eta="")
        if start:
            self.say(f"resuming at step {start} of {self.steps}")
        if start < self.steps and not self.console.is_terminal:
            self.say(_COMPILING)

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *error) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def idle(self) -> None:
        """Hears now and then that the run waits for others, as an island does."""

    def update(self, step: int, loss: float, tokens: float, seconds: float) -> None:
        """Shows a step that has ended. `seconds` is 0 for one without a time: the first, which compiles."""
        if seconds:
            smooth = lambda old, new: 0.9 * old + 0.1 * new if old else new
            self.speed = smooth(self.speed, tokens / seconds)
            self.seconds_per_step = smooth(self.seconds_per_step, seconds)
        numbers = f"loss {loss:.3f}" + (f"  {self.speed:,.0f} tokens/s" if self.speed else "")
        left = timedelta(seconds=round((self.steps - step) * self.seconds_per_step))
        eta = f"ETA {left}" if self.seconds_per_step and step < self.steps else ""
        self.bar.update(self.task, description="training", completed=step, numbers=numbers, eta=eta)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.last_line > _SECONDS_BETWEEN_LINES or step == self.steps):
            self.last_line = now
            self.say(f"step {step}/{self.steps}  {numbers}  {eta}".rstrip())
