"""Islands in processes of their own, for the proofs: how they are started, stopped, killed, frozen and watched.

Processes are forked from a server that has imported everything and computed nothing, so that one costs no seconds.
There are two kinds: `product` is what `frugalmoe train --islands` does, `vectors` the same protocol, store and run
directory around the model of small vectors of test_islands_rounds.py, which costs nothing to start.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from runs import tiny
from test_islands_rounds import Vectors, check_accounts, commits, make_rules

from frugalmoe.errors import EXIT_PREEMPTED, UserError
from frugalmoe.files import write_atomically
from frugalmoe.islands import blobs, outer, records, training
from frugalmoe.islands.contract import Offered
from frugalmoe.islands.directory import Rules
from frugalmoe.islands.island import Island
from frugalmoe.islands.records import Agreement
from frugalmoe.islands.rounds import Rounds
from frugalmoe.islands.store import PATIENCE as PATIENCE_OF_STORES
from frugalmoe.islands.store import Store, open_store

COMPLETE, STOPPED, REFUSED = 0, EXIT_PREEMPTED, 2
PATIENCE = 240.0  # seconds that a test waits for anything, on a machine that is busy with others
_CONTEXT = multiprocessing.get_context("forkserver")


def _server() -> Any:
    """What processes are forked from; Python 3.11 does not hand it this one's path, by which it finds this file."""
    before = os.environ.get("PYTHONPATH")
    _CONTEXT.set_forkserver_preload(["islands_processes", "frugalmoe.train.loop", "orbax.checkpoint"])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before:
            os.environ["PYTHONPATH"] = before
    return _CONTEXT


class Process:
    """A process that has been started: `pid` while it lives, `wait` for how it ended, `said` for what it printed."""

    def __init__(self, log: Path, target: Callable[..., int], *args: Any, **environment: str) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._process = _server().Process(target=_main, args=(log, environment, target, args))
        self._process.start()
        self.pid = self._process.pid

    def wait(self, timeout: float = PATIENCE) -> int:
        """Returns the exit status; that of a signal is negative."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.signal(signal.SIGKILL)
            raise TimeoutError(f"after {timeout} s: {self.said()[-2000:]}")
        return self._process.exitcode

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def signal(self, number: signal.Signals) -> None:
        if self.alive:
            os.kill(self.pid, number)

    def said(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""


def _main(log: Path, environment: Mapping[str, str], target: Callable[..., int], args: Sequence[Any]) -> None:
    to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(to, 1)
    os.dup2(to, 2)
    os.environ.update(environment)
    try:
        status = target(*args)
    except UserError as error:
        print(f"error: {error}", flush=True)
        status = REFUSED
    sys.exit(status)


# What they run.


@dataclasses.dataclass(frozen=True)
class Place:
    """One island's: the directory in which it meets others, its own one, its name and the fields of its config."""

    islands: str
    runs: Path
    name: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def workdir(self) -> Path:
        return self.runs / self.name

    def rows(self, name: str = "rounds.jsonl") -> list[dict[str, Any]]:
        path = self.workdir / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def outer(self) -> dict[str, np.ndarray]:
        """The parameters at the end."""
        data = (self.workdir / "outer").read_bytes()
        return blobs.from_bytes(data, blobs.sha256(data))

    def start(self, target: Callable[..., int], *args: Any, **environment: str) -> Process:
        return Process(self.runs / f"{self.name}.log", target, self, *args, **environment)


class Quiet:
    """What a run says goes to the log."""

    def __init__(self, *ignored: Any) -> None: ...

    def __enter__(self) -> "Quiet":
        return self

    def __exit__(self, *error: Any) -> None: ...

    def say(self, text: str) -> None:
        print(text, flush=True)

    def update(self, *numbers: Any) -> None: ...

    def idle(self) -> None: ...


# The smallest model, for `product`; and what islands of it need in little time.
SMALL = {"model.num_layers": 2, "model.vocab_size": 320, "train.batch_size": 2, "train.eval_rows": 8}
OF_RUNS = SMALL | {"islands.lapse_seconds": 600.0, "islands.keep_rounds": 0, "model.moe.router": "sigmoid_bias"}
KILLED = OF_RUNS | {"train.steps": 6, "islands.round_steps": 3, "islands.bits": 8, "islands.snapshot_rounds": 2}


def product_rules(text: Path, fields: Mapping[str, Any]) -> Rules:
    """The rules of the islands that `product` makes."""
    return training.rules_of(tiny(text, text.parent / "cache", fields))


def product(place: Place, text: Path, spoil: Callable[..., dict] | None = None, kill_at: int = -1) -> int:
    """`frugalmoe train --islands`, without the sample and the report at its end.

    spoil: (round, parameters, outer ones) -> what is handed in instead; kill_at: the operation on files before which
    the process ends; -1: none, and they are not counted.
    """
    import jax

    from frugalmoe import sharding
    from frugalmoe.commands import set_up_training
    from frugalmoe.islands import tensors
    from frugalmoe.train.loop import train, train_runs

    config = tiny(text, text.parent / "cache", place.fields)
    set_up_training(config)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # so that one process compiles for all

    def watched(drive: Callable) -> Callable:
        """Keeps the parameters that a complete run has at its end."""

        def driven(runs: Sequence[Any], *rest: Any) -> list[dict[str, Any]]:
            found = drive(runs, *rest)
            if found[0]["status"] == "complete":
                (place.workdir / "outer").write_bytes(
                    blobs.to_bytes(tensors.flatten(sharding.fetch(runs[0].state.params)))
                )
            return found

        return driven

    if not place.islands:
        return _status(train(config, place.workdir, progress=Quiet, drive=watched(train_runs)))
    store = training.check(config, place.islands, place.name)
    if kill_at >= 0:
        fault = Fault(kill_at)
        fault.store(store)
        memory, local = training.RunMemory, training.RunLocal
        for cls, name in ((memory, "write"), (memory, "keep_residual"), (local, "save")):
            setattr(cls, name, fault.around(getattr(cls, name)))
    if spoil:
        honest = Island.contribute
        Island.contribute = lambda self, local, *rest: honest(
            self, spoil(self.held.round + 1, local, self.held.outer.params), *rest
        )
    drive = functools.partial(training.drive, store=store, name=place.name)
    status = _status(train(config, place.workdir, progress=Quiet, drive=watched(drive)))
    if kill_at >= 0:
        print(f"operations {fault.count}", flush=True)
    return status


def _status(summary: Mapping[str, Any]) -> int:
    return STOPPED if summary["status"] == "stopped" else COMPLETE


class Fault:
    """Ends this process by SIGKILL before its `at`-th operation on files; 0: counts only."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def around(self, operation: Callable) -> Callable:
        @functools.wraps(operation)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return counted

    def store(self, store: Store) -> Store:
        for name in ("read", "write", "create", "list", "delete"):
            setattr(store, name, self.around(getattr(store, name)))
        return store


class OnDisk(Vectors):
    """Vectors that are saved in a run directory: at once, or, as by a slow disk, only when the next ones are."""

    def __init__(self, workdir: Path, seconds: float, work: float, slow_disk: bool) -> None:
        self.path, self.slow_disk, self.work, self.touched = workdir / "state", slow_disk, work, time.monotonic()
        super().__init__(seconds)
        self.member = SimpleNamespace(now=0.0)

    def train(self, end: int, enough: Callable[[], bool]) -> Iterator[None]:
        for _ in super().train(end, enough):
            spent = time.process_time() + self.work
            while time.process_time() < spent:  # seconds of a processor; a process that is frozen gets none
                pass
            time.sleep(self.seconds_of(self.step))
            self.touched = time.monotonic()
            yield

    def stop_requested(self) -> bool:
        self.touched = time.monotonic()
        return self.stopping

    def save(self) -> None:
        before = getattr(self, "_saved", None)
        super().save()
        state = before if self.slow_disk else self._saved
        if state is not None and state[3]:
            self.flush(state)

    def flush(self, state: tuple | None = None) -> None:
        values, momentum, routers, step = state or self._saved
        arrays = {f"{kind}/{k}": v for kind, of in zip("vmr", (values, momentum, routers)) for k, v in of.items()}
        data = blobs.to_bytes({**arrays, "step": np.float32(step)})
        write_atomically(self.path, blobs.sha256(data).encode() + data)

    def restore(self) -> None:
        if self.path.is_file():
            data = self.path.read_bytes()
            found = blobs.from_bytes(data[64:], data[:64].decode())
            of = lambda kind: {name[2:]: value for name, value in found.items() if name.startswith(f"{kind}/")}
            self._saved = of("v"), of("m"), of("r"), int(found["step"])
        super().restore()


def vectors(
    place: Place,
    seconds: float = 0.0,
    work: float = 0.0,
    slow_disk: bool = False,
    kill_at: int = -1,
    patience: float = PATIENCE_OF_STORES,
) -> int:
    """An island of small vectors. Prints how many operations on files there were; see `product` for kill_at.

    patience: seconds for which an operation of the store is tried again before the island tells of it.
    """
    place.workdir.mkdir(parents=True, exist_ok=True)
    rules, store, fault = make_rules(**place.fields), open_store(place.islands), Fault(kill_at)
    store.patience = patience
    local, memory = OnDisk(place.workdir, seconds, work, slow_disk), training.RunMemory(place.workdir)
    local.restore()
    identity = training._identity(place.workdir, place.name, store)
    if kill_at >= 0:
        fault.store(store)
        memory.write, memory.keep_residual = fault.around(memory.write), fault.around(memory.keep_residual)
        local.save = fault.around(local.save)

    def stop(*ignored: Any) -> None:
        local.stopping = True

    signal.signal(signal.SIGTERM, stop)
    island = Island(store, place.name, identity["run"], rules, time.monotonic)
    island.agree(agreement(rules))
    with contextlib.ExitStack() as held:
        log = lambda name: held.enter_context((place.workdir / name).open("a", buffering=1))
        events, rows = log("events.jsonl"), log("rounds.jsonl")
        tell = lambda kind, what: print(json.dumps({"kind": kind, "what": what}), file=events)
        rounds = Rounds(island, local, memory, tell=tell, row=lambda row: print(json.dumps(row), file=rows), pause=0.02)
        if kill_at < 0:  # a thread of its own would make the order of operations one of chance
            held.enter_context(training._signs_of_life(rounds))
        for pause in rounds.go():
            if pause:
                time.sleep(pause)
    local.flush()
    print(f"operations {fault.count}", flush=True)
    if rounds.stopped:
        return STOPPED
    (place.workdir / "outer").write_bytes(blobs.to_bytes(local.tensors()))
    return COMPLETE


def agreement(rules: Rules) -> Agreement:
    fields = {field.name: getattr(rules.section, field.name) for field in dataclasses.fields(rules.section)}
    plain = json.loads(json.dumps(fields, default=dict))
    return Agreement(format=records.FORMAT, model={}, data="", tokenizer="", seed=0, steps=rules.steps, islands=plain)


# What is looked at.


@dataclasses.dataclass
class Reader:
    """What `check_accounts` wants of an island: its store and its rules."""

    store: Store
    rules: Rules


def replay(store: Store, rules: Rules) -> list[records.Commit]:
    """Returns all commit records, after every outer step has been computed again from the blobs in the directory, and
    every coefficient by the merge rule, with the same bits.
    """
    found = commits(Reader(store, rules))
    island = Island(store, "replay", "replay", rules, lambda: 0.0)
    shapes = {tensor.name: tensor.shape for tensor in rules.tensors}
    island.catch_up(0)
    for before, commit in itertools.pairwise(found):
        names = rules.names(commit.round)
        deltas = [island.delta(island.read_blob(c.blob), names, shapes) for c in commit.merged]
        number = functools.partial(_numbers, commit)
        offered = Offered(
            tuple(c.island for c in commit.merged), outer.gram(deltas, names),
            tuple(tensor for name in names for tensor in rules.tensors if tensor.name == name),
            number("tokens"), number("steps"), commit.round - number("round"),
        )  # fmt: skip
        merged = rules.merge.merge(offered, before.history, rules.section.merge_options)
        assert np.array_equal(merged.coefficients_MQ, np.array(commit.coefficients).reshape(len(deltas), len(names)))
        after = island.take(commit)  # raises where the checksum is another one
        if commit.snapshot:
            whole = island.read_snapshot(commit)
            assert outer.sha256(whole.outer.momentum) == outer.sha256(after.outer.momentum)
    return found


def _numbers(commit: records.Commit, field: str) -> np.ndarray:
    return np.array([getattr(c, field) for c in commit.merged], np.int64)


def newest(store: Store) -> int:
    """The newest round that was decided; -1: none."""
    keys = [key for key in store.list("rounds/") if key.endswith("/commit.json")]
    return max((records.round_of(key) or 0 for key in keys), default=-1)


def until(condition: Callable[[], bool], patience: float = PATIENCE, pause: float = 0.02) -> None:
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"after {patience} s")
        time.sleep(pause)


@contextlib.contextmanager
def at_speed(process: Process, share: float, period: float = 0.1) -> Iterator[None]:
    """Lets a process run for a share of the time only, by stopping it and letting it go on, from a thread."""
    import threading

    done = threading.Event()

    def turn() -> None:
        while not done.is_set() and process.alive:
            done.wait(period * share)
            process.signal(signal.SIGSTOP)
            done.wait(period * (1 - share))
            process.signal(signal.SIGCONT)

    thread = threading.Thread(target=turn, daemon=True)
    if share < 1:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if share < 1:
            thread.join()
            process.signal(signal.SIGCONT)


# Faults.

KINDS = ("kill", "join", "leave", "freeze")


@dataclasses.dataclass
class Disturbed:
    """What happened to islands while they trained."""

    faults: list[tuple[int, str, str]] = dataclasses.field(default_factory=list)  # newest round, kind, island
    places: dict[str, Place] = dataclasses.field(default_factory=dict)
    complete: list[str] = dataclasses.field(default_factory=list)
    stopped: list[str] = dataclasses.field(default_factory=list)


class Disturber:
    """Starts islands and does them harm, as one number of chance says, each at its round, until they are done."""

    def __init__(self, root: Path, seed: int, fields: Mapping[str, Any], target: Callable[..., int], *args: Any):
        self.root, self.random, self.fields, self.target, self.args = root, random.Random(seed), fields, target, args
        self.url = str(root / "islands")
        self.store = open_store(self.url)
        self.result, self.live, self.frozen = Disturbed(), {}, {}
        self.away: list[tuple[int, float, str]] = []  # round and time at which it is started again

    def start(self, name: str) -> None:
        place = self.result.places.setdefault(name, Place(self.url, self.root / "runs", name, self.fields))
        self.live[name] = place.start(self.target, *self.args)

    def run(
        self, islands: int, faults: int, kinds: Sequence[str] = KINDS, freeze: float = 2.0, every: int = 2
    ) -> Disturbed:
        for number in range(islands):
            self.start(f"i{number:02}")
        due, left = 1, faults
        end = time.monotonic() + PATIENCE + 40 * faults
        while self.live or self.away:
            now = newest(self.store)
            self._go_on(now)
            if left and now >= due:
                self._harm(self.random.choice(kinds), now, freeze)
                left, due = left - 1, now + self.random.randint(1, every)
            if time.monotonic() > end:
                for process in self.live.values():
                    process.signal(signal.SIGKILL)
                raise TimeoutError(f"round {now}, {len(self.result.faults)} faults: {self.result.faults[-5:]}")
            time.sleep(0.02)
        assert not left, f"{left} faults were left when all were done: give it more steps"
        return self.result

    def _go_on(self, now: int) -> None:
        """Lets go on whose time has come, and looks who has ended."""
        for name, end in list(self.frozen.items()):
            if time.monotonic() >= end:
                self.live[name].signal(signal.SIGCONT)
                del self.frozen[name]
        for name, process in list(self.live.items()):
            if not process.alive:
                del self.live[name]
                status = process.wait()
                # Before it listens for signals there is nothing to save.
                status = STOPPED if status == -signal.SIGTERM else status
                assert status in (COMPLETE, STOPPED), f"{name} ended with {status}: {process.said()[-2000:]}"
                (self.result.complete if status == COMPLETE else self.result.stopped).append(name)
                if status == STOPPED and self.random.random() < 0.5:
                    self.away.append((now + 1, time.monotonic() + 3, name))
        for entry in list(self.away):
            if now >= entry[0] or time.monotonic() >= entry[1]:
                self.away.remove(entry)
                self.result.stopped = [name for name in self.result.stopped if name != entry[2]]
                self.start(entry[2])

    def _harm(self, kind: str, now: int, freeze: float) -> None:
        awake = [name for name in sorted(self.live) if name not in self.frozen]
        if kind in ("leave", "freeze") and len(awake) < 2:
            kind = "join"  # somebody has to go on
        if kind == "join":
            name = f"i{len(self.result.places):02}"
            self.start(name)
        elif not awake:
            return
        else:
            name = self.random.choice(awake)
        if kind == "kill":
            process = self.live.pop(name)
            process.signal(signal.SIGKILL)
            process.wait()
            self.away.append((now + self.random.randint(0, 2), time.monotonic() + 3, name))
        elif kind == "leave":
            self.live[name].signal(signal.SIGTERM)
        elif kind == "freeze":
            self.live[name].signal(signal.SIGSTOP)
            self.frozen[name] = time.monotonic() + freeze
        self.result.faults.append((now, kind, name))


def check(disturber: Disturber, rules: Rules) -> list[records.Commit]:
    """Accounts are exact, the replay has the same bits, and all that went to the end hold the last outer state."""
    check_accounts(Reader(disturber.store, rules))
    found = replay(disturber.store, rules)
    assert found[-1].round == rules.rounds
    by_round: dict[int, set[str]] = {}
    for place in disturber.result.places.values():
        for row in place.rows():
            by_round.setdefault(row["round"], set()).add(row["outer_sha256"])
    assert all(by_round[commit.round] <= {commit.outer} for commit in found if commit.round in by_round)
    for name in disturber.result.complete:
        assert outer.sha256(disturber.result.places[name].outer()) == found[-1].outer
    return found


# One island that is killed before an operation on files, and started again.


def operations(said: str) -> int:
    return int(said.split("operations")[-1])


def check_kills(
    room: Path,
    start: Callable[[Place, int], Process],
    fields: Mapping[str, Any],
    rules: Rules,
    choose: Callable[[int], Iterable[int]],
    at_once: int = 4,
) -> list[int]:
    """Kills an island before each chosen operation of a whole run, and lets the same command go on: the records and
    the end are those of a run that was not disturbed, bit for bit. Returns the operations.

    start: (place, operation before which it is killed; 0: none); choose: how many operations there are -> which.
    """
    clean = Place(str(room / "clean"), room / "clean-runs", "a", fields)
    process = start(clean, 0)
    assert process.wait() == COMPLETE, process.said()[-2000:]
    count, expected = operations(process.said()), (clean.workdir / "outer").read_bytes()
    assert count > 30
    places = [(k, Place(str(room / f"d{k}"), room / f"r{k}", "a", fields)) for k in choose(count)]
    for begin in range(0, len(places), at_once):
        chosen = places[begin : begin + at_once]
        killed = [start(place, k) for k, place in chosen]
        assert [process.wait() for process in killed] == [-signal.SIGKILL] * len(chosen), killed[0].said()[-2000:]
        again = [start(place, 0) for _, place in chosen]
        assert [process.wait() for process in again] == [COMPLETE] * len(chosen), again[0].said()[-2000:]
    hashes = [row["outer_sha256"] for row in clean.rows()]
    for k, place in places:
        found = replay(open_store(place.islands), rules)
        assert [commit.outer for commit in found[1:]] == hashes, f"killed before operation {k}"
        assert (place.workdir / "outer").read_bytes() == expected, f"killed before operation {k}"
    return [k for k, _ in places]


# Islands that hand in something else than they found.


class Spoil:
    """Each of the ways in which an island can be wrong, one round after the other, from round `begin` on."""

    WAYS = ("scaled by 1000", "sign flipped", "not finite", "noise", "one bit flipped")

    def __init__(self, begin: int = 2) -> None:
        self.begin, self.before = begin, 0

    def __call__(self, round: int, params: dict[str, np.ndarray], outer: Mapping[str, np.ndarray]) -> dict[str, Any]:
        again, self.before = round == self.before, round
        if round < self.begin or again:  # where a round is trained again, what comes of it is right
            return params
        way, chance = self.WAYS[(round - self.begin) % len(self.WAYS)], np.random.default_rng(round)
        if way == "one bit flipped":  # the highest of an exponent: a number of about 1e38
            name = max(sorted(params), key=lambda name: params[name].size)
            bits = params[name].copy().view(np.uint32)
            bits.reshape(-1)[chance.integers(bits.size)] ^= np.uint32(1 << 30)
            return {**params, name: bits.view(np.float32)}
        change = {
            "scaled by 1000": lambda delta: np.float32(1000) * delta,
            "sign flipped": lambda delta: -delta,
            "not finite": lambda delta: np.full_like(delta, np.nan),
            "noise": lambda delta: delta + np.float32(chance.normal(size=delta.shape)),
        }[way]
        return {name: outer[name] + change(params[name] - outer[name]) for name in sorted(params)}
