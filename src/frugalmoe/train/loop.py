"""`train(config, workdir)`: the loop around the pure step. In order it steps, logs the step before, evaluates, saves.

Metrics are read one step late, so that the device never waits for the host.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from frugalmoe import sharding
from frugalmoe.config import Config, outside, settle
from frugalmoe.data import Dataset, open_data, quarantine
from frugalmoe.data.batches import Batch
from frugalmoe.data.tokenizer import Tokenizer
from frugalmoe.errors import UserError
from frugalmoe.fields import check_integer, to_dict
from frugalmoe.files import read_json, write_json
from frugalmoe.model import depths, multi_token, pattern
from frugalmoe.model.causality import causality
from frugalmoe.model.transformer import count_parameters
from frugalmoe.routing import stats as routing_stats
from frugalmoe.routing import strategies
from frugalmoe.train import best, checkpoint, distributed, ledger, rundir, saved, troubles, watch
from frugalmoe.train import origin as origins
from frugalmoe.train.evaluate import Scores, evaluate, write_probe
from frugalmoe.train.events import Events
from frugalmoe.train.guard import NotFinite
from frugalmoe.train.ledger import Ledger
from frugalmoe.train.objective import StepReport, knobs
from frugalmoe.train.origin import Origin
from frugalmoe.train.placing import own_rows
from frugalmoe.train.preflight import check_directory
from frugalmoe.train.program import Program, compiled_eval_step
from frugalmoe.train.progress import Progress
from frugalmoe.train.saving import Saves
from frugalmoe.train.step import State, abstract, init
from frugalmoe.train.trackers import Trackers
from frugalmoe.train.troubles import Queue, Tried
from frugalmoe.train.weights import Weights

Sampler = Callable[[Config, Weights, Tokenizer], dict[str, str]]


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
) -> Iterator["Run"]:
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
        with distributed.all_or_none(shared=NotFinite):
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


def _describe(run: "Run", config: Config, origin: Mapping[str, Any] | None) -> None:
    """Writes everything that makes the run directory self-describing."""
    workdir, data = run.workdir, run.data
    (workdir / "tokenizer").mkdir(exist_ok=True)
    data.tokenizer.save_into(workdir / "tokenizer")
    rundir.describe_data(workdir, data)
    if run.start:
        run.notes += rundir.other_environment(workdir, run.config)
    rundir.describe(workdir, config, run.config, run.start, origin)  # last: it marks the directory as a run


def train_runs(
    runs: Sequence["Run"], progress: Callable[[Config, int], Any], sample: Sampler | None = None
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


def _loop(runs: Sequence["Run"], stop_requests: Callable[[], Callable[[int], bool]], shown: Any) -> bool:
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
        self, runs: Sequence["Run"], stop_requests: Callable[[], Callable[[int], bool]], shown: Any, saves: bool = True
    ):
        self.runs, self.shown, self.step, self._saves = runs, shown, runs[0].step, saves
        self.program, self.stopped = Program(runs), False
        self.launched = 0  # steps that were begun, those of skipped updates too
        self._stop_requests, self._stop = stop_requests, None
        self._pending: _Pending | None = None
        self._clock = _Clock()

    def stop_requested(self) -> bool:
        """Whether a signal asks to stop after the steps that were made."""
        self.stopped = self.stopped or bool(self._stop and self._stop(self.launched))
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
            # Another process may still compile when this one waits for the first step.
            watch.doing(watch.COMPILE if self._clock.last is None else watch.STEP, self.step + 1)
            with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("train", step_num=self.step):
                report = self.program.step(batch, tried.again)
            self.launched += 1
            self._stop = self._stop or self._stop_requests()
            if self._log_pending():  # the run went back, and this step was made from what it left
                continue
            self.step += 1
            self._pending = _Pending(self.step, tried, report)
            if self.step < config.train.steps:
                self._pause(config.train.eval_every, config.checkpoint.every_steps if self._saves else 0)
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
        reports = self.program.of_each_run(jax.device_get(report))
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


class Run:
    """What the loop holds on to: compiled steps, logs and times. All that a run *is* lives in `State` and on disk."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        data: Dataset,
        mesh: jax.sharding.Mesh,
        begun: State | None = None,
        times: Ledger | None = None,
    ):
        self.ledger = times or Ledger()
        self.config, self.workdir, self.data, self.mesh = config, workdir, data, mesh
        model = config.model
        self.layers, self.routed_blocks = pattern.moe_layers(model), pattern.wrapped_layers(model)
        self.trained_layers = self.layers + multi_token.moe_layers(model)
        self.kept: set[int] = set()  # steps of checkpoints that stay
        self.notes: list[str] = []  # for whoever started the run
        self.say: Callable[[str], None] = self.notes.append  # the progress shown, once there is one
        self.events = Events(workdir, quiet=not distributed.is_main())
        self.state = self._restored() or begun or init(config)
        self.saves = Saves(workdir, config.checkpoint, self.kept, self.tell)
        self.start = self.step = int(self.state.step)
        self.best = self._best_before(self.start)
        self.knobs = jax.tree.map(lambda number: sharding.put(mesh, number, ""), knobs(config))
        self._logs: tuple[Any, ...] = ()
        self.saves.logs = lambda: (self.metrics_log, self.load_log)
        self._open_logs(self.start)
        self.eval_step = compiled_eval_step(config)
        data.quarantine.begin(workdir / quarantine.FILE)
        self._read_from(self.state)
        self.tokens_per_second: list[float] = []
        # Slots of tokens that named each expert, in all steps of this start.
        self.counts_LE = np.zeros((len(self.trained_layers), model.moe.num_experts), np.int64)
        self.ledger.attach(workdir, self.start, quiet=not distributed.is_main())

    @property
    def manager(self) -> Any:
        """Orbax's manager of the run's checkpoints; a save that failed makes it a new one."""
        return self.saves.manager

    def _restored(self) -> State | None:
        """Returns the newest saved state that is whole and finite; the checkpoints that are not are moved aside."""
        with checkpoint.open_manager(self.workdir, self.config.checkpoint) as reader:
            state, step, skipped = checkpoint.restore_newest(reader, abstract(self.config))
            if state is not None:
                state, step, skipped = troubles.finished(self, reader, state, skipped)
        if skipped and state is None:
            rule = "so there is nothing to continue; --fresh starts over"
            raise NotFinite(f"{saved.damaged(self.workdir, *skipped)}, {rule}")
        with distributed.together():
            if distributed.is_main():
                for line in saved.clear(self.workdir, skipped, step):
                    self.tell("checkpoint", line, step or 0)
        return state

    def _open_logs(self, step: int) -> None:
        """Opens the logs to go on after a step, and closes those that are open."""
        main = distributed.is_main()
        for log in self._logs:
            log.close()
        log = lambda name: rundir.Log(self.workdir / name if main else Path(os.devnull), step)
        self.metrics_log, self.load_log = log("metrics.jsonl"), log("expert_load.jsonl")
        self.trackers = Trackers(self.config, self.workdir, step, quiet=not main)
        self._logs = (self.metrics_log, self.load_log, self.trackers)

    def _best_before(self, step: int) -> best.Best | None:
        """The best checkpoint up to a step."""
        if not self.config.checkpoint.keep_best:
            return None
        steps = {each for each in self.manager.all_steps() if each <= step}
        return best.find(self.workdir, self.config.checkpoint.keep_best, steps)

    def _keep_best(self, scores: Mapping[str, float]) -> None:
        """Saves the state that was evaluated and keeps it, if it is the best until now, in the place of that before."""
        metric = self.config.checkpoint.keep_best
        if not (metric and best.is_better(metric, scores[metric], self.best)):
            return
        if self.save() and self.saves.settled(self.step):
            self.best = best.Best(self.step, scores[metric])

    def show(self, shown: Any) -> None:
        """Says on `shown` what there is to say, now and from here on."""
        for note in self.notes:
            shown.say(note)
        self.say = shown.say

    def tell(self, kind: str, what: str, step: int | None = None) -> None:
        """Says what happened to the run, and keeps it as a row of its events."""
        self.say(what)
        self.events.write(self.step if step is None else step, kind, what)

    def check(self, step: int, report: StepReport) -> None:
        """Raises `NotFinite` unless a step's loss and gradient and the state after it are finite."""
        names, values = ("loss/total", "optim/gradient_norm", "optim/parameter_norm"), report.metrics
        broken = [f"{name}={values[name]}" for name in names if not np.isfinite(values[name])]
        broken += [name for name, finite in report.finite.items() if not finite]
        if broken:
            self.metrics_log.write({"step": step, **{name: float(values[name]) for name in names}})
            raise NotFinite(self._broken(f"{', '.join(broken)} at step {step}"))

    def _broken(self, what: str) -> str:
        return f"{what}: not finite; {self.what_to_do()}"

    def what_to_do(self) -> str:
        saved = self.manager.latest_step()
        last = "nothing is saved yet" if saved is None else f"the last checkpoint is {saved}"
        return f"{last}; lower optim.learning_rate={self.config.optim.learning_rate}"

    def finish(
        self, stopped: bool, seconds: float, sample: Sampler | None, more: Mapping[str, Any] = {}
    ) -> dict[str, Any]:
        """Saves the state; unless stopped, evaluates, and samples if asked to. Returns the summary, which a complete
        run also writes, with `more` in it.
        """
        if self.queue.waiting and not stopped:
            waiting = ", ".join(map(str, self.queue.waiting))
            self.tell("left", f"the batches at positions {waiting} did not come again")
        trace: list = []
        with self.ledger.phase("evaluation"):
            scores = None if stopped else self._finish(trace)
        self.save(last=True)
        if trace:
            write_probe(self.workdir / "probe.npz", trace, self.layers, self.config.model.moe.num_experts)
        summary = {"status": "stopped" if stopped else "complete", "step": self.step, "steps": self.config.train.steps}
        with self.ledger.phase("report"):
            if scores:
                summary |= (
                    self._summary(*scores, seconds) | dict(more) | ({"sample": self._sample(sample)} if sample else {})
                )
            self.ledger.write(self.step, ended=summary["status"])
        if scores:
            summary |= {"goodput": self.ledger.account().summary()}
            if distributed.is_main():
                write_json(self.workdir / "summary.json", summary)
        return summary

    def close(self) -> None:
        self.ledger.died(self.step)
        for part in (*self._logs, self.saves):
            part.close()

    def evaluate(self) -> None:
        measured = self._log_scores("eval", self._scored(self.eval_step, self.data))
        if self.data.validation:
            measured |= self._log_scores("validation", self._scored(self.eval_step, self.data.validation))
        self._keep_best(measured)
        self.ledger.write(self.step)

    def _scored(self, eval_step: Callable, data: Dataset, trace: list | None = None) -> Scores:
        moves = lambda *rows: watch.doing(watch.EVALUATION, self.step)
        moves()
        scores = evaluate(eval_step, self.state, data, self.config, self.mesh, trace, done=moves)
        watch.doing(None)
        return scores

    def save(self, *, must: bool = False, last: bool = False) -> bool:
        """Saves the state, as `Saves` does, and returns whether; raises `NotFinite` for one that is not finite.

        must: raises `NotSaved` where it cannot be saved. last: waits for it, and for space.
        """
        watch.doing(watch.SAVE, self.step)
        if not checkpoint.is_finite(self.state):
            raise NotFinite(self._broken(f"the state after step {self.step}"))
        self.kept.clear()
        self.kept |= {self.best.step} if self.best else set()
        self.kept |= troubles.before_trouble(self.state, self.manager.all_steps())
        state = self.queue.written_into(self.state, self.mesh)
        try:
            with self.ledger.phase("checkpoint"):
                return self.saves.last(self.step, state) if last else self.saves.save(self.step, state, must)
        finally:
            self.ledger.write(self.step)
            watch.doing(None)

    def seek(self, position: int) -> None:
        """Makes the run go on with the batch of another position: a larger one skips batches, a smaller one goes back.

        The number of updates stays, and with it the learning rate and the noise. Call it before or after the loop, not
        inside. Raises `UserError` for a position that is no int32.
        """
        check_integer("position", position, least=0)
        self.state = self.state._replace(position=sharding.put(self.mesh, np.int32(position), ""))
        self._read_from(self.state)

    def _read_from(self, state: State) -> None:
        """Goes on with the batch at a state's position, and with those that wait in it."""
        self.queue = Queue(state, self.config.guard.retry_after)
        self.batches = self.data.train_batches(self.queue.position, own_rows(self.mesh, self.config))

    def next_batch(self) -> Batch:
        """Returns the next batch on the host: A micro-batches [A, B / A, T], of which this process has its own rows.

        One that was skipped comes again after `guard.retry_after` others.
        """
        tried = self.queue.next()
        batch = self.data.batch(tried.position, own_rows(self.mesh, self.config)) if tried.again else next(self.batches)
        a = self.config.train.accumulate_steps
        return Batch(*(x.reshape(a, x.shape[0] // a, *x.shape[1:]) for x in batch))

    def stop_where_not_finite(self) -> None:
        """Makes a value that is not finite raise `NotFinite`: nothing is skipped, as where others decide what then is
        to be done.
        """
        none = sharding.put(self.mesh, np.bool_(False), "")
        self.knobs = self.knobs._replace(limits=self.knobs.limits._replace(skips=none))

    def go_on_after(self, state: State) -> None:
        """Goes on, in the logs and in the data, from a state that the run went back to."""
        step = int(state.step)
        self._open_logs(step)
        self.best = self._best_before(step)
        self._read_from(state)
        self.ledger.write(step, back_to=step)

    def log(self, step: int, report: StepReport, seconds: float) -> None:
        """Logs the host's copy of a step's report; `seconds` is 0 for a step without a time."""
        if report.counts_LE is not None:
            self.counts_LE = self.counts_LE + report.counts_LE
        if step % self.config.train.log_every and step != self.config.train.steps:
            return
        row = _flatten(report.metrics, self.trained_layers) | _flatten(report.depths, self.routed_blocks)
        if report.position != step:
            row["data/position"] = float(report.position)
        if seconds:  # absent at the first step, which compiles
            tokens = float(report.tokens)
            self.tokens_per_second.append(tokens / seconds)
            row |= {"speed/tokens_per_second": tokens / seconds, "speed/step_seconds": seconds}
        self._write(step, row)
        if report.counts_LE is not None:
            self.load_log.write({"step": step, "layers": self.trained_layers, "counts": report.counts_LE.tolist()})
        self.saves.look(step)
        for line in self.data.quarantine.news():
            self.tell("data", line)

    def _write(self, step: int, row: Mapping[str, float]) -> None:
        self.metrics_log.write({"step": step, **row})
        self.trackers.log(step, row)

    def _log_scores(self, what: str, scores: Scores) -> dict[str, float]:
        """Logs losses under `eval/`, or those of the validation set of one's own under `validation/`; returns them."""
        if broken := [domain for domain, loss in scores.loss.items() if not np.isfinite(loss)]:
            name = "held-out" if what == "eval" else what
            raise NotFinite(self._broken(f"{name} loss of {', '.join(broken)} after step {self.step}"))
        named = {"loss": scores.loss, "bits_per_byte": scores.bits_per_byte}
        row = {f"{what}/{k}/{d}": v for k, by_domain in named.items() for d, v in by_domain.items()}
        self._write(self.step, row)
        return row

    def _finish(self, trace: list) -> tuple[Scores, Scores | None]:
        """Scores of the held-out documents, and of the validation set where there is one. What the probe shall hold is
        appended to `trace`.
        """
        traced = lambda: compiled_eval_step(self.config, trace=True, vocabulary=self.data.tokenizer.size)
        eval_step = traced() if self.layers else self.eval_step
        probed = trace if self.layers and distributed.is_main() else None
        scores, own = self._scored(eval_step, self.data, probed), None
        measured = self._log_scores("eval", scores)
        if self.data.validation:
            own = self._scored(eval_step, self.data.validation)
            measured |= self._log_scores("validation", own)
        self._keep_best(measured)
        return scores, own

    def _summary(self, scores: Scores, own: Scores | None, seconds: float) -> dict[str, Any]:
        moe = self.config.model.moe
        router = strategies.get(moe.router)
        layers = _by_layer(routing_stats.metrics, scores.stats, self.layers)
        blocks = _by_layer(depths.metrics, scores.depths, self.routed_blocks)
        about = {"causal": depths.ABOUT.causal, "causal_in_evaluation": depths.ABOUT.causal_in_evaluation}
        speed = float(np.median(self.tokens_per_second)) if self.tokens_per_second else None
        return {
            "domains": list(self.data.domains),
            "eval": _losses(scores),
            **({"validation": _losses(own)} if own else {}),
            **({"records_left_out": left_out} if (left_out := len(self.data.quarantine)) else {}),
            **({"best": {"metric": self.config.checkpoint.keep_best, **self.best._asdict()}} if self.best else {}),
            "parameters": count_parameters(self.config.model),
            "speed": {"tokens_per_second": speed, "train_seconds": seconds},
            "router": {"name": router.name, **self._causality(), "layers": layers},
            **({"mixture_of_depths": about | {"layers": blocks}} if blocks else {}),
        }

    def _causality(self) -> dict[str, str]:
        """Returns the causality of router, executor and exchange together, mixture of depths too."""
        devices = self.mesh.shape["expert"]
        level = lambda train: causality(self.config.model, train, devices)
        return {"causal": level(True), "causal_in_evaluation": level(False)}

    def _sample(self, sample: Sampler) -> dict[str, str]:
        """Returns the sample, drawn on one device: decoding knows no mesh that splits sequences."""
        weights = Weights(self.state.params, self.state.router_state)
        if self.mesh.size > 1 and not sharding.fits_one_device(weights):
            return {"prompt": "", "text": "", "why": "no sample: the parameters do not fit on one device"}
        with sharding.one_device(weights) as weights:
            return sample(self.config, weights, self.data.tokenizer) if distributed.is_main() else {}


def _losses(scores: Scores) -> dict[str, dict[str, float]]:
    return {"loss": scores.loss, "bits_per_byte": scores.bits_per_byte}


def _by_layer(metrics: Callable, stats: Mapping[str, Any], layers: list[int]) -> dict[str, dict[str, float]]:
    """Returns {layer_03: {name: metric}} from summed statistics [L, ...]."""
    found = {f"layer_{layer:02d}": {} for layer in layers}
    if stats:
        for name, value in _flatten(jax.device_get(jax.vmap(metrics)(stats)), layers).items():
            metric, _, layer = name.partition("/")
            found[layer][metric] = value
    return found


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


def _flatten(values: Mapping[str, Any], layers: list[int]) -> dict[str, float]:
    """Returns scalars under flat names; the leading axis of a router metric becomes /layer_03."""
    row = {}
    for name, value in values.items():
        if np.ndim(value):
            row |= {f"{name}/layer_{layer:02d}": float(v) for layer, v in zip(layers, value)}
        else:
            row[name] = float(value)
    return row
