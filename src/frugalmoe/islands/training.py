"""A run that is an island: `drive` trains it in rounds, where `train.loop.train_runs` would train it alone."""

import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from frugalmoe import sharding
from frugalmoe.data import Dataset, ramp
from frugalmoe.errors import UserError
from frugalmoe.fields import to_dict
from frugalmoe.files import check_name, read_json, write_atomically, write_json
from frugalmoe.islands import agreements, blobs, merges, processes, routers, tensors
from frugalmoe.islands.directory import Rules
from frugalmoe.islands.island import Island
from frugalmoe.islands.records import Damaged
from frugalmoe.islands.rounds import Found, Local, Rounds
from frugalmoe.islands.store import Store, StoreError, open_store
from frugalmoe.schema import Config
from frugalmoe.train import distributed, rundir
from frugalmoe.train.guard import NotFinite
from frugalmoe.train.loop import Steps
from frugalmoe.train.placing import own_rows
from frugalmoe.train.run import Run
from frugalmoe.train.step import State, init

RECORD = "island.json"  # in the run directory
FOLDER = "island"
_PAUSE = 0.25  # seconds between two looks at the directory
_KEPT = 8  # rounds that the run directory remembers
_PATIENCE = 10  # times lapse_seconds that a step may take while signs of life are shown


def rules_of(config: Config) -> Rules:
    """Returns what all islands of a config do alike. Raises `UserError` for a merge rule that is none."""
    section, described = config.islands, tensors.describe(config.model)
    merge = merges.get(section.merge)
    merge.options_of(section.merge_options)
    if metric := config.checkpoint.keep_best:
        rule = "must be empty: islands save what they hold at the end of rounds only, which no evaluation is of"
        raise UserError(f"checkpoint.keep_best={metric!r}: {rule}")
    if section.late == "weigh" and section.fragments > 1:
        rule = "needs islands.fragments=1: a late contribution is of another fragment than the round"
        raise UserError(f"islands.late={section.late!r}: {rule}")
    return Rules(
        section=section,
        steps=config.train.steps,
        tokens_per_row=config.data.sequence_length,
        tensors=described,
        fragments=tensors.fragments(described, section.fragments),
        merge=merge,
        merge_routers=routers.merger(config.model.moe),
    )


def advice(config: Config) -> list[str]:
    """What the merge rule says of the section that it is used with."""
    merge, section = merges.get(config.islands.merge), config.islands
    said = merge.advice(merge.options_of(section.merge_options), section)
    return [said] if said else []


def check(config: Config, url: str, name: str) -> Store:
    """Opens the directory for an island. Raises `UserError` for one that cannot be used, or is of another model; data
    and tokenizer are compared by `suits`, when they are there.
    """
    check_name("--island", name)
    rules_of(config)
    store = open_store(url)
    agreements.check(store, agreements.of(config, "", ""), unknown=("data", "tokenizer"))
    return store


def suits(store: Store, config: Config, data: Dataset) -> None:
    """Raises `UserError` where an island would not be of the model, the data and the tokenizer of a directory."""
    agreements.check(store, agreements.of(config, data.fingerprint, data.tokenizer.fingerprint))


def drive(
    runs: Sequence[Run], progress: Callable[[Config, int], Any], sample: Any = None, *, store: Store, name: str
) -> list[dict[str, Any]]:
    """Trains one opened run as the island `name` of a directory; `train.loop.train` takes it in place of `train_runs`.

    Returns its summary: of a complete run that of the outer parameters, which all islands have.
    """
    (run,) = runs
    began, config = time.perf_counter(), run.config
    with run.ledger.phase("exchange"), ExitStack() as held:
        shown = held.enter_context(progress(config, run.start))
        run.show(shown)
        for line in advice(config):
            run.say(line)
        run.stop_where_not_finite()  # an island then takes the outer state
        # An island saves at the end of a round, whose place in the directory it knows when it goes on.
        steps = Steps([run], lambda: held.enter_context(distributed.stop_requests()), shown, saves=False)
        local, timed = RunLocal(run, steps), bool(config.islands.round_seconds)
        if not distributed.is_main():
            stopped = processes.follow(local, timed)
        elif jax.process_count() > 1:
            leader = processes.Leader(local, timed)
            stopped = _lead(steps, leader, store, name, shown=shown, idle=leader.idle)
            leader.end(stopped)
        else:
            stopped = _lead(steps, local, store, name, shown=shown, idle=lambda: None)
        if stopped:  # what can go on is saved: the state at the end of a round
            run.manager.wait_until_finished()
            run.ledger.write(run.step, ended="stopped")
            return [{"status": "stopped", "step": run.step, "steps": config.train.steps}]
        steps.program.check_compiled_once()
        run.manager.wait_until_finished()
        if run.step in run.manager.all_steps():  # of what this island found in the last round: the result is not that
            run.manager.delete(run.step)
        shown.say("evaluating on held-out documents")
        return [run.finish(False, time.perf_counter() - began, sample)]


def _lead(steps: Steps, local: Local, store: Store, name: str, *, shown: Any, idle: Callable[[], None]) -> bool:
    """Goes through the rounds; returns whether a stop was requested. `idle` is called while there is nothing to do."""
    (run,) = steps.runs
    config = run.config
    with ExitStack() as held:
        identity = _identity(run.workdir, name, store)
        island = Island(store, name, identity["run"], rules_of(config), time.monotonic)
        island.agree(agreements.of(config, run.data.fingerprint, run.data.tokenizer.fingerprint))
        rows, loads = (held.enter_context(_log(run, file, run.start)) for file in ("rounds.jsonl", "island_load.jsonl"))

        def tell(kind: str, what: str) -> None:
            shown.say(f"island {name}: {kind.replace('_', ' ')}: {what}")
            run.events.write(run.step, kind, what)

        def row(values: Mapping[str, Any]) -> None:
            rows({name: value for name, value in values.items() if name != "loads"})
            if values["loads"]:
                of_round = {name: values[name] for name in ("step", "round", "loads")}
                loads(of_round | {"layers": run.trained_layers})

        rounds = Rounds(island, local, RunMemory(run.workdir), tell=tell, row=row, about=about(config), pause=_PAUSE)
        held.enter_context(_signs_of_life(rounds))
        try:
            for pause in rounds.go():
                if pause:
                    idle()
                    shown.idle()
                    with steps.paused():
                        time.sleep(pause)
        except Damaged as error:
            raise UserError(f"--islands={store.place}: {error}") from error
        return rounds.stopped


def about(config: Config) -> dict[str, Any]:
    """What an island says of its device and its software."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "compute_dtype": config.model.compute_dtype,
    }


class OfState(Local):
    """A local whose model is a `State` of a run's config."""

    not_finite = NotFinite
    run: Run
    ramp: ramp.Ramp  # how this island's batches grow

    def rows_before(self, step: int) -> int:
        return self.ramp.before(step)

    @property
    def state(self) -> State:
        raise NotImplementedError

    def go_on(self, state: State) -> None:
        """Goes on from another state, at its step."""
        raise NotImplementedError

    def tensors(self) -> dict[str, np.ndarray]:
        return tensors.flatten(sharding.fetch(self.state.params))

    def routers(self) -> dict[str, np.ndarray]:
        return routers.flatten(sharding.fetch(self.state.router_state))

    def put(
        self,
        params: Mapping[str, np.ndarray],
        states: Mapping[str, np.ndarray],
        step: int,
        fresh_optimizer: bool = False,
    ) -> None:
        state = init(self.run.config) if fresh_optimizer else self.state  # which may be broken altogether
        self.go_on(at_step(placed(state, params, states), step))


class RunLocal(OfState):
    """The model of a run."""

    def __init__(self, run: Run, steps: Steps) -> None:
        self.run, self._steps = run, steps
        self.ramp, self.tokens_per_row = ramp.of(to_dict(run.config.train)), run.config.data.sequence_length
        self._counted = run.counts_LE

    @property
    def step(self) -> int:
        return self._steps.step

    @property
    def state(self) -> State:
        return self.run.state

    def go_on(self, state: State) -> None:
        self._steps.take([state], int(state.step))

    def begin(self, numbers: Sequence[int], first: int) -> None:
        own, batches = own_rows(self.run.mesh, self.run.config), self.ramp.cut(first, [int(n) for n in numbers])
        self.run.batches = self.run.data.batches_of([[rows[i] for i in own if i < len(rows)] for rows in batches])
        self._counted = self.run.counts_LE

    def train(self, end: int, enough: Callable[[], bool]) -> Iterator[None]:
        self._steps.until(end, enough)
        return iter(())

    def loads(self) -> Sequence[Sequence[int]]:
        return (self.run.counts_LE - self._counted).tolist()

    def stop_requested(self) -> bool:
        return self._steps.stop_requested()

    def save(self) -> None:
        self.run.save(must=True)  # an island goes on from what the directory says of it


def at_step(state: State, step: int) -> State:
    """Returns a state at another step of the schedule, by which the optimizer counts too."""

    def moved(leaf: Any) -> Any:
        return leaf._replace(count=_like(leaf.count, step)) if is_schedule(leaf) else leaf

    is_schedule = lambda leaf: isinstance(leaf, optax.ScaleByScheduleState)
    opt_state = jax.tree.map(moved, state.opt_state, is_leaf=is_schedule)
    clocks = {"step": _like(state.step, step), "position": _like(state.position, step)}
    return state._replace(opt_state=opt_state, **clocks)


def placed(state: State, params: Mapping[str, np.ndarray], states: Mapping[str, np.ndarray]) -> State:
    """Returns a state with these tensors, which may be some of all, and these states of routers, unless empty."""
    if params:
        whole = {**tensors.flatten(sharding.fetch(state.params)), **params}
        state = state._replace(params=_placed(tensors.unflatten(whole, state.params), state.params))
    if states:
        state = state._replace(router_state=_placed(routers.unflatten(states), state.router_state))
    return state


def _like(array: jax.Array, value: Any) -> jax.Array:
    """A value on the devices and with the type of an array."""
    host = np.asarray(value, array.dtype)
    return jax.make_array_from_callback(array.shape, array.sharding, lambda index: host[index])


def _placed(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda leaf, value: _like(leaf, value), like, tree)


class RunMemory:
    """`rounds.Memory` in a run directory: island.json and, where contributions are rounded, island/residual_*."""

    def __init__(self, workdir: Path):
        self._record, self._folder = workdir / RECORD, workdir / FOLDER

    def write(self, found: Found) -> None:
        record = read_json(self._record)
        kept = [row for row in record["rounds"] if row["round"] < found.round][-_KEPT + 1 :]
        write_json(self._record, record | {"rounds": [*kept, found._asdict() | {"numbers": list(found.numbers)}]})

    def read(self, step: int) -> Found | None:
        rows = [row for row in read_json(self._record)["rounds"] if row["step"] == step]
        if not rows:
            return None
        numbers, loads = tuple(rows[-1]["numbers"]), tuple(map(tuple, rows[-1].get("loads", ())))
        return Found(**rows[-1] | {"numbers": numbers, "loads": loads})

    def first(self) -> int | None:
        return min((row["round"] for row in read_json(self._record)["rounds"]), default=None)

    def keep_residual(self, round: int, residual: Mapping[str, np.ndarray]) -> None:
        if not residual:
            return
        self._folder.mkdir(exist_ok=True)
        data = blobs.to_bytes(residual)
        write_atomically(self._folder / f"residual_{round:06d}", blobs.sha256(data).encode() + data)
        for old in self._residuals()[:-_KEPT]:
            (self._folder / f"residual_{old:06d}").unlink(missing_ok=True)

    def residual(self, round: int) -> dict[str, np.ndarray]:
        before = [kept for kept in self._residuals() if kept < round]
        if not before:
            return {}
        data = (self._folder / f"residual_{before[-1]:06d}").read_bytes()
        return blobs.from_bytes(data[64:], data[:64].decode(errors="replace"))

    def _residuals(self) -> list[int]:
        names = (path.name.removeprefix("residual_") for path in self._folder.glob("residual_*"))
        return sorted(int(name) for name in names if name.isdecimal())


def _identity(workdir: Path, name: str, store: Store) -> dict[str, Any]:
    """What says that a run is this island and not another one of its name: made once for a run directory."""
    path = workdir / RECORD
    if not path.is_file():
        write_json(path, {"island": name, "islands": store.place, "run": secrets.token_hex(8), "rounds": []})
    found = read_json(path)
    for flag, field, value in (("--island", "island", name), ("--islands", "islands", store.place)):
        if found.get(field) != value:
            raise UserError(f"{flag}={value}: the run in {workdir} is {field} {found.get(field)!r}")
    return found


@contextmanager
def _log(run: Run, name: str, step: int) -> Iterator[Callable[[Mapping[str, Any]], bool]]:
    """What writes rows to a log of the run; those after `step` are dropped."""
    log = rundir.Log(run.workdir / name, step)
    try:
        yield log.write
    finally:
        log.close()


@contextmanager
def _signs_of_life(rounds: Rounds) -> Iterator[None]:
    """Shows that the island lives while it trains, compiles or evaluates, unless nothing moves for very long."""
    lapse, done = rounds.section.lapse_seconds, threading.Event()

    def show() -> None:
        while not done.wait(lapse / 6):
            moves = time.monotonic() - rounds.touched < _PATIENCE * lapse
            if moves and rounds.status in ("training", "waiting"):
                with suppress(StoreError):  # the next one may come through; the island itself tells
                    rounds.show_again()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
