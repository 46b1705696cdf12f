"""`frugalmoe train --profile=STEPS`: a trace of some steps, which XProf opens."""

from collections.abc import Callable
from pathlib import Path

import jax

from frugalmoe.config import Config
from frugalmoe.train.progress import Progress

_SKIPPED = 2  # steps of this process: the first compiles, and meanwhile batches pile up for the second


def profiled(steps: int, directory: Path) -> Callable[[Config, int], Progress]:
    """Returns a `progress` for `train` that also traces what the host and the devices do in `steps` steps."""

    class Profiled(Progress):
        def __init__(self, config: Config, start: int):
            super().__init__(config, start)
            self.first, self.tracing, self.done = start + _SKIPPED, False, start

        def update(self, step: int, *rest: float) -> None:
            """Starts or stops the trace after a step that has ended: the host has waited for it."""
            super().update(step, *rest)
            self.done = step
            if step == self.first:
                jax.profiler.start_trace(str(directory))
                self.tracing = True
            elif step == self.first + steps:
                self._stop()

        def __exit__(self, *error) -> None:
            super().__exit__(*error)
            self._stop()
            if self.done < self.first:
                self.say(f"profile: none; it begins after step {self.first}, and the last was {self.done}")

        def _stop(self) -> None:
            if self.tracing:
                self.tracing = False
                jax.profiler.stop_trace()
                self.say(f"profile: `pip install xprof; xprof --logdir={directory}` shows it")

    return Profiled
