"""`train(config, workdir)`: the loop around the pure step. In order it steps, logs the step before, evaluates, saves.

Metrics are read one step late, so that the device never waits for the host.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from frugalmoe import sharding
from frugalmoe.config import Config, outside, settle
from frugalmoe.data import Dataset, open_data
from frugalmoe.data.batches import Batch
from frugalmoe.data.tokenizer import Tokenizer
from frugalmoe.errors import HardwareError, UserError
from frugalmoe.fields import to_dict
from frugalmoe.files import read_json
from frugalmoe.train import best, checkpoint, distributed, ledger, replicas, rundir, troubles, watch
from frugalmoe.train import origin as origins
from frugalmoe.train.guard import NotFinite
from frugalmoe.train.ledger import Ledger
from frugalmoe.train.objective import StepReport
from frugalmoe.train.origin import Origin
from frugalmoe.train.preflight import check_directory
from frugalmoe.train.program import Program
from frugalmoe.train.progress import Progress
from frugalmoe.train.run import Run, Sampler
from frugalmoe.train.step import State, abstract
from frugalmoe.train.troubles import Tried


def train(
    config: Config,
    workdir: Path,
    *,
    resume: str = "auto",
    fresh: bool = False,
    origin: Origin | None = None,
    sample: Sampler | None = None,
    progress: Callable[[Config, int], Any] = Progress,
    drive: Callable[..., list[dict[str, Any]]] | None = None,
    suits: Callable[[Config, Dataset], None] | None = None,
    times: Ledger | None = None,
) -> dict[str, Any]:
    """Trains, or continues, the run in `workdir` and returns its summary. `status` is complete or stopped.

    resume: auto continues a run of the same config; force continues it whatever its config; never refuses. fresh
    replaces the run that is there, once all has been checked. origin: a run, or a published model, whose weights this
    one begins with; it is read once, and not when this run is continued. sample: draws the passage of text in a
    complete run's summary, as `generate.sample_text` does; None: the summary has none. drive: trains the opened run in
    the place of `train_runs`, as islands do; suits: raises `UserError` where settled config and data do not suit it.
    times: the ledger of this start, where it began before this call.
    Raises UserError for input that cannot be run; nothing is written or
    deleted then. With several processes (`distributed.start`) each calls it with equal arguments.
    """
    config = config if fresh else rundir.as_begun(config, workdir)
    flags = {"--workdir": str(workdir), "--resume": resume, "--fresh": fresh, "--from": repr(origin)}
    distributed.check_same(to_dict(config) | outside.hashes(config) | flags)
    layout = to_dict(settle(config, None, jax.device_count()).mesh)
    with distributed.together():
        if distributed.is_main():
            check_directory(config, workdir, resume=resume, fresh=fresh, origin=origin)
    if distributed.exchange(rundir.is_complete(workdir))[0] and resume != "force" and not fresh:
        return read_json(workdir / "summary.json")
    how = {"force": resume == "force", "fresh": fresh, "origin": origin, "suits": suits, "times": times}
    with jax.set_mesh(sharding.make_mesh(layout)), opened(config, workdir, **how) as run:
        return (drive or train_runs)([run], progress, sample)[0]


@contextmanager
def opened(
    config: Config,
    workdir: Path,
    *,
    force: bool = False,
    fresh: bool = False,
    origin: Origin | None = None,
    done: Callable[[], bool] = lambda: False,
    suits: Callable[[Config, Dataset], None] | None = None,
    times: Ledger | None = None,
) -> Iterator[Run]:
    """Opens the run of a directory, new or continued and locked, on the mesh in context; `fresh` replaces the one
    there, and a new one begins with the weights of `origin`.

    Raises `rundir.Busy` if another process has it, or had it until it was `done`.
    """
    main, mesh = distributed.is_main(), jax.sharding.get_mesh()
    times = times or Ledger()
    with distributed.together():
        with times.phase("data"):
            data = open_data(config.data, batch_size=config.train.batch_size, seed=config.train.seed, progress=main)
        settled = settle(config, data.tokenizer.size, mesh.size)
        parts = {"eval": data, "validation": data.validation}
        best.check_metric(settled, {part: of_part.domains for part, of_part in parts.items() if of_part})
        if suits and main:
            suits(settled, data)
    distributed.check_same({"fingerprint of the data": data.fingerprint})
    other: list[str] = []  # what to tell of data that are others than before
    with ExitStack() as held:
        held.enter_context(times)
        with distributed.together():
            if main:
                held.enter_context(rundir.locked(workdir))
                if done():
                    raise rundir.Busy(f"--workdir={workdir}: another process has just completed this run")
                if fresh:
                    rundir.check_fresh(workdir)
                else:
                    rundir.check_config(workdir, settled, force=force)
                    other = rundir.check_data(workdir, data, force=force)
                freed = rundir.size_of_run(workdir) if fresh else 0
                checkpoint.check_space(workdir, abstract(settled), freed)
        with distributed.together():
            if not (workdir / ".lock").is_file():
                rule = "all processes must share it, but what process 0 wrote is not there"
                raise UserError(f"--workdir={workdir}: {rule}")
        with distributed.together():
            begun = _begun(origin, settled, workdir, data.tokenizer, fresh)
        with distributed.together():
            if main and fresh:
                rundir.start_over(workdir)
        with distributed.all_or_none(NotFinite, HardwareError):
            run = held.enter_context(closing(Run(settled, workdir, data, mesh, begun and begun.state, times)))
            with distributed.together():
                if main:
                    _describe(run, config, begun and begun.record)
                    if begun:
                        origins.accompany(begun.origin, workdir)
            for line in other:
                run.tell("data", line)
            run.notes += begun.notes if begun else ()
            begun = None  # its arrays are the run's, which the first step may write over
            yield run


def _begun(
    origin: Origin | None, config: Config, workdir: Path, tokenizer: Tokenizer, fresh: bool
) -> origins.Begun | None:
    """The first state of a run that begins with another's weights; None for one that goes on, or begins anew."""
    found, digest = origins.to_read(origin, workdir, fresh)
    if found is None:
        return None
    origins.check(found, config, tokenizer.fingerprint)
    return origins.begin(found, config, digest)


def _describe(run: Run, config: Config, origin: Mapping[str, Any] | None) -> None:
    """Writes everything that makes the run directory self-describing."""
    workdir, data = run.workdir, run.data
    (workdir / "tokenizer").mkdir(exist_ok=True)
    data.tokenizer.save_into(workdir / "tokenizer")
    rundir.describe_data(workdir, data)
    if run.start:
        run.notes += rundir.other_environment(workdir, run.config)
    rundir.describe(workdir, config, run.config, run.start, origin)  # last: it marks the directory as a run


def train_runs(
    runs: Sequence[Run], progress: Callable[[Config, int], Any], sample: Sampler | None = None
) -> list[dict[str, Any]]:
    """Trains runs to the end and returns their summaries; several at once where they stand at one step and their
    configs differ in `Knobs` and name only.
    """
    began, config = time.perf_counter(), runs[0].config
    with ExitStack() as held:
        shown = held.enter_context(progress(config, runs[0].start))
        for run in runs:
            run.show(shown)
        stopped = _loop(runs, lambda: held.enter_context(distributed.stop_requests()), shown)
        if not stopped:
            shown.say("evaluating on held-out documents")
        return [run.finish(stopped, (time.perf_counter() - began) / len(runs), sample) for run in runs]


def _loop(runs: Sequence[Run], stop_requests: Callable[[], Callable[[int], bool]], shown: Any) -> bool:
    """Trains to the end, or until a stop is requested; returns whether it was."""
    steps = Steps(runs, stop_requests, shown)
    steps.until(runs[0].config.train.steps)
    steps.program.check_compiled_once()
    return steps.stopped


class Steps:
    """Trains runs, which stand at one step, up to some step, and then up to another.

    stop_requests: gives `stop(steps that were begun)`, once the first step is under way, which compiles. Until then
    there is nothing to save, and a signal ends the process. saves: whether checkpoint.every_steps says when states are
    saved.
    """

    def __init__(
        self, runs: Sequence[Run], stop_requests: Callable[[], Callable[[int], bool]], shown: Any, saves: bool = True
    ):
        self.runs, self.shown, self.step, self._saves = runs, shown, runs[0].step, saves
        self.program, self.stopped = Program(runs), False
        self.launched = 0  # steps that were begun, those of skipped updates too
        self._stop_requests, self._stop = stop_requests, None
        self._pending: _Pending | None = None
        self._clock = _Clock()
        self._replicas = replicas.Watch(runs[0].config.guard, runs[0].mesh, runs[0].tell)

    def stop_requested(self) -> bool:
        """Whether a signal asks to stop after the steps that were made."""
        self.stopped = self.stopped or (self._stop is not None and bool(self._stop(self.launched)))
        return self.stopped

    def until(self, end: int, enough: Callable[[], bool] = lambda: False) -> None:
        """Trains until step `end`, until there is `enough`, or until a stop is requested; hands runs their states."""
        with ledger.phase(self.runs, "step"):
            self._until(end, enough)

    def _until(self, end: int, enough: Callable[[], bool]) -> None:
        config = self.runs[0].config
        while not self._is_at(end) and not self.stop_requested() and not enough():
            watch.doing(watch.BATCH, self.step + 1)
            before = self.runs[0].queue.tried
            try:
                with distributed.while_waiting(self._stop):
                    batch = self._next_batch()
            except distributed.StopNow:
                self.runs[0].queue.put_back(before)
                self.stopped = True
                break
            tried = self.runs[0].queue.tried
            copy = self._replicas.before(self.step + 1, self.program.state)
            # Another process may still compile when this one waits for the first step.
            watch.doing(watch.COMPILE if self._clock.last is None else watch.STEP, self.step + 1)
            with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("train", step_num=self.step):
                report = self.program.step(batch, tried.again)
            self.launched += 1
            if self._stop is None:
                self._stop = self._stop_requests()
            self._replicas.read()
            if self._log_pending():  # the run went back, and this step was made from what it left
                continue
            self.step += 1
            self._pending = _Pending(self.step, tried, report)
            again = None if copy is None else self.program.again(copy, batch, tried.again)
            self._replicas.after(self.step, (self.program.state, report), again)
            if self.step < config.train.steps:
                self._pause(config.train.eval_every, config.checkpoint.every_steps if self._saves else 0)
        self._replicas.read()
        self._log_pending()
        watch.doing(None)
        self.program.settle(self.step)

    def _next_batch(self) -> Batch:
        with ledger.phase(self.runs, "data"):
            batch = self.program.next_batch()
            if self._pending is not None and not self._pending.report.tokens.is_ready():
                ledger.hidden(self.runs)
            return batch

    def _is_at(self, end: int) -> bool:
        """Whether step `end` is reached: the last update may have been skipped."""
        if self.step >= end:
            self._log_pending()
        return self.step >= end

    def take(self, states: Sequence[State], step: int) -> None:
        """Goes on with other states of the runs, at another step."""
        for run, state in zip(self.runs, states, strict=True):
            run.state, run.step = state, step
        self.step = step
        self.program.read_states()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which the runs wait for others: its time does not count as a step's."""
        with self._clock.paused(), ledger.phase(self.runs, "idle"):
            yield

    def _log_pending(self) -> bool:
        """Reads the report of the step before, which waits for it; returns whether the run went back for it."""
        if self._pending is None:
            return False
        (logged, tried, report), self._pending = self._pending, None
        wanted = report if self.runs[0].logs(logged) else report.essentials()
        reports = self.program.of_each_run(jax.device_get(wanted))
        seconds = self._clock.tick()
        watch.stepped(seconds)
        if any(own.verdict.skipped for own in reports):
            return self._skipped(logged, tried, reports)
        for run, own in zip(self.runs, reports):
            run.check(logged, own)
        loss, tokens = float(reports[0].metrics["loss/ce"]), sum(float(own.tokens) for own in reports)
        self.shown.update(logged, loss, tokens, seconds)
        for run, own in zip(self.runs, reports):
            run.log(logged, own, seconds / len(self.runs))
            run.ledger.stepped(logged)
        if tried.again:
            self.runs[0].tell("retried", f"the batch at position {tried.position} was taken", logged)
        return False

    def _skipped(self, logged: int, tried: Tried, reports: Sequence[StepReport]) -> bool:
        """Keeps a batch whose update was skipped; returns whether the run went back."""
        run, report = self.runs[0], reports[0]
        if len(self.runs) > 1:
            names = [run.config.name for run, own in zip(self.runs, reports) if own.verdict.skipped]
            rule = "runs that are trained as one program cannot wait for one another, so each is to be trained alone"
            raise NotFinite(f"{', '.join(names)}: the update after step {logged - 1} is to be skipped; {rule}")
        self.step = logged - 1
        run.step = logged - 1
        troubles.skip(run, tried, report)
        if not report.verdict.roll_back:
            return False
        watch.doing(None)
        with self._clock.paused():
            state = troubles.roll_back(run, report, self._let_go)
            if state is not None:
                run.go_on_after(state)
                self.take([state], int(state.step))
        return state is not None

    def _let_go(self) -> None:
        """Gives the memory of the states free, for others that are read."""
        self.program.state = None
        for run in self.runs:
            run.state = None

    def _pause(self, eval_every: int, save_every: int) -> None:
        """Evaluates and saves where it is time to; 0: never."""
        due = lambda: [bool(every) and self.step % every == 0 for every in (eval_every, save_every)]
        if not any(due()):
            return
        at = self.step
        self._log_pending()  # waits for the step, so that its time does not count as the pause's
        if self.step != at:  # its update was skipped
            return
        evaluate, save = due()
        with self._clock.paused():
            self.program.settle(self.step)
            for run in self.runs:
                if evaluate:
                    with ledger.phase(self.runs, "evaluation"):
                        run.evaluate()
                if save:
                    with ledger.phase(self.runs, "checkpoint"):
                        run.save()


class _Pending(NamedTuple):
    """A step whose report was not read yet."""

    step: int  # after it, unless its update is skipped
    tried: Tried
    report: StepReport


class _Clock:
    """Seconds between logged steps, pauses left out. The first step compiles: it has no time."""

    def __init__(self):
        self.last: float | None = None

    def tick(self) -> float:
        now = time.perf_counter()
        seconds = now - self.last if self.last is not None else 0.0
        self.last = now
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.last is not None:
            self.last += time.perf_counter() - began
