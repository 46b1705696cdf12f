"""Collectives and large arrays of a compiled program, from the text that XLA prints for it.

A body of a loop is printed once and counted as often as it runs. TPU programs print one collective in several
computations, those that start it, advance it and end it; they have a `chain_id` in common. A reduce-scatter of theirs
is printed as a computation of that name, with an all-reduce in it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
    "send",  # of TPU programs: what goes to other slices
)
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\(.*)?\{$")
_END = re.compile(r'^\}(, execution_thread="\w+")?$')
_CALL = re.compile(r" ([a-z][a-z0-9-]*)\(([^()]*)\)")  # opcode, operands
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHAIN = re.compile(r'chain_id="(\d+)"')
_GROUPS_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_GROUPS_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_GROUPS_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\].*?\{((?:'[^}]*)?)\}")
_AXIS_SIZE = re.compile(r"('[^']+')=(\d+)")
_PART_OF_AXIS = re.compile(r"('[^']+')(?::\(\d+\)(\d+))?")
_SOURCE = re.compile(r'op_name="([^"]*)"')
_MADE_ELSEWHERE = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call")


class Collective(NamedTuple):
    """All collectives of one kind in one execution of a program, seen from one device."""

    kind: str
    count: int
    bytes: int  # that a device sends at least; of `ragged-all-to-all`, if all devices get equally many


class Value(NamedTuple):
    """An array that exists while a program runs."""

    type: str
    bytes: int
    source: str  # the operation that made it, under the names of the functions around it


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a program."""

    name: str
    opcode: str
    operands: list[str]
    text: str  # behind the name

    @functools.cached_property
    def type(self) -> str:
        return self.text[: _CALL.search(self.text).start()]

    @property
    def source(self) -> str:
        """The operation that it comes from, under the names of the functions and scopes around it; may be empty."""
        found = _SOURCE.search(self.text)
        return found[1] if found else ""

    @property
    def called(self) -> list[str]:
        """The computations that it calls; of a conditional, its branches. A loop's are not among them."""
        called = _CALLED.findall(self.text)
        if branches := _BRANCHES.search(self.text):
            called += re.findall(r"[\w.-]+", branches[1].replace("%", ""))
        return called


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of a program."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """What uses each value."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                found.setdefault(name, []).append(instruction)
        return found


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of a program in the order of `KINDS`. Raises ValueError where the text does not say how
    often a loop runs.
    """
    computations, entry = parse(text)
    count, sent = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    seen: set[tuple[str, str]] = set()
    for times, computation, instruction in _executed(computations, entry):
        if not (kind := kind_of(instruction, computation)):
            continue
        if chain := _CHAIN.search(instruction.text):
            if (kind, chain[1]) in seen:
                continue
            seen.add((kind, chain[1]))
        count[kind] += times
        sent[kind] += times * _sent(kind, instruction, computation)
    return [Collective(kind, count[kind], sent[kind]) for kind in KINDS if count[kind]]


def largest(text: str, count: int = 6) -> list[Value]:
    """The largest arrays that a program makes, one of each type, with where in the source they come from."""
    computations, _ = parse(text)
    instructions = [i for computation in computations.values() for i in computation.instructions.values()]
    fused = {name for i in instructions if i.opcode == "fusion" for name in i.called}
    found: dict[str, Value] = {}
    for name, computation in computations.items():
        for i in computation.instructions.values() if name not in fused else ():
            for match in _ARRAY.finditer(i.type) if i.opcode not in _MADE_ELSEWHERE else ():
                found.setdefault(match[0], Value(match[0], _bytes(match[0]), i.source or i.name))
    return sorted(found.values(), key=lambda value: -value.bytes)[:count]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    computations, entry, name = {}, "", ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[2]
            entry = name if match[1] else entry
            instructions, root = {}, ""
        elif name and _END.match(line):
            computations[name], name = Computation(name, instructions, root), ""
        elif name and (match := _INSTRUCTION.match(line)) and (call := _CALL.search(match[3])):
            operands = re.findall(r"%([\w.-]+)", call[2])
            instructions[match[2]] = Instruction(match[2], call[1], operands, match[3])
            root = match[2] if match[1] else root
    return computations, entry


def _executed(
    computations: dict[str, Computation], name: str, times: int = 1
) -> Iterator[tuple[int, Computation, Instruction]]:
    """Every instruction that runs, with how often; each branch of a conditional as if it were taken."""
    if name not in computations:
        raise ValueError(f"computation {name} is not in the text")
    computation = computations[name]
    for instruction in computation.instructions.values():
        yield times, computation, instruction
        if instruction.opcode == "while":
            body = re.search(r"\bbody=%?([\w.-]+)", instruction.text)[1]
            inside = list(_executed(computations, body))
            if any(kind_of(i, where) for _, where, i in inside):
                trips = times * rounds(instruction, computation, computations)
                yield from ((trips * inner, where, i) for inner, where, i in inside)
            continue
        for other in instruction.called:
            yield from _executed(computations, other, times)


def kind_of(instruction: Instruction, computation: Computation) -> str | None:
    """Returns the kind of a collective; None for all other instructions."""
    if instruction.opcode == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        return "reduce-scatter"
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def rounds(loop: Instruction, computation: Computation, computations: dict[str, Computation]) -> int:
    """Rounds of a loop: as XLA notes them, or from a condition `i < constant` with i counting up from a constant."""
    if known := _TRIPS.search(loop.text):
        return int(known[1])
    condition = computations[re.search(r"\bcondition=%?([\w.-]+)", loop.text)[1]]
    compare = condition.instructions[condition.root]
    if compare.opcode == "compare" and "direction=LT" in compare.text:
        counter, limit = (condition.instructions[operand] for operand in compare.operands)
        index = re.search(r"\bindex=(\d+)", counter.text)
        if index and limit.opcode == "constant":
            start = computation.instructions[computation.instructions[loop.operands[0]].operands[int(index[1])]]
            while start.opcode in ("copy", "bitcast"):
                start = computation.instructions[start.operands[0]]
            if start.opcode == "constant":
                return _constant(limit) - _constant(start)
    raise ValueError(f"the rounds of loop {loop.name} are not known")


def _constant(instruction: Instruction) -> int:
    return int(re.search(r" constant\((-?\d+)\)", instruction.text)[1])


def _sent(kind: str, instruction: Instruction, computation: Computation) -> int:
    """Bytes that a device of a group of n has to send, however clever the algorithm."""
    operands = instruction.operands[:1] if kind == "ragged-all-to-all" else instruction.operands
    size = sum(_bytes(computation.instructions[name].type) for name in operands)
    if kind in ("collective-permute", "collective-broadcast", "send"):
        return size
    n = _group_size(instruction.text)
    if kind == "all-gather":
        return size * (n - 1)
    return size * (n - 1) * (2 if kind == "all-reduce" else 1) // n


def _group_size(text: str) -> int:
    if match := _GROUPS_LISTED.search(text):
        return match[1].count(",") + 1
    if match := _GROUPS_IOTA.search(text):
        return int(match[1])
    if match := _GROUPS_MESH.search(text):
        sizes = {axis: int(size) for axis, size in _AXIS_SIZE.findall(match[1])}
        return math.prod(int(part) if part else sizes[axis] for axis, part in _PART_OF_AXIS.findall(match[2]))
    raise ValueError(f"no replica groups in: {text}")


def _bytes(types: str) -> int:
    """Returns the bytes of all arrays in a type such as `(bf16[2,3]{1,0}, s32[])`; layouts and padding do not count."""
    bits = 0
    for name, width, shape in _ARRAY.findall(types):
        bits += (8 if name == "pred" else int(width)) * math.prod(map(int, filter(None, shape.split(","))))
    return bits // 8
