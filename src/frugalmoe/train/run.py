"""`Run`: one run between its start and its end: its state, its next batch, its logs, checkpoints and scores."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from frugalmoe import sharding
from frugalmoe.config import Config
from frugalmoe.data import Dataset, quarantine, ramp
from frugalmoe.data.batches import Batch
from frugalmoe.data.tokenizer import Tokenizer
from frugalmoe.fields import check_integer, to_dict
from frugalmoe.files import write_json
from frugalmoe.model import depths, multi_token, pattern
from frugalmoe.model.causality import causality
from frugalmoe.model.transformer import count_parameters
from frugalmoe.routing import stats as routing_stats
from frugalmoe.routing import strategies
from frugalmoe.train import best, checkpoint, distributed, replicas, rundir, saved, troubles, watch
from frugalmoe.train.evaluate import Scores, evaluate, write_probe
from frugalmoe.train.events import Events
from frugalmoe.train.guard import NotFinite
from frugalmoe.train.ledger import Ledger
from frugalmoe.train.objective import StepReport, knobs
from frugalmoe.train.placing import own_rows
from frugalmoe.train.program import compiled_eval_step
from frugalmoe.train.saving import Saves
from frugalmoe.train.step import State, abstract, init
from frugalmoe.train.trackers import Trackers
from frugalmoe.train.troubles import Queue
from frugalmoe.train.weights import Weights

Sampler = Callable[[Config, Weights, Tokenizer], dict[str, str]]


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
        self.knobs = jax.tree.map(lambda number: sharding.put(mesh, number, ""), jax.device_get(knobs(config)))
        self._logs: tuple[Any, ...] = ()
        self.saves.logs = lambda: (self.metrics_log, self.load_log)
        self._open_logs(self.start)
        self.eval_step = compiled_eval_step(config)
        data.quarantine.begin(workdir / quarantine.FILE, saved.place(workdir, self.start) / quarantine.FILE)
        self._rows, self._ramp = own_rows(mesh, config), ramp.of(to_dict(config.train))
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
        self.events.flush()
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
        """Saves the state, as `Saves` does, and returns whether; raises `NotFinite` for one that is not finite,
        `HardwareError` where replicas differ.

        must: raises `NotSaved` where it cannot be saved. last: waits for it, and for space.
        """
        watch.doing(watch.SAVE, self.step)
        if not checkpoint.is_finite(self.state):
            raise NotFinite(self._broken(f"the state after step {self.step}"))
        replicas.check(self.state, self.mesh, self.step, self.tell)
        self.kept.clear()
        self.kept |= {self.best.step} if self.best else set()
        self.kept |= troubles.before_trouble(self.state, self.manager.all_steps())
        state = self.queue.written_into(self.state, self.mesh)
        try:
            with self.ledger.phase("checkpoint"):
                return self.saves.last(self.step, state) if last else self.saves.save(self.step, state, must)
        finally:
            self.ledger.write(self.step)
            self.events.flush()
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
        self.batches = self.data.train_batches(self.queue.position, self._rows, self._ramp)

    def next_batch(self) -> Batch:
        """Returns the next batch on the host: A micro-batches [A, B / A, T], of which this process has its own rows.

        One that was skipped comes again after `guard.retry_after` others.
        """
        tried = self.queue.next()
        batch = self.data.batch(tried.position, self._rows, self._ramp) if tried.again else next(self.batches)
        own = len(self._rows) // self.config.train.accumulate_steps  # of a micro-batch; in a ramp there are fewer
        return Batch(*(x.reshape(x.shape[0] // own, own, *x.shape[1:]) for x in batch))

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

    def logs(self, step: int) -> bool:
        """Whether a step has a row of metrics."""
        return step % self.config.train.log_every == 0 or step == self.config.train.steps

    def log(self, step: int, report: StepReport, seconds: float) -> None:
        """Logs the host's copy of a step's report; `seconds` is 0 for a step without a time. Where the step has no row
        its essentials suffice.
        """
        if report.counts_LE is not None:
            self.counts_LE = self.counts_LE + report.counts_LE
        if not self.logs(step):
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
        if self.metrics_log.write({"step": step, **row}):
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


def _flatten(values: Mapping[str, Any], layers: list[int]) -> dict[str, float]:
    """Returns scalars under flat names; the leading axis of a router metric becomes /layer_03."""
    row = {}
    for name, value in values.items():
        if np.ndim(value):
            row |= {f"{name}/layer_{layer:02d}": float(v) for layer, v in zip(layers, value)}
        else:
            row[name] = float(value)
    return row
