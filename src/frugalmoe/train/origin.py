"""A run that begins with the weights of another, or of a published model: what of them fits, and what is made new.

Parameters are taken by their paths, names joined by `/`. What does not fit is named and refused, unless it is said to
be new on purpose. The optimizer's state and the two clocks begin anew.
"""

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from frugalmoe import sharding
from frugalmoe.config import RECORD, Config, record
from frugalmoe.data.tokenizer import load_from
from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.fields import to_dict
from frugalmoe.model.transformer import declarations, structure
from frugalmoe.schema import Checkpoint
from frugalmoe.train import checkpoint, memory, rundir, saved
from frugalmoe.train.saved import Damaged, Skipped
from frugalmoe.train.step import State, abstract, finite, init
from frugalmoe.train.weights import check_run

STATES = ("auto", "yes", "no")
SHOWN = 10  # of what does not fit

Shapes = Mapping[str, tuple[int, ...]]  # by path


class Stored(Protocol):
    """Arrays that a run may begin with: those of a run's checkpoints, or of a published model."""

    router: Any  # of the config that they were made with
    tokenizer: str  # fingerprint

    def fault(self, step: int, quick: bool) -> str:
        """Returns what is wrong with the files of a step, "" for nothing; quick: without reading large ones."""
        ...

    def shapes(self, step: int, item: str, ours: Iterable[str]) -> Shapes:
        """Returns the shapes of `params` or `router_state`; ours: the paths that a model of today has."""
        ...

    def arrays(self, step: int, wanted: checkpoint.Arrays) -> checkpoint.Arrays:
        """Returns some arrays, placed as `wanted` has them, which holds abstract ones; others are not read."""
        ...

    def digest(self, step: int, items: Iterable[str]) -> str:
        """Returns the SHA-256 of the files that hold some items."""
        ...

    def accompany(self, workdir: Path) -> None:
        """Writes into a run's directory what came with the weights, so that it can be published as they were."""
        ...


class Published(Stored, Protocol):
    """A published model's directory, as `convert.origin` opens it."""

    family: str


class Origin(NamedTuple):
    """Where a run's first weights come from, as it is asked for."""

    run: Path  # or the directory of a published model
    step: int | None = None  # of the checkpoint; None: the newest that is whole and finite
    state: str = "auto"  # whether the routers' state comes too: yes | no | auto, where the router is the same
    drop: tuple[str, ...] = ()  # glob patterns of paths, as head*, that are made new
    published: Published | None = None  # None: `run` is a run

    def __str__(self) -> str:
        return f"--from={self.run}" + (f"@{self.step}" if self.step is not None else "")

    def recorded(self) -> dict[str, Any]:
        """What a run's record says of what was asked for."""
        asked = {"run": str(self.run.resolve()), "state": self.state, "drop": list(self.drop)}
        return asked | ({"family": self.published.family} if self.published else {})


class _OfRun(NamedTuple):
    """The checkpoints of a run, as `Stored`."""

    run: Path
    manager: Any

    @property
    def router(self) -> Any:
        return record(self.run / RECORD)["model"]["moe"]["router"]

    @property
    def tokenizer(self) -> str:
        return load_from(self.run / "tokenizer").fingerprint

    def fault(self, step: int, quick: bool) -> str:
        return saved.fault(self.run, step, quick)

    def shapes(self, step: int, item: str, ours: Iterable[str]) -> Shapes:
        with checkpoint.reading(self.run, step):
            return checkpoint.shapes(self.manager, step, item, ours)

    def arrays(self, step: int, wanted: checkpoint.Arrays) -> checkpoint.Arrays:
        with checkpoint.reading(self.run, step):
            return checkpoint.restore_arrays(self.manager, step, wanted)

    def digest(self, step: int, items: Iterable[str]) -> str:
        return checkpoint.digest(self.run, step, items)

    def accompany(self, workdir: Path) -> None:
        rundir.copy_source(self.run, workdir)


@contextmanager
def _stored(origin: Origin) -> Iterator[Stored]:
    check_there(origin, None)
    if origin.published is not None:
        yield origin.published
        return
    with checkpoint.open_manager(origin.run, Checkpoint()) as manager:
        yield _OfRun(origin.run, manager)


class Fit(NamedTuple):
    """What of a checkpoint, or of a published model, a config takes."""

    of: str  # step 12, or a family
    step: int  # 0 for a published model
    taken: Mapping[str, tuple[str, ...]]  # of params and router_state: paths
    new: tuple[str, ...]  # paths of parameters that are made new

    def __str__(self) -> str:
        new = ", ".join(self.new[:SHOWN]) + (f" and {len(self.new) - SHOWN} more" if len(self.new) > SHOWN else "")
        state = "with" if self.taken["router_state"] else "without"
        return f"{len(self.taken['params'])} parameters of {self.of}, {state} routers' state; new: {new or 'none'}"


class Begun(NamedTuple):
    """The state before the first step, and what a run's record says of where it comes from."""

    origin: Origin
    state: State
    record: dict[str, Any]
    notes: tuple[str, ...]


class ToRead(NamedTuple):
    origin: Origin | None
    digest: str | None = None  # that its files must have; None: any


def differences(origin: Origin, recorded: Mapping[str, Any] | None) -> list[str]:
    """Returns how an origin differs from that with which a run began, whose record is given; the run is not read."""
    if recorded is None:
        return ["it began with weights of its own"]
    asked = origin.recorded() | ({"step": origin.step} if origin.step is not None else {})
    return [
        f"{key}={recorded.get(key)!r} there, {value!r} here"
        for key, value in asked.items()
        if recorded.get(key) != value
    ]


def to_read(origin: Origin | None, workdir: Path, fresh: bool) -> ToRead:
    """Returns the origin that a start in `workdir` reads.

    A run that has saved a checkpoint reads none. One that was interrupted before reads that of its record.
    """
    if fresh:
        return ToRead(origin)
    if saved.entries(workdir):
        return ToRead(None)
    found = rundir.origin_of(workdir)
    if found is None:
        return ToRead(origin)
    if "family" in found:
        if origin is None or origin.published is None:
            rule = "the run began with a published model, and has not saved since"
            raise UserError(f"--workdir={workdir}: {rule}; give --from={found['run']} again, or --fresh to start over")
        return ToRead(origin._replace(state=found["state"], drop=tuple(found["drop"])), found["sha256"])
    return ToRead(Origin(Path(found["run"]), found["step"], found["state"], tuple(found["drop"])), found["sha256"])


def check_there(origin: Origin, workdir: Path | None) -> list[int]:
    """Returns the steps of an origin's checkpoints; raises `UserError` for one that is no run or lacks its step."""
    if origin.state not in STATES:
        raise UserError(f"--from.state={origin.state}: unknown; {did_you_mean(origin.state, STATES)}")
    if origin.published is not None:
        if origin.step is not None:
            raise UserError(f"{origin}: a published model has no steps; leave @{origin.step} out")
        return [0]
    check_run(origin.run)
    if workdir is not None and origin.run.resolve() == workdir.resolve():
        raise UserError(f"{origin}: is the run directory itself; give another --workdir")
    steps = saved.entries(origin.run)
    if not steps:
        raise UserError(f"{origin}: holds no checkpoint yet")
    if origin.step not in (None, *steps):
        raise UserError(f"{origin}: no checkpoint of step {origin.step}; valid: {steps}")
    return steps


def check(origin: Origin, config: Config, tokenizer: str) -> Fit:
    """Returns what a config takes of an origin, as far as shapes tell; no array is read.

    `config` has the size of its vocabulary; `tokenizer` is the fingerprint of its tokenizer. Raises `UserError` for an
    origin that is no run, has no such checkpoint or does not fit.
    """
    with _stored(origin) as stored:
        fit, _ = _newest(origin, stored, lambda step: _fit(origin, config, stored, step), quick=True)
        _check_tokenizer(origin, config, fit, (stored.tokenizer, tokenizer))
    return fit


def _newest(
    origin: Origin, stored: Stored, read: Callable[[int], Any], quick: bool = False
) -> tuple[Any, list[Skipped]]:
    """What `read` returns of the step that was asked for, or of the newest that is not damaged, and what was passed
    over; raises `UserError` where there is none.
    """
    skipped: list[Skipped] = []
    for step in check_there(origin, None)[::-1] if origin.step is None else [origin.step]:
        try:
            if why := stored.fault(step, quick):
                raise saved.damaged(origin.run, Skipped(step, why))
            return read(step), skipped
        except Damaged as damaged:
            skipped.append(Skipped(step, damaged.why))
    what = "holds numbers that are not finite" if origin.published else saved.damaged(origin.run, *skipped)
    raise UserError(f"{origin}: {what}")


def check_numbers(origin: Origin, config: Config) -> None:
    """Reads what a config, settled for the devices that are here, takes of an origin. Raises as `begin` does."""
    with jax.set_mesh(sharding.make_mesh(to_dict(config.mesh))):
        begin(origin, config)


def begin(origin: Origin, config: Config, digest: str | None = None) -> Begun:
    """Returns the state before the first step on the mesh in context: what fits of an origin, else what `init` has.

    To be called after `check`. `digest` is that of its files where they were read before. Raises `UserError` where it
    is another now, for numbers that are not finite, and, before any is read, for a state that does not fit into memory.
    """
    like = abstract(config)  # and the gradient, or what is read, which is as large as the parameters
    needed = memory.on_device(like) + memory.on_device(like.params)
    memory.check(str(origin), needed, len(jax.sharding.get_mesh().local_devices))

    def read(step: int) -> tuple[Fit, State]:
        fit = _fit(origin, config, stored, step)
        state = _with_arrays(config, stored, fit)
        if state is None:
            raise saved.damaged(origin.run, Skipped(step, "not finite"))
        return fit, state

    with _stored(origin) as stored:
        (fit, state), skipped = _newest(origin, stored, read)
        step = fit.step
        found = stored.digest(step, [item for item, paths in fit.taken.items() if paths])
    if digest not in (None, found):
        rule = f"has changed since the run began with it (sha256 {digest[:12]} then, {found[:12]} now)"
        raise UserError(f"{origin}: {rule}; --fresh starts over")
    taken = {"step": step, "sha256": found, "router_state": bool(fit.taken["router_state"]), "new": list(fit.new)}
    notes = [] if origin.published else saved.lines(origin.run, skipped, step)
    return Begun(origin, state, origin.recorded() | taken, (*notes, f"{origin}: {fit}"))


def accompany(origin: Origin, workdir: Path) -> None:
    """Writes into a run's directory what came with the weights that it began with."""
    with _stored(origin) as stored:
        stored.accompany(workdir)


def _with_arrays(config: Config, stored: Stored, fit: Fit) -> State | None:
    """The state before the first step with a checkpoint's arrays; None where they are not finite."""
    like = abstract(config)
    wanted = {
        item: {p: a for p, a in _by_path(getattr(like, item)).items() if p in fit.taken[item]} for item in fit.taken
    }
    arrays = stored.arrays(fit.step, wanted)
    if not jax.jit(finite)(arrays):
        return None
    state = init(config)
    put = lambda item, tree: jax.tree_util.tree_map_with_path(lambda p, a: arrays[item].get(_path(p), a), tree)
    return state._replace(**{item: put(item, getattr(state, item)) for item in arrays})


def _fit(origin: Origin, config: Config, stored: Stored, step: int) -> Fit:
    """What a config takes of a step; raises `UserError` that lists what does not fit."""
    _, params, router_state = structure(config.model)
    ours = {"params": _shapes(params), "router_state": _shapes(router_state)}
    theirs = {item: dict(stored.shapes(step, item, ours[item])) for item in ours}
    for pattern in origin.drop:
        if not any(fnmatch.filter(shapes, pattern) for shapes in (*ours.values(), *theirs.values())):
            rule = "matches no parameter; valid: " + ", ".join(sorted({path.split("/")[0] for path in ours["params"]}))
            raise UserError(f"--from.drop={pattern}: {rule}, and what is below them, joined by /")
    new = tuple(path for path in ours["params"] if _matches(path, origin.drop))
    if not _takes_state(origin, config, new, stored):
        ours["router_state"] = theirs["router_state"] = {}
    wrong, taken = [], {}
    for item in ours:
        left, right = ({p: s for p, s in side[item].items() if not _matches(p, origin.drop)} for side in (ours, theirs))
        wrong += _differences(left, right)
        taken[item] = tuple(left)
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        rule = "--from.drop=GLOB makes new what it names; --from.state=no the routers' state"
        raise UserError(f"{origin}: {len(wrong)} arrays do not fit: {'; '.join(wrong[:SHOWN])}{more}. {rule}")
    return Fit(origin.published.family if origin.published else f"step {step}", step, taken, new)


def _differences(ours: Shapes, theirs: Shapes) -> list[str]:
    shown = lambda shapes, path: "x".join(map(str, shapes[path])) if path in shapes else "none"
    return [
        f"{path} {shown(theirs, path)} there, {shown(ours, path)} here"
        for path in sorted(ours.keys() | theirs.keys())
        if ours.get(path) != theirs.get(path)
    ]


def _takes_state(origin: Origin, config: Config, new: Iterable[str], stored: Stored) -> bool:
    """Whether the routers' state is taken: by default that of the same router, none of whose parameters is new."""
    if origin.state != "auto":
        return origin.state == "yes"
    declared = declarations(config.model)
    is_router = lambda path: declared[tuple(path.split("/"))].role == "router"
    return stored.router == to_dict(config.model.moe)["router"] and not any(map(is_router, new))


def _check_tokenizer(origin: Origin, config: Config, fit: Fit, fingerprints: tuple[str, str]) -> None:
    """Refuses weights that mean other tokens than the run's, unless nothing that knows tokens is taken.

    fingerprints: of the origin's tokenizer, and of the run's.
    """
    roles = {declarations(config.model)[tuple(path.split("/"))].role for path in fit.taken["params"]}
    if roles & {"embedding", "head"} and len(set(fingerprints)) > 1:
        own = origin.run if origin.published else origin.run / "tokenizer"
        rule = f"another tokenizer than that of {origin}; give --config.data.tokenizer={own}"
        raise UserError(
            f"data.tokenizer={config.data.tokenizer!r}: {rule}, or make embedding and head new: --from.drop"
        )


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _by_path(tree: Any) -> dict[str, Any]:
    return {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _shapes(tree: Any) -> Shapes:
    return {path: tuple(leaf.shape) for path, leaf in _by_path(tree).items()}


def _path(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
