"""Silent errors of the hardware: replicas that no longer hold the same numbers, and steps that do not repeat.

What is replicated over devices must be equal on them to the bit, for they all made it of equal numbers by one program.
Each device adds up a hash of what it holds, inside one small program, and the sums alone are compared: nothing of the
state moves. A device whose sum is another than that of most is named. What went wrong before gradients were added up
is in all replicas alike: there only a replay helps, which makes a step once more from the same state and batch.

See `guard.replicas_every` and `guard.replay_every`; docs/guard.md has what was measured.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from frugalmoe.errors import HardwareError
from frugalmoe.schema import Guard
from frugalmoe.train.objective import StepReport
from frugalmoe.train.step import State

ITEMS = ("params", "router_state", "opt_state")
Tell = Callable[[str, str, int], None]  # of an event: kind, what, step
_MULTIPLIERS = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35  # odd: the golden ratio, and those of MurmurHash3's last step


class Group(NamedTuple):
    """Arrays of an item that are spread over the same axes of the mesh, and replicated over the others."""

    item: str
    axes: tuple[str, ...]

    def copies(self, mesh: Mesh) -> int:
        return math.prod(size for axis, size in mesh.shape.items() if axis not in self.axes)


def groups(state: State, mesh: Mesh) -> dict[Group, list[Array]]:
    """Returns the arrays of a state, by what they are replicated over."""
    found: dict[Group, list[Array]] = {}
    for item in ITEMS:
        for leaf in jax.tree.leaves(getattr(state, item)):
            named = {axis for part in leaf.sharding.spec for axis in _names(part)}
            found.setdefault(Group(item, tuple(a for a in mesh.axis_names if a in named)), []).append(leaf)
    return found


def _names(part: Any) -> Sequence[str]:
    return part if isinstance(part, tuple) else () if part is None else (part,)


def sums(state: State, mesh: Mesh) -> Array:
    """Returns the sums of all devices, uint32 [devices, groups], on each of them; it does not wait."""
    found = groups(state, mesh)
    arrays = [leaf for leaves in found.values() for leaf in leaves]
    specs = tuple(leaf.sharding.spec for leaf in arrays)
    return _program(mesh, specs, tuple(map(len, found.values())))(*arrays)


@functools.lru_cache(8)
def _program(mesh: Mesh, specs: tuple[P, ...], sizes: tuple[int, ...]) -> Callable[..., Array]:
    def on_device(*arrays: Array) -> Array:
        left, own = iter(arrays), []
        for size in sizes:
            own.append(sum(jnp.uint32(2 * i + 1) * digest(next(left)) for i in range(size)))
        return jax.lax.all_gather(jnp.stack(own), mesh.axis_names)

    # What is replicated counts as equal for JAX; here each device must look at what it holds itself.
    return jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False))


def digest(array: Array) -> Array:
    """Returns a hash of an array's bits and their order, uint32 []. One number that changes always changes it."""
    golden, *rounds = map(jnp.uint32, _MULTIPLIERS)
    bits = _bits(array.reshape(-1))
    mixed = bits ^ (jax.lax.iota(jnp.uint32, bits.size) * golden)
    for multiplier, shift in zip(rounds, (16, 13)):  # one-to-one, so that equal changes of two numbers do not cancel
        mixed = (mixed ^ (mixed >> shift)) * multiplier
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _bits(flat: Array) -> Array:
    """The bits of numbers of at most 32 bits, each in a uint32."""
    if flat.dtype == jnp.bool_:
        return flat.astype(jnp.uint32)
    unsigned = jnp.dtype(f"uint{8 * flat.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(flat, unsigned).astype(jnp.uint32)


class Odd(NamedTuple):
    """Places in the mesh whose sum is not that of most replicas; or of all that differ, where there is no most."""

    places: tuple[int, ...]
    are_fewest: bool


def odd_ones(values: np.ndarray, mesh: Mesh, found: Sequence[Group]) -> dict[str, Odd]:
    """Returns the odd ones of each item that has any. values: [devices, groups], as `sums` gives them."""
    odd: dict[str, Odd] = {}
    numbers = np.arange(values.shape[0]).reshape(mesh.devices.shape)
    for column, group in zip(values.T, found):
        kept = [i for i, axis in enumerate(mesh.axis_names) if axis in group.axes]
        order = [*kept, *(i for i in range(numbers.ndim) if i not in kept)]
        for alike in numbers.transpose(order).reshape(-1, group.copies(mesh)):
            distinct, counts = np.unique(column[alike], return_counts=True)
            if len(distinct) == 1:
                continue
            most = distinct[counts.argmax()] if 2 * counts.max() > len(alike) else None
            places = {int(i) for i in alike if column[i] != most}
            before = odd.get(group.item, Odd((), True))
            odd[group.item] = Odd(tuple(sorted(places.union(before.places))), before.are_fewest and most is not None)
    return odd


def _named(places: Sequence[int], mesh: Mesh) -> str:
    devices = [mesh.devices.flat[i] for i in places]
    return ", ".join(f"process {device.process_index} device {device.id}" for device in devices)


def check(state: State, mesh: Mesh, step: int, tell: Tell) -> None:
    """Raises `HardwareError` where replicas of a state differ, naming process and device. It waits for the state."""
    found = list(groups(state, mesh)) if mesh.size > 1 else []
    if any(group.copies(mesh) > 1 for group in found):
        with _telling(tell, step):
            _compare(np.asarray(sums(state, mesh)), mesh, found, step)


@contextmanager
def _telling(tell: Tell, step: int) -> Iterator[None]:
    try:
        yield
    except HardwareError as error:
        tell("hardware", str(error), step)
        raise


def _compare(values: np.ndarray, mesh: Mesh, found: Sequence[Group], step: int) -> None:
    for item, odd in odd_ones(values, mesh, found).items():
        rule = "unlike most" if odd.are_fewest else "as many against as many, so either may be wrong"
        where = f"{_named(odd.places, mesh)} ({rule})"
        raise HardwareError(f"replicas of {item} differ after step {step}: {where}; {_WHAT_TO_DO}")


_WHAT_TO_DO = "nothing of it is saved; the same command goes on from the last checkpoint"


def compare_tries(
    step: int, numbers: Mapping[str, tuple[np.ndarray, np.ndarray]], first: np.ndarray, again: np.ndarray, mesh: Mesh
) -> None:
    """Raises `HardwareError` unless two tries of a step gave the same numbers, and the same sums, to the bit."""
    differing = [f"{name} {a} and {b}" for name, (a, b) in numbers.items() if a.tobytes() != b.tobytes()]
    places = np.flatnonzero((first != again).any(axis=1)).tolist()
    if not (differing or places):
        return
    everywhere = "on all devices, so before gradients were added up: which of them, cannot be told"
    all_alike = len(places) in (0, mesh.size) and mesh.size > 1
    where = everywhere if all_alike else _named(places or [0], mesh)
    what = ", ".join(differing) or "the states after it"
    raise HardwareError(f"step {step}, made twice, gave other results ({what}): {where}; {_WHAT_TO_DO}")


class _Look(NamedTuple):
    """What a device is computing, to be read one step late."""

    step: int
    sums: Array
    again: Array | None  # of the same step, made once more
    numbers: Mapping[str, tuple[Array, Array]]  # of the two


class Watch:
    """Looks at the state of a program every so many steps. What it finds is read one step late, as all is.

    tell: is told what was found, before `HardwareError` is raised.
    """

    def __init__(self, section: Guard, mesh: Mesh, tell: Tell):
        self._replicas_every = section.replicas_every if mesh.size > 1 else 0
        self._replay_every = section.replay_every
        self._mesh, self._tell = mesh, tell
        self._look: _Look | None = None
        self._groups: list[Group] = []

    def before(self, step: int, state: State) -> State | None:
        """Returns a copy of the state before step `step`, if that is to be made twice."""
        due = self._replay_every and step % self._replay_every == 0
        return jax.tree.map(jnp.copy, state) if due else None

    def after(self, step: int, made: tuple[State, StepReport], again: tuple[State, StepReport] | None) -> None:
        """Begins to look at what a step made, if it is time; again: what it made of the copy of the state before it."""
        if again is None and not (self._replicas_every and step % self._replicas_every == 0):
            return
        state, report = made
        self._groups = list(groups(state, self._mesh))
        look = _Look(step, sums(state, self._mesh), None, {})
        if again is not None:
            names = ("loss/total", "optim/gradient_norm")
            numbers = {name: (report.metrics[name], again[1].metrics[name]) for name in names}
            look = look._replace(again=sums(again[0], self._mesh), numbers=numbers)
        self._look = look

    def read(self) -> None:
        """Raises `HardwareError` for what the look before found."""
        if self._look is None:
            return
        look, self._look = self._look, None
        with _telling(self._tell, look.step):
            values = np.asarray(look.sums)
            _compare(values, self._mesh, self._groups, look.step)
            if look.again is not None:
                numbers = jax.device_get(look.numbers)
                compare_tries(look.step, numbers, values, np.asarray(look.again), self._mesh)
