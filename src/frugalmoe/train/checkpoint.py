"""Checkpoints, by Orbax. Saves are asynchronous; a step becomes visible only when it is whole, with its checksums."""

import asyncio
import hashlib
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from frugalmoe.data import quarantine
from frugalmoe.errors import UserError
from frugalmoe.schema import Checkpoint
from frugalmoe.train import checksums, distributed, guard, memory, saved
from frugalmoe.train.guard import Guard
from frugalmoe.train.saved import Damaged, Skipped
from frugalmoe.train.saved import saved_steps as saved_steps
from frugalmoe.train.step import State, finite

_ITEMS = ("params", "router_state", "opt_state", "step")
# Seconds. Orbax takes the time of day, which may be set while it saves: an hour must not count for one.
_TIMEOUT = 7 * 24 * 3600

# Arrays that had another name in older checkpoints, which are read with today's: one letter of a name, one meaning.
RENAMED = {
    "key_DKd": "key_Dhd",
    "value_DKd": "value_Dhd",
    "key_bias_Kd": "key_bias_hd",
    "value_bias_Kd": "value_bias_hd",
    "proj_DH": "proj_DP",
    "kernel_HE": "kernel_PE",
    "input_HG": "input_PW",
    "state_HG": "state_PW",
    "input_bias_G": "input_bias_W",
    "new_bias_H": "new_bias_P",
    "up_DH": "up_DP",
    "out_H": "out_P",
    "mix_CDM": "mix_ZD2",
    "constant_CD": "constant_ZD",
}


class _These(policies.PreservationPolicy):
    """Keeps the checkpoints of a set of steps, which its owner changes."""

    def __init__(self, steps: Set[int]):
        self._steps = steps

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [saved.step in self._steps for saved in checkpoints]


class _Summed(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A directory that gets its name when all is written: that of a step, after the records of data that the run left
    out, and its checksums. The thread that saves calls it in process 0, once all processes have written; training goes
    on meanwhile.
    """

    async def finalize(self) -> None:
        if not saved.is_step(self.get_final().name):  # an item's folder
            await super().finalize()
            return
        if self._checkpoint_metadata_store:
            await asyncio.to_thread(self._checkpoint_metadata_store.wait_until_finished)
        left_out = Path(self.get_final()).parents[1] / quarantine.FILE
        if left_out.is_file():
            await asyncio.to_thread(shutil.copyfile, left_out, Path(self.get()) / quarantine.FILE)
        await asyncio.to_thread(checksums.write, Path(self.get()))
        self.get().rename(self.get_final())


class _Deleter:
    """Deletes the steps that are not kept, as Orbax's own would, but each in one moment."""

    def __init__(self, workdir: Path):
        self._workdir = workdir

    def delete(self, step: int) -> None:
        if distributed.is_main():
            saved.delete(self._workdir, step)

    def delete_steps(self, steps: Sequence[int]) -> None:
        for step in steps:
            self.delete(step)

    def close(self) -> None: ...


def open_manager(
    workdir: Path, config: Checkpoint, cleanup: bool = False, kept: Set[int] = frozenset()
) -> ocp.CheckpointManager:
    """Returns a manager that keeps the last `keep_last` steps, every multiple of `keep_every_steps`, and what is in
    `kept` when another is saved.

    `cleanup` deletes what an interrupted save left, but also what another process is saving: for the run's owner only.
    """
    keep = [policies.LatestN(config.keep_last), _These(kept)]
    if config.keep_every_steps:
        keep.append(policies.EveryNSteps(config.keep_every_steps))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keep),
        cleanup_tmp_directories=cleanup,
        temporary_path_class=_Summed,
        async_options=ocp.AsyncOptions(timeout_secs=_TIMEOUT),
        lightweight_initialize=True,  # what it would read of each step may be damaged, and is not needed
    )
    handlers = {name: ocp.StandardCheckpointHandler() for name in _ITEMS}
    manager = ocp.CheckpointManager(workdir.absolute() / saved.FOLDER, options=options, item_handlers=handlers)
    manager._checkpoint_deleter.close()
    manager._checkpoint_deleter = _Deleter(workdir)  # there is no option for it
    return manager


@contextmanager
def reading(workdir: Path, step: int) -> Iterator[None]:
    """Raises `Damaged` for what Orbax raises of a checkpoint whose files are cut off, gone or no JSON.

    One with checksums has been looked at before it is read, and an error then is another's; unless it was deleted
    meanwhile.
    """
    try:
        yield
    except Exception as error:
        if not saved.place(workdir, step).is_dir():
            raise saved.damaged(workdir, Skipped(step, "was deleted while it was read")) from error
        expected = isinstance(error, ValueError | LookupError | TypeError | AttributeError | OSError)
        # a bare Exception is how it reports what TensorStore says
        whole = isinstance(error, UserError) or checksums.are_there(saved.place(workdir, step))
        if whole or not (expected or type(error) is Exception):
            raise
        why = str(error).partition("\n")[0].partition(". See full")[0].partition(" [tensorstore_spec")[0]
        raise saved.damaged(workdir, Skipped(step, f"cannot be read: {why}")) from error


def save(manager: ocp.CheckpointManager, step: int, state: State) -> None:
    """Starts an asynchronous save; errors of an earlier one surface here."""
    if step in manager.all_steps():
        return
    manager.wait_until_finished()  # what the save before this one still has to write is not free space
    check_space(Path(manager.directory), state)
    items = {name: ocp.args.StandardSave(value) for name, value in _nonempty(state).items()}
    manager.save(step, args=ocp.args.Composite(**items), force=True)


class _OnDisk(np.memmap):
    """Orbax copies arrays of NumPy's before it writes them, in case they change; these do not."""

    def __deepcopy__(self, memo: dict) -> "_OnDisk":
        return self


def on_disk(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array in a file, which `save` reads from there: it is never whole in memory."""
    return _OnDisk(file, np.float32, "r", shape=shape)


def check_space(directory: Path, state: State, freed: int = 0) -> None:
    """Raises `UserError` where the disk has no space for a checkpoint; `freed` bytes will be deleted before."""
    check_space_for(directory, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)), freed)


def check_space_for(directory: Path, arrays: int, freed: int = 0) -> None:
    """Raises `UserError` where the disk has no space for a checkpoint of so many bytes of arrays."""
    needed = 1.1 * arrays + 2**18  # with Orbax's own files
    free = shutil.disk_usage(directory).free + freed
    if free < needed:
        raise UserError(
            f"{directory}: No space left on device: "
            f"a checkpoint takes {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
        )


def restore(manager: ocp.CheckpointManager, step: int, abstract: State, items: tuple[str, ...] = _ITEMS) -> State:
    """Returns the saved state placed as `abstract` is, whatever mesh it was saved from.

    Items that are not asked for come back as in `abstract`.
    """
    wanted = {k: v for k, v in _nonempty(abstract).items() if k in items}
    today = _renamed_in(manager, step, _last_names(wanted))
    _check_same_model(manager, step, wanted, today)
    if "step" in wanted:  # of before there were two clocks, or a guard
        there = manager.item_metadata(step)["step"]
        wanted["step"] = {name: value for name, value in wanted["step"].items() if name in there}
    as_saved = _renamed(wanted, {new: old for old, new in today.items()})
    restored = manager.restore(
        step, args=ocp.args.Composite(**{k: ocp.args.StandardRestore(v) for k, v in as_saved.items()})
    )
    restored = _renamed({k: restored[k] for k in wanted}, today)
    values = typed(restored, wanted)
    clocks = values.pop("step", {})
    if clocks and "position" not in clocks:
        clocks["position"] = jnp.copy(clocks["step"])  # an array of its own: the step donates both
    if clocks and abstract.guard:
        found = clocks.get("guard")
        clocks["guard"] = Guard(**found) if found else _fresh_guard(abstract.guard)
    return abstract._replace(**values, **clocks)


def _fresh_guard(like: Guard) -> Guard:
    placed = lambda a, like: jax.sharding.reshard(a, like.sharding.spec)
    return jax.jit(lambda: jax.tree.map(placed, guard.fresh(), like))()


def restore_whole(manager: ocp.CheckpointManager, step: int, abstract: State, items: tuple[str, ...] = _ITEMS) -> State:
    """Returns a saved state as `restore` does, once its files were compared with their checksums.

    Raises `Damaged` for one that is not whole, or whose numbers are not all finite. Process 0 looks at the files.
    """
    workdir = Path(manager.directory).parent
    if why := _agreed(lambda: saved.fault(workdir, step)):
        raise saved.damaged(workdir, Skipped(step, why))
    with reading(workdir, step):
        state = restore(manager, step, abstract, items)
    if not is_finite(state, items):
        raise saved.damaged(workdir, Skipped(step, "not finite"))
    return state


def restore_newest(
    manager: ocp.CheckpointManager, abstract: State, items: tuple[str, ...] = _ITEMS, until: int | None = None
) -> tuple[State | None, int | None, list[Skipped]]:
    """Returns (the newest saved state that is whole and finite, its step, what was passed over); None, None where there
    is none. until: the last step that is looked at.
    """
    workdir, skipped = Path(manager.directory).parent, []
    there = lambda: [step for step in _agreed(lambda: saved.entries(workdir)) if until is None or step <= until]
    while left := [step for step in there() if step not in {each.step for each in skipped}]:
        try:
            return restore_whole(manager, left[-1], abstract, items), left[-1], skipped
        except Damaged as damaged:
            if left[-1] in there():  # else a run that trains meanwhile has newer ones, and has deleted it
                skipped.append(Skipped(left[-1], damaged.why))
    return None, None, skipped


def _agreed(of: Callable[[], Any]) -> Any:
    """What process 0 finds, in all processes."""
    return distributed.exchange(of() if distributed.is_main() else None)[0]


def shapes(manager: ocp.CheckpointManager, step: int, item: str, ours: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Returns {path: shape} of an item's arrays, paths joined by `/`, in the names of today; empty without it.

    ours: the paths that a model of today has.
    """
    saved = manager.item_metadata(step).get(item)
    today = _renamed_in(manager, step, _ends(ours))
    return {} if saved is None else {_joined(names): tuple(leaf.shape) for names, leaf in _named(saved, today)}


Arrays = Mapping[str, Mapping[str, Any]]  # item -> path, as in `shapes` -> array


def restore_arrays(manager: ocp.CheckpointManager, step: int, wanted: Arrays) -> Arrays:
    """Returns some arrays of a checkpoint, placed as `wanted` has them, which holds abstract ones; others are not read.

    Their paths and shapes must be those that `shapes` names.
    """
    found, saved = {}, manager.item_metadata(step)
    today = _renamed_in(manager, step, _ends(path for arrays in wanted.values() for path in arrays))
    for item, arrays in wanted.items():
        tree = dict(saved.get(item) or {})
        chosen = [arrays.get(_joined(names), ocp.PLACEHOLDER) for names, _ in _named(tree, today)]
        target = jax.tree.unflatten(jax.tree.structure(tree, is_leaf=_is_array), chosen)
        restored = _restored(Path(manager.directory) / str(step) / item, target) if arrays else {}
        by_path = {_joined(names): leaf for names, leaf in _named(restored, today)}
        found[item] = {path: by_path[path] for path in arrays}
    return typed(found, wanted)


def typed(arrays: Arrays, wanted: Arrays) -> Arrays:
    """Returns the same arrays with types that are written as those of a step's results are. P(None, None) and P() mean
    the same but compare unequal: else the first step and the others would each be compiled. No program is compiled for
    it, and what lies where it shall is not copied.
    """

    def same(a: jax.Array, like: Any) -> jax.Array:
        if not a.sharding.is_equivalent_to(like.sharding, a.ndim):
            return jax.device_put(a, like.sharding)
        parts = [shard.data for shard in a.addressable_shards]
        return jax.make_array_from_single_device_arrays(a.shape, like.sharding, parts)

    return jax.tree.map(same, arrays, wanted)


def _restored(directory: Path, target: Any) -> Any:
    """An item's arrays; the manager's own handler knows no placeholders, and reads all."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        return reader.restore(directory, args=ocp.args.PyTreeRestore(item=target, restore_args=restore_args))


def digest(workdir: Path, step: int, items: Iterable[str]) -> str:
    """Returns the SHA-256 of the files of some items of a checkpoint, with their names."""
    total = hashlib.sha256()
    for item in sorted(items):
        folder = workdir / "checkpoints" / str(step) / item
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{item}/{path.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()


def is_finite(state: State, items: tuple[str, ...] = _ITEMS) -> bool:
    """Whether all numbers of these items are; older versions saved states in which they are not."""
    return bool(jax.jit(finite)([getattr(state, item) for item in items]))


def not_finite(workdir: Path, step: int) -> str:
    """Returns what of a checkpoint holds a number that is not finite or cannot be read, "" for nothing. An item at a
    time is in memory; no config is needed.
    """
    try:
        for name, array in _values(workdir, step):
            if not np.all(np.isfinite(array)):
                return f"{name}: not finite"
    except Damaged as damaged:
        return damaged.why
    return ""


def values_digest(workdir: Path, step: int) -> str:
    """Returns the SHA-256 of names, types, shapes and bits of a checkpoint's arrays, however its files hold them."""
    total = hashlib.sha256()
    for name, array in sorted(_values(workdir, step), key=lambda named: named[0]):
        total.update(f"{name} {array.dtype} {array.shape}\n".encode() + np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def _values(workdir: Path, step: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (item/path, array) of a checkpoint, an item at a time. Raises `Damaged` for one that cannot be read."""
    with reading(workdir, step), open_manager(workdir, Checkpoint()) as manager:
        for item, tree in manager.item_metadata(step).items():
            leaves = jax.tree.leaves(tree, is_leaf=_is_array)
            size = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)
            if size > memory.of_device():  # a few bytes may say that
                why = f"{item}: says {size / 1e9:,.3g} GB of arrays, more than there is memory"
                raise saved.damaged(workdir, Skipped(step, why))
            target = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree, is_leaf=_is_array)
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                args = ocp.args.PyTreeRestore(restore_args=target)
                arrays = reader.restore(saved.place(workdir.absolute(), step) / item, args=args)
            for names, leaf in _named(arrays, {}):
                yield f"{item}/{_joined(names)}", np.asarray(leaf)


def _nonempty(state: State) -> dict:
    """The items to save; Orbax wants trees, not a bare scalar, and no empty ones. Both clocks are one item, with what
    the guard remembers.
    """
    remembered = {"guard": state.guard._asdict()} if state.guard else {}
    items = state._asdict() | {"step": {"step": state.step, "position": state.position} | remembered}
    return {k: items[k] for k in _ITEMS if jax.tree.leaves(items[k])}


def _renamed(tree: Any, names: Mapping[str, str]) -> Any:
    """A tree of dicts and tuples in which the arrays named in `names` have the names given there."""
    if isinstance(tree, Mapping):
        return {names.get(name, name): _renamed(value, names) for name, value in tree.items()}
    if isinstance(tree, tuple):
        inner = [_renamed(value, names) for value in tree]
        return type(tree)(*inner) if hasattr(tree, "_fields") else tuple(inner)
    return tree


def _renamed_in(manager: ocp.CheckpointManager, step: int, ours: set[str]) -> dict[str, str]:
    """Of `RENAMED`, what this checkpoint has under the old name; a router of one's own may still use that name."""
    saved = _last_names(manager.item_metadata(step)["params"])
    return {old: new for old, new in RENAMED.items() if old in saved and old not in ours}


def _last_names(tree: object) -> set[str]:
    return {_name(path[-1]) for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_array)}


def _ends(paths: Iterable[str]) -> set[str]:
    return {path.rpartition("/")[2] for path in paths}


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape")


def _check_same_model(manager: ocp.CheckpointManager, step: int, wanted: dict, today: Mapping[str, str]) -> None:
    """One line for a checkpoint of another model, where Orbax would raise a page."""
    saved = manager.item_metadata(step)
    another = {
        "params": "another model",
        "router_state": "another model",
        "opt_state": "another optimizer (optim.name, optim.train, or optim.clip_norm with and without)",
    }
    for item in (item for item in another if item in wanted):
        ours = _shapes(wanted[item], {})
        theirs = _shapes(saved[item], today) if saved.get(item) is not None else {}
        for name in sorted(ours.keys() | theirs.keys()):
            (shape, dtype), (own_shape, own_dtype) = (found.get(name, ("none", None)) for found in (theirs, ours))
            what, there, here = ("dtype", dtype, own_dtype) if shape == own_shape else ("shape", shape, own_shape)
            if there != here:  # Orbax would make one dtype another in silence
                raise UserError(
                    f"{manager.directory}/{step}: checkpoint of {another[item]}: {item}{name} has {what} "
                    f"{there} there and {here} in this config"
                )


def _shapes(tree: object, today: Mapping[str, str]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and dtypes, in the names of today."""
    found = ((names, (tuple(leaf.shape), str(np.dtype(leaf.dtype)))) for names, leaf in _named(tree, today))
    return {"".join(f"[{name!r}]" for name in names): known for names, known in found}


def _named(tree: object, today: Mapping[str, str]) -> Iterator[tuple[list, Any]]:
    """The names of today that lead to each leaf, and the leaf."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_array):
        yield [today.get(_name(key), _name(key)) for key in path], leaf


def _name(key: Any) -> Any:
    """Of a part of a path; Orbax makes dicts of named tuples."""
    return getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))


def _joined(names: list) -> str:
    return "/".join(map(str, names))
