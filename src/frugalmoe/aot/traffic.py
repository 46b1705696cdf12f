"""Kernels of a compiled program: how often each runs, the FLOPs of its products, the bytes it reads and writes.

All is read from the optimized text that XLA prints, whose shapes and loops are known. Every kernel is taken to read
each operand and to write each result once, which is the least: caches may hold less. A fusion reads of an operand what
it takes out of it, a slice or gathered rows; an update in place moves what it updates. Bytes are those of the main
memory with the padding of TPU tiles; what TPU programs keep in vector memory, S(1), is free once it is there. FLOPs are
2 for each multiplication and addition of a matrix product; elementwise work is left out.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from frugalmoe.aot import hlo
from frugalmoe.aot.hlo import Computation, Instruction

SCOPES = (  # of `jax.named_scope`, in the source; the innermost that is in an operation's name counts
    "attention",
    "feed_forward",
    "router",
    "dispatch",
    "experts",
    "combine",
    "embedding",
    "head",
    "optimizer",
)
_SCOPE = re.compile(rf"\b({'|'.join(SCOPES)})\b")
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "domain"),
    *("partition-id", "replica-id", "copy-done", "slice-done", "call-done", "async-done", "async-update", "send-done"),
    *("all-gather-done", "all-reduce-done", "collective-permute-done", "recv-done", "reduce-scatter-done"),
}
_ASYNC = {"copy-start", "slice-start", "dynamic-slice-start"}  # by a copy engine while kernels run
_MARKS = re.compile(r'custom_call_target="(?:AssumeGather|GatherScatter|PrepareAsync|ConcatBitcast|Sharding|Alloc)')
_MOVES = {
    *("copy", "transpose", "reshape", "bitcast", "broadcast", "slice", "dynamic-slice", "dynamic-update-slice", "pad"),
    *("concatenate", "convert", "constant", "parameter", "tuple", "get-tuple-element", "iota", "reverse"),
    *("select", "compare", "and", "or", "add", "subtract", "multiply", "clamp", "fusion", "copy-start", "slice-start"),
}
_HANDS_ON = ("copy-done", "slice-done", "bitcast", "copy", "custom-call")
_FILLS = {"constant", "broadcast", "tuple", "parameter", "bitcast"}
_ARITHMETIC = {"select", "compare", "and", "or", "add", "subtract", "multiply", "clamp"}  # of integers only: of indices
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](?:\{([\d,]*)((?::[^}]*)?)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_INDICES = re.compile(r"(lhs|rhs)_(contracting|batch)_dims=\{([\d,]*)\}")


class Array(NamedTuple):
    """An array of a program's text."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int  # of main memory, with padding
    near: bool  # in a memory that is not the main one

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch, or a copy that runs beside kernels, and all times that it happens in an execution."""

    name: str
    source: str  # of the operations of the program: names of functions and scopes
    scope: str  # a name in `SCOPES`; empty: none
    kind: str  # compute | cast | move | fill | collective
    launches: int  # 0 for what a copy engine does beside kernels
    flops: int
    read: int
    written: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


def arrays(types: str) -> list[Array]:
    """Returns the arrays of a type such as `(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, s32[])`."""
    found = []
    for name, width, dims, order, layout in _ARRAY.findall(types):
        shape = tuple(map(int, filter(None, dims.split(","))))
        padded = list(shape)
        if (tile := _TILE.search(layout)) and order:
            axes = list(map(int, order.split(",")))  # the minor one first
            for axis, multiple in zip(axes, reversed(list(map(int, tile[1].split(","))))):
                if len(shape) > 1 or padded[axis] >= multiple:
                    padded[axis] = -(-padded[axis] // multiple) * multiple
        space = _SPACE.search(layout)
        bits = (8 if name == "pred" else int(width)) * math.prod(padded)
        found.append(Array(name, shape, bits // 8, bool(space) and space[1] != "0"))
    return found


def kernels(text: str) -> list[Kernel]:
    """Returns every kernel of a program, those of loops with the numbers of all rounds.

    Raises ValueError where the text does not say how often a loop runs.
    """
    computations, entry = hlo.parse(text)
    return list(_Reader(computations).of(entry, 1))


class _Reader:
    def __init__(self, computations: dict[str, Computation]):
        self.computations = computations

    def of(self, name: str, times: int) -> Iterator[Kernel]:
        """The kernels of a computation that runs so many times; each branch of a conditional as if it were taken."""
        computation = self.computations[name]
        for i in computation.instructions.values():
            if i.opcode == "while":
                body = re.search(r"\bbody=%?([\w.-]+)", i.text)[1]
                inside = list(self.of(body, 1))
                trips = times * hlo.rounds(i, computation, self.computations) if inside else 0
                yield from (_repeated(kernel, trips) for kernel in inside)
            elif i.opcode in ("call", "conditional", "call-start", "async-start"):
                for other in i.called:
                    yield from self.of(other, times)
            elif i.opcode not in _FREE and not (i.opcode == "custom-call" and _MARKS.search(i.text)):
                yield _repeated(self.kernel(computation, i), times)

    def kernel(self, computation: Computation, i: Instruction) -> Kernel:
        read, written = self.bytes(computation, i)
        inner = list(self.inside(i))
        source = self.source(computation, i, inner)
        scopes = _SCOPE.findall(source)
        kind = "collective" if hlo.kind_of(i, computation) else _kind(i, inner)
        flops = sum(_flops(j, where) for where, j in [(computation, i), *inner])
        return Kernel(i.name, source, scopes[-1] if scopes else "", kind, i.opcode not in _ASYNC, flops, read, written)

    def inside(self, i: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """What is fused in an instruction, at any depth."""
        for name in i.called if i.opcode == "fusion" else ():
            where = self.computations[name]
            for j in where.instructions.values():
                yield where, j
                yield from self.inside(j)

    def source(self, computation: Computation, i: Instruction, inner: list) -> str:
        """The operation's name; of a fusion whose name is in no scope, that of its product or of the last operation of
        the scope that most are in; of a copy, that of what it is for, or of.
        """
        if _SCOPE.search(i.source) or "dynamic_update_slice" in i.source:
            return i.source
        if products := [j.source for _, j in inner if j.opcode in ("dot", "convolution") and j.source]:
            return products[-1]
        if named := [(_SCOPE.findall(j.source)[-1], j.source) for _, j in inner if _SCOPE.search(j.source)]:
            (most, _), *_ = collections.Counter(scope for scope, _ in named).most_common(1)
            return [source for scope, source in named if scope == most][-1]
        if "/" in i.source:
            return i.source
        for user in self.users(computation, i.name, through=_HANDS_ON):
            if found := user.source:
                return found
        made = [computation.instructions[name] for name in i.operands if name in computation.instructions]
        return next((found for j in made if (found := j.source)), "")

    def users(self, computation: Computation, name: str, through: tuple[str, ...] = ()) -> Iterator[Instruction]:
        """The instructions that use a value, also behind those that only hand it on."""
        for j in computation.users.get(name, ()):
            yield j
            if j.opcode in through:
                yield from self.users(computation, j.name, through)

    def bytes(self, computation: Computation, i: Instruction) -> tuple[int, int]:
        """(read, written) of one execution."""
        far = lambda types: sum(a.bytes for a in arrays(types) if not a.near)
        operands = [computation.instructions[name].type for name in i.operands if name in computation.instructions]
        if i.opcode == "fusion":
            return self.fused(computation, i)
        if i.opcode in _ASYNC:  # copies say (destination, source, ...), slices (source, destination, ...)
            source, destination = arrays(i.type)[1::-1] if i.opcode == "copy-start" else arrays(i.type)[:2]
            moved = min(source.bytes, destination.bytes)
            return (0 if source.near else moved), (0 if destination.near else moved)
        if i.opcode in ("slice", "dynamic-slice", "gather"):
            share = far(i.type) if operands and far(operands[0]) else 0
            return share + sum(map(far, operands[1:])), far(i.type)
        if i.opcode == "dynamic-update-slice":
            return far(operands[1]), far(operands[1]) if far(i.type) else 0
        if i.opcode == "scatter":
            updates = far(operands[-1])
            return sum(map(far, operands[1:])) + updates, updates
        if i.opcode == "custom-call" and "output_to_operand_aliasing" in i.text:
            kept = {int(n) for n in re.findall(r"\{[\d,]*\}: \((\d+),", i.text)}
            operands = [of for n, of in enumerate(operands) if n not in kept]
        if i.opcode.endswith("-start"):  # a collective: (operands, results)
            return sum(map(far, operands)), sum(map(far, operands))
        return sum(map(far, operands)), far(i.type)

    def fused(self, computation: Computation, i: Instruction) -> tuple[int, int]:
        (name,) = i.called[:1]
        body = self.computations[name]
        read = 0
        for parameter in body.instructions.values():
            if parameter.opcode == "parameter":
                number = int(re.search(r" parameter\((\d+)\)", parameter.text)[1])
                operand = computation.instructions.get(i.operands[number]) if number < len(i.operands) else None
                of = arrays(operand.type if operand else parameter.type)
                if of and not of[0].near:
                    read += sum(a.bytes for a in of) if len(of) > 1 else self.taken(body, parameter.name, of[0])
        return read, sum(self.written(body, body.root, arrays(i.type)))

    def taken(self, body: Computation, name: str, whole: Array) -> int:
        """Bytes that a fusion reads of an operand."""
        total = 0
        for j in body.users.get(name, ()):
            place = j.operands.index(name)
            if j.opcode in ("slice", "dynamic-slice", "gather") and place == 0:
                total += sum(a.bytes for a in arrays(j.type))
            elif j.opcode in ("dynamic-update-slice", "scatter") and place == 0:
                total += 0 if j.opcode == "dynamic-update-slice" else _updates(body, j)
            elif j.opcode in ("bitcast", "reshape", "get-tuple-element", "convert", "copy", "transpose"):
                of = sum(a.bytes for a in arrays(j.type)) or 1  # of another type, perhaps
                total += self.taken(body, j.name, arrays(j.type)[0]) * whole.bytes // of
            elif j.opcode == "fusion":
                inner = self.computations[j.called[0]]
                for parameter in inner.instructions.values():
                    if parameter.opcode == "parameter" and f" parameter({place})" in parameter.text:
                        total += self.taken(inner, parameter.name, whole)
            else:
                return whole.bytes
        return min(total, whole.bytes)

    def written(self, body: Computation, name: str, results: list[Array]) -> Iterator[int]:
        """Bytes that a fusion writes of each result: of an update in place, those of the update."""
        j = body.instructions[name]
        while j.opcode == "bitcast":
            j = body.instructions[j.operands[0]]
        if j.opcode == "tuple" and len(j.operands) == len(results):
            for operand, result in zip(j.operands, results):
                yield from self.written(body, operand, [result])
        elif j.opcode == "fusion" and len(results) == 1:
            inner = self.computations[j.called[0]]
            yield from self.written(inner, inner.root, results)
        elif j.opcode in ("dynamic-update-slice", "scatter") and len(results) == 1:
            yield 0 if results[0].near else min(_updates(body, j), results[0].bytes)
        else:
            yield sum(a.bytes for a in results if not a.near)


def _updates(body: Computation, j: Instruction) -> int:
    place = 1 if j.opcode == "dynamic-update-slice" else -1
    return sum(a.bytes for a in arrays(body.instructions[j.operands[place]].type))


def _repeated(kernel: Kernel, times: int) -> Kernel:
    numbers = {n: times * getattr(kernel, n) for n in ("launches", "flops", "read", "written")}
    return dataclasses.replace(kernel, **numbers)


def _kind(i: Instruction, inner: list[tuple[Computation, Instruction]]) -> str:
    """compute | cast | move | fill: what a kernel does at most."""
    parts = [j for _, j in inner] or [i]
    integers = lambda j: all(a.dtype[0] in "sup" for a in arrays(j.type))
    if any(j.opcode not in _MOVES or (j.opcode in _ARITHMETIC and not integers(j)) for j in parts):
        return "compute"
    floats = [j for j in parts if not integers(j)]
    if not floats:
        return "compute" if len(parts) > 1 else "move"  # of indices
    if any(j.opcode == "convert" for j in floats):
        return "cast"
    return "fill" if all(j.opcode in _FILLS for j in floats) and not _large(parts) else "move"


def _large(parts: list[Instruction]) -> bool:
    return any(a.size > 1 for j in parts if j.opcode == "parameter" for a in arrays(j.type))


def _flops(i: Instruction, where: Computation) -> int:
    """Of one execution of a product or of a kernel that is known; 0 for all else."""
    if i.opcode not in ("dot", "convolution", "custom-call"):
        return 0
    of = [arrays(where.instructions[name].type) for name in i.operands if name in where.instructions]
    operands, results = [a[0] for a in of if a], arrays(i.type)
    if i.opcode == "dot":
        dims = {(side, role): indices for side, role, indices in _INDICES.findall(i.text)}
        contracted = [int(n) for n in filter(None, dims.get(("lhs", "contracting"), "").split(","))]
        return 2 * results[0].size * math.prod(operands[0].shape[n] for n in contracted)
    if i.opcode == "convolution":
        return _convolution(i.text, operands, results[0])
    return _of_custom_call(i, [a for a in operands if a.dtype[0] in "bf"], results)


def _convolution(text: str, operands: list[Array], result: Array) -> int:
    """2 for each pair of an element of the input and one of the kernel that meet: TPU programs write products so."""
    lhs, rhs, out = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", text).groups()
    window = re.search(r"window=\{([^}]*)\}", text)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    axes = sorted(label for label in lhs if label.isdigit())
    each = lambda name, default: fields[name].split("x") if name in fields else [default] * len(axes)
    pairs = 1
    for n, label in enumerate(axes):
        low, _ = map(int, each("pad", "0_0")[n].split("_"))
        stride, spread, dilation = (int(each(name, "1")[n]) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        size, taps = operands[0].shape[lhs.index(label)], operands[1].shape[rhs.index(label)]
        at = (o * stride + k * dilation - low for o in range(result.shape[out.index(label)]) for k in range(taps))
        pairs *= sum(p >= 0 and p % spread == 0 and p // spread < size for p in at)
    batch = result.shape[out.index("b")]
    return 2 * batch * pairs * operands[1].shape[rhs.index("i")] * operands[1].shape[rhs.index("o")]


_ATTENTION = {  # kernels: the axis of time of the queries, products of queries by keys
    "fmhaScaleBiasSoftmaxBackward": (1, 5),
    "fmhaScaleBiasSoftmax": (1, 2),
    "splash_mha_dkv": (2, 4),
    "splash_mha_dq": (2, 3),
    "splash_mha_fwd": (2, 2),
}


def _of_custom_call(i: Instruction, floats: list[Array], results: list[Array]) -> int:
    """Of kernels that programs of this package call. Attention is causal: a half of its products is skipped."""
    target = re.search(r'custom_call_target="([^"]*)"', i.text)[1]
    matrices = [a for a in floats if len(a.shape) > 1]
    if len(matrices) < 2:
        return 0
    (a, b), out = matrices[:2], results[0]
    if "gemm" in target:  # sizes of the operands over that of the result: the contracted axis, squared
        batch = math.prod(out.shape[:-2])
        return 2 * out.size * math.isqrt(a.size * b.size // out.size // batch)
    if target == "triton_kernel_call" or (target == "tpu_custom_call" and "gmm" in i.name):
        if len(out.shape) == 3:  # rows by rows
            return 2 * b.shape[0] * out.shape[1] * out.shape[2]
        return 2 * out.size * (b.size // b.shape[0] // out.shape[1])
    for name, (time, products) in _ATTENTION.items():
        if name in target or name in i.name:
            return products * a.size * a.shape[time]
    return 0
