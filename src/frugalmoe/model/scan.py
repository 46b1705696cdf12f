"""Blocks one after the other, in scans: compile time does not grow with depth.

A segment is one scan over its repeats. The unit that is repeated is unrolled inside it, but for runs of equal blocks,
which are a scan again.

Letters: L layers, G groups of layers (repeats of a unit), g members of one group (blocks of a unit).
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from frugalmoe import experts, sharding
from frugalmoe.model import pattern
from frugalmoe.model.block import Layer, Parts, Place, Stream, apply_layer
from frugalmoe.model.moe import Context, Through


class Run(NamedTuple):
    """Equal blocks, one after the other, in a unit."""

    kind: pattern.BlockKind
    count: int


def runs(segment: pattern.Segment) -> list[Run]:
    """The unit of a segment in runs, in order."""
    return [Run(kind, len(list(equal))) for kind, equal in itertools.groupby(segment.unit)]


class Layers(NamedTuple):
    """What the scan gives to blocks: parameters and numbers of layers."""

    parts: Parts  # its attention by name, as the pattern has it
    wrapper: Mapping[str, Any]  # what decides who passes, by name
    layer: Array


@dataclasses.dataclass
class Segment:
    """The blocks of a segment of `model`, and what all of them see."""

    model: Any
    segment: pattern.Segment
    context: Context
    prepared: Mapping[str, Any]

    def __call__(self, stream: Stream) -> tuple[Stream, tuple]:
        """-> (stream, (routed, reports)), each with a leading axis over layers, or None."""
        of_runs, (stream, whole) = runs(self.segment), self._in_stack(stream)
        stacks = {name: self._stacks(name) for name in self.segment.feed_forwards}
        if whole is not None:
            stacks["moe"] = stacks["moe"]._replace(parts=_without_experts(stacks["moe"].parts))
            self.context = self.context._replace(stack=whole)
        if self.context.train and not self.context.accumulates:
            stacks = {name: layers._replace(parts=sharding.alone(layers.parts)) for name, layers in stacks.items()}
        if len(of_runs) == 1:
            kind = of_runs[0].kind
            return jax.lax.scan(self._body(kind), stream, stacks[kind.feed_forward])

        def unit(stream: Stream, stacks: Mapping[str, Layers]) -> tuple[Stream, tuple]:
            found = []
            for run, layers in zip(of_runs, _split(stacks, of_runs)):
                stream, out = self._run(run, stream, layers)
                found.append(out)
            routed, reports = zip(*found)
            return stream, (joined(routed), joined(reports))

        stacks = jax.tree.map(
            lambda a: _reshape(a, (self.segment.repeats, a.shape[0] // self.segment.repeats), 1), stacks
        )
        stream, found = jax.lax.scan(unit, stream, stacks)
        return stream, jax.tree.map(lambda a: _reshape(a, (a.shape[0] * a.shape[1],), 2), found)

    def _in_stack(self, stream: Stream) -> tuple[Stream, tuple[Array, Array] | None]:
        """The stream, and the weights of the experts of all layers where `experts.Stack` is how layers have them."""
        config, context, name = self.model.config, self.context, pattern.NAMES["moe", ""]
        one_step = context.train and not context.accumulates and not context.together
        wrapped = any(kind.wrapper for kind in pattern.layers(config))
        able = one_step and not wrapped and config.remat == "none" and experts.takes_stacks(config.moe)
        if not able or "moe" not in self.segment.feed_forwards:
            return stream, None
        layer = getattr(self.model, name).parts.feed_forward
        sums = tuple(jax.sharding.reshard(w[...], sharding.EXPERTS_ALONE) for w in (layer.gate_up_ED2F, layer.down_EFD))
        carry = stream.carry if isinstance(stream.carry, Through) else Through(stream.carry, sums)
        return stream._replace(carry=carry), jax.lax.stop_gradient(sums)

    def _run(self, run: Run, stream: Stream, layers: Layers) -> tuple[Stream, tuple]:
        """The same of the blocks of a run."""
        body = self._body(run.kind)
        if run.count > 1:
            return jax.lax.scan(body, stream, layers)
        stream, found = body(stream, jax.tree.map(lambda a: a[0], layers))
        return stream, jax.tree.map(lambda a: a[None], found)

    def _body(self, kind: pattern.BlockKind) -> Callable[[Stream, Layers], tuple[Stream, tuple]]:
        """One block, as a scan wants it."""
        dtype = self.model.config.compute_dtype

        def body(stream: Stream, layers: Layers) -> tuple[Stream, tuple]:
            wrapper, parts = sharding.gather(layers.wrapper, dtype), sharding.gather(layers.parts, dtype)
            parts = parts._replace(attention=parts.attention[kind.attention])
            rest = (stream, self.context, self.prepared, Place(layers.layer))
            passed = apply_layer(Layer(parts, wrapper.get(kind.wrapper)), kind, *rest)
            return passed.stream, (passed.routed, passed.report)

        return remat(body, self.model.config.remat)

    def _stacks(self, feed_forward: str) -> Layers:
        """The segment's part of the model's stacks of one feed-forward, and the numbers of its layers among all of it.

        Attention of several kinds is a stack for each, under its name.
        """
        segment, names, kind_of = self.segment, pattern.NAMES, pattern.layers(self.model.config)
        same = [i for i, kind in enumerate(kind_of) if kind.feed_forward == feed_forward]
        own = [kind_of[i] for i in same if segment.first <= i < segment.end]

        def part(stack: Any, belongs: Callable[[pattern.BlockKind], bool]) -> Any:
            """Of a stack of all layers that belong, those of the segment."""
            before, count = (sum(map(belongs, of)) for of in ([kind_of[i] for i in same if i < segment.first], own))
            whole = lambda a: count == a.shape[0]
            return jax.tree.map(lambda a: a if whole(a) else a[before : before + count], stack)

        parts = getattr(self.model, names[feed_forward, ""]).parts
        attention = parts.attention
        if len({kind_of[i].attention for i in same}) > 1:
            attention = {
                name: part(attention[pattern.short(name)], lambda kind, name=name: kind.attention == name)
                for name in dict.fromkeys(kind.attention for kind in own)
            }
        else:
            attention = {own[0].attention: part(attention, lambda kind: True)}
        parts = part(parts._replace(attention=None), lambda kind: True)._replace(attention=attention)
        wrappers = {
            name: part(getattr(self.model, names[feed_forward, name]), lambda kind: bool(kind.wrapper))
            for name in dict.fromkeys(kind.wrapper for kind in own if kind.wrapper)
        }
        first = sum(i < segment.first for i in same)
        return Layers(parts, wrappers, jnp.arange(first, first + len(own), dtype=jnp.int32))


def _without_experts(parts: Parts) -> Parts:
    """Parts of layers with experts whose weights are of no experts."""
    layer = parts.feed_forward
    for name in ("gate_up_ED2F", "down_EFD"):
        weights = getattr(layer, name)
        setattr(layer, name, weights.replace(jax.lax.stop_gradient(weights[:, :0])))
    return parts


def _split(stacks: Mapping[str, Layers], of_runs: Sequence[Run]) -> list[Layers]:
    """What each run of a unit has of the unit's stacks, by feed-forward."""
    own = lambda name: [run for run in of_runs if run.kind.feed_forward == name]
    pieces = {name: iter(_of_one(layers, own(name))) for name, layers in stacks.items()}
    return [next(pieces[run.kind.feed_forward]) for run in of_runs]


def _of_one(stacks: Layers, of_runs: Sequence[Run]) -> list[Layers]:
    """The same of one feed-forward."""
    belongs = lambda attribute, name: [run for run in of_runs if getattr(run.kind, attribute) == name]
    attention = {n: iter(_pieces(stack, belongs("attention", n))) for n, stack in stacks.parts.attention.items()}
    wrapper = {n: iter(_pieces(stack, belongs("wrapper", n))) for n, stack in stacks.wrapper.items()}
    rest = _pieces((stacks.parts._replace(attention=None), stacks.layer), of_runs)
    found = []
    for run, (parts, layer) in zip(of_runs, rest):
        own = {run.kind.attention: next(attention[run.kind.attention])}
        wrapped = {run.kind.wrapper: next(wrapper[run.kind.wrapper])} if run.kind.wrapper else {}
        found.append(Layers(parts._replace(attention=own), wrapped, layer))
    return found


def _pieces(tree: Any, of_runs: Sequence[Run]) -> list[Any]:
    """A stack in the order of some runs, cut into them."""
    leaves, structure = jax.tree.flatten(tree)
    sizes = [run.count for run in of_runs]
    return [jax.tree.unflatten(structure, pieces) for pieces in zip(*(jax.lax.split(a, sizes) for a in leaves))]


def joined(trees: Sequence[Any]) -> Any:
    """Stacks as one, in their order; those that are None are left out."""
    trees = [tree for tree in trees if tree is not None]
    if len(trees) < 2:
        return trees[0] if trees else None
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def _reshape(a: Array, leading: tuple[int, ...], replaced: int) -> Array:
    """Other leading axes, none of them sharded. JAX would lose the sharding of an axis of size 1: it has to be told."""
    spec = P(*[None] * len(leading), *jax.typeof(a).sharding.spec[replaced:])
    return jnp.reshape(a, (*leading, *a.shape[replaced:]), out_sharding=spec)


def remat(body: Callable, policy: str) -> Callable:
    """`dots` keeps matrix products without a batch dimension; `full` keeps a layer's input and its routing plan.

    None keeps parameters that were gathered from other devices.
    """
    if policy == "none" and not sharding.gathers():
        return body
    keep = {
        "none": jax.checkpoint_policies.save_anything_except_these_names(sharding.GATHERED),
        "dots": jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names("routing_plan"),
        ),
        "full": jax.checkpoint_policies.save_only_these_names("routing_plan"),
    }[policy]
    return jax.checkpoint(body, policy=keep, prevent_cse=False)
