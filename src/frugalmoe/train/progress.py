"""A progress bar with loss, tokens/s and ETA on a terminal; a plain line now and then elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from frugalmoe.config.schema import Config
from frugalmoe.train.distributed import is_main

_SECONDS_BETWEEN_LINES = 15.0


class Progress:
    def __init__(self, config: Config, start: int):
        self.console = Console(highlight=False, quiet=not is_main())
        self.steps, self.last_line = config.train.steps, 0.0
        self.speed = 0.0  # smoothed tokens/s
        self.bar = RichProgress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=60,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=self.steps, completed=start, loss=float("nan"), speed=0.0)
        if start:
            self.say(f"resuming at step {start} of {self.steps}")

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *error) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text)

    def update(self, step: int, loss: float, tokens: float, seconds: float) -> None:
        """`seconds` is 0 for a step without a time."""
        if seconds:
            tokens_per_second = tokens / seconds
            self.speed = 0.9 * self.speed + 0.1 * tokens_per_second if self.speed else tokens_per_second
        self.bar.update(self.task, completed=step, loss=loss, speed=self.speed)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.last_line > _SECONDS_BETWEEN_LINES or step == self.steps):
            self.last_line = now
            self.say(f"step {step}/{self.steps}  loss {loss:.3f}  {self.speed:,.0f} tokens/s")
