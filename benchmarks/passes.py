"""How often a compiled training step moves the experts' weights, their gradients and their moments through memory,
beside how often it must. Arrays of the size of a layer's experts or of all layers' are counted, and slices of them;
what is smaller (rows, one expert's matrices) stays in caches.

Letters: E experts, D model, F expert hidden, L layers.
"""

import collections
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from sizes import Size

from frugalmoe.aot import hlo
from frugalmoe.aot.hlo import Computation, Instruction

# Passes over the parameters of the experts, each one reading or writing all of them once.
IDEAL = {
    "forward: weights read by the experts": 1,
    "backward: weights read by the experts": 1,
    "backward: gradients written by the experts": 1,
    "update: gradients read for their norm, parameters for theirs": 1,
    "update: parameters, gradients, two moments read; three written": 7,
}
READ, WRITTEN = "{}: weights read by the experts", "backward: gradients written by the experts"
NORM, UPDATE = list(IDEAL)[-2:]

Dims = tuple[int, ...]


def arrays(shape: str) -> list[Dims]:
    """The axes of each array of a shape."""
    return [tuple(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\w+\[([\d,]*)\]", shape)]


class Moved(NamedTuple):
    """What one execution moves of large arrays, in elements."""

    read: int
    written: int
    sliced: bool  # of an array a slice that is not large itself: one expert's


def moved(
    computations: Mapping[str, Computation], instruction: Instruction, inside: Computation, large: set[Dims]
) -> Moved:
    """`Moved` of an instruction."""
    body = next((computations[name] for name in instruction.called if instruction.opcode == "fusion"), None)
    if body is None:
        given = {
            name: Instruction(name, "parameter", [], inside.instructions[name].text) for name in instruction.operands
        }
        body = Computation("", given | {instruction.name: instruction}, instruction.name)
    read, written, sliced = 0, 0, False

    def uses(name: str) -> list[tuple[Instruction, int]]:
        """Where an array is used, through what only renames it."""
        found = []
        for i in body.users.get(name, ()):
            renamed = i.opcode in ("bitcast", "reshape") and i.name != body.root
            places = [n for n, operand in enumerate(i.operands) if operand == name]
            found += uses(i.name) if renamed else [(i, place) for place in places]
        return found

    def of_slices(slices: list[Dims]) -> int:
        nonlocal sliced
        sliced |= any(dims[dims[0] == 1 :] not in large for dims in slices)
        return sum(map(math.prod, slices))

    for name, parameter in body.instructions.items():
        for dims in arrays(parameter.type) if parameter.opcode == "parameter" else ():
            if dims not in large:
                continue
            seen = [(i, i.opcode == "dynamic-update-slice" and at == 0) for i, at in uses(name)]
            if seen and all(i.opcode == "dynamic-slice" or in_place for i, in_place in seen):
                read += of_slices([arrays(i.type)[0] for i, in_place in seen if not in_place])
            else:
                read += math.prod(dims)
    root = body.instructions[body.root]
    while root.opcode == "bitcast":
        root = body.instructions[root.operands[0]]
    for part in [body.instructions[o] for o in root.operands] if root.opcode == "tuple" else [root]:
        for dims in (dims for dims in arrays(part.type) if dims[dims[:1] == (1,) :] in large):
            in_place = part.opcode == "dynamic-update-slice"
            written += of_slices([arrays(body.instructions[part.operands[1]].type)[0]]) if in_place else math.prod(dims)
    return Moved(read, written, sliced)


def passes(program: str, executions: Mapping[str, float], size: Size) -> dict[str, float]:
    """How often a step reads or writes all parameters of the experts, by what it does it for.

    executions: of each HLO operation in a step, as the profiler counted them.
    """
    e, d, f = size.experts, size.dim, size.expert_dim
    of_layer = [(e, d, 2, f), (e, d, 2 * f), (e, f, d)]
    large, all_of_them = (
        {(*more, *dims) for dims in of_layer for more in ((), (size.layers,))},
        size.layers * 3 * e * d * f,
    )
    computations, found = hlo.parse(program)[0], collections.Counter()
    for inside in computations.values():
        for name, instruction in inside.instructions.items():
            if count := executions.get(name, 0):
                m = moved(computations, instruction, inside, large)
                if m.read or m.written:
                    found[_item(instruction, m)] += count * (m.read + m.written) / all_of_them
    return {name: found.pop(name, 0.0) for name in IDEAL} | dict(found.most_common())


def _item(instruction: Instruction, m: Moved) -> str:
    name, source = instruction.name, instruction.source
    when = "backward" if "transpose" in source else "forward" if "jvp" in source else "update"
    if m.sliced and m.written:
        return WRITTEN
    if m.sliced:
        return "backward: gradients read, to be added to" if "dynamic_index_in_dim" in source else READ.format(when)
    if not m.read:
        return f"{when if source else 'backward'}: zeros written"
    if instruction.opcode in ("all-reduce", "copy"):
        return f"{when}: {instruction.opcode}"
    if when != "update":
        into = "dynamic-update-slice" in name or "dynamic_update_slice" in source
        return f"{when}: {'into the stack of all layers' if into else 'out of the stack of all layers'}"
    if not m.written:
        return NORM
    return "update: gradients divided by their norm" if "divide" in name and "select" not in name else UPDATE
