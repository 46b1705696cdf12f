"""Progress of a whole study, read from its run directories: whichever process trains them, the view is the same."""

import json
import time
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from frugalmoe.ablate.plan import Pair, Plan
from frugalmoe.console import Console
from frugalmoe.shapes import is_integer

_SECONDS_BETWEEN_LOOKS, _SECONDS_BETWEEN_LINES = 0.5, 30.0


class StudyProgress:
    """A bar with runs, steps and ETA on a terminal; a plain line now and then elsewhere."""

    def __init__(self, plan: Plan, workdir: Path):
        self.plan, self.workdir = plan, workdir
        self.console = Console()
        self.done = {pair: self._steps(pair) for pair in plan.pairs}
        self.total = plan.steps * len(plan.pairs)
        self.began, self.at_start = time.monotonic(), sum(self.done.values())
        self.last_look = self.last_line = self.began
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%  {task.fields[what]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("ETA {task.fields[eta]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task(plan.study.name, total=self.total, completed=self.at_start, what="", eta="?")

    def __enter__(self) -> "StudyProgress":
        self.bar.start()
        if self.at_start:
            self.say(f"continuing at {self._what()}")
        return self

    def __exit__(self, *error: object) -> None:
        self.refresh(now=True)
        self.bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def refresh(self, now: bool = False) -> None:
        """Looks at the directories again, a few times per second at most."""
        clock = time.monotonic()
        if not now and clock - self.last_look < _SECONDS_BETWEEN_LOOKS:
            return
        self.last_look = clock
        for pair, before in self.done.items():
            if before < self.plan.steps:
                self.done[pair] = self._steps(pair)
                if self.done[pair] == self.plan.steps:
                    self.say(f"{pair.arm} seed {pair.seed}: done ({self._what()}, ETA {self._eta()})")
        self.bar.update(self.task, completed=sum(self.done.values()), what=self._what(), eta=self._eta())
        if not self.console.is_terminal and clock - self.last_line > _SECONDS_BETWEEN_LINES:
            self.last_line = clock
            self.say(f"{sum(self.done.values()) / self.total:.0%}, {self._what()}, ETA {self._eta()}")

    def _what(self) -> str:
        finished = sum(steps == self.plan.steps for steps in self.done.values())
        return f"{finished} of {len(self.done)} runs"

    def _eta(self) -> str:
        steps = sum(self.done.values()) - self.at_start
        if not steps:
            return "?"
        left = (self.total - sum(self.done.values())) / steps * (time.monotonic() - self.began)
        return f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"

    def _steps(self, pair: Pair) -> int:
        """Returns the last step that a run has logged; it is the last of all only once the summary is there."""
        directory = pair.directory(self.workdir)
        if (directory / "summary.json").is_file():
            return self.plan.steps
        return min(last_logged(directory / "metrics.jsonl"), self.plan.steps - 1)


def last_logged(path: Path) -> int:
    """Returns the step of the last whole line of a log, 0 where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2**16))
            lines = file.read().split(b"\n")[:-1]
        step = json.loads(lines[-1])["step"] if lines else 0
    except (LookupError, OSError, RecursionError, TypeError, ValueError):
        return 0
    return step if is_integer(step) else 0


class OfRun:
    """The `progress` of a run of a study: it shows the study's progress instead of a bar for the run."""

    def __init__(self, study: StudyProgress):
        self.study = study

    def __enter__(self) -> "OfRun":
        return self

    def __exit__(self, *error: object) -> None:
        self.study.refresh()

    def say(self, text: str) -> None:
        self.study.refresh()

    def update(self, step: int, loss: float, tokens: float, seconds: float) -> None:
        self.study.refresh()
