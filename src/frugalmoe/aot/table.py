"""What `frugalmoe compile` and a dry run print of a compiled step."""

import datetime
import importlib.metadata
import math

from rich import box
from rich.table import Table

from frugalmoe.devices import GIB

_PACKAGES = {"tpu": ("libtpu",), "cuda": ("jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")}


def row(result) -> dict:
    """Returns everything that is known of a compiled step, ready for JSON."""
    known = {name: value for name, value in result._asdict().items() if name not in ("collectives", "largest", "text")}
    packages = ("jax", "jaxlib", *_PACKAGES[result.topology.device.platform])
    return known | {
        "topology": str(result.topology),
        "devices": result.topology.num_devices,
        "overrides": _overrides(result),
        "collectives": result.collectives and [c._asdict() for c in result.collectives],
        "largest": result.largest and [value._asdict() for value in result.largest],
        "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _overrides(result) -> str:
    """The flags that lay a run out in this way."""
    micro_batches, sequences = result.sequences
    flags = [f"mesh.{name}={size}" for name, size in result.mesh.items() if size > 1 or name == "data"]
    flags += [f"train.batch_size={micro_batches * sequences}", f"train.accumulate_steps={micro_batches}"]
    return " ".join(f"--config.{flag}" for flag in flags)


def _mesh(result) -> str:
    return " x ".join(f"{name} {size}" for name, size in result.mesh.items() if size > 1) or "one device"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def headline(result) -> str:
    where = f"{result.topology}, {_mesh(result)}" if result.topology else _mesh(result)
    known = result.available is not None
    needed = f"{_size(result.needed)} of {_size(result.available)}" if known else _size(result.needed)
    verdict = (": fits," if result.fits else ": does not fit,") if known else ":"
    return f"{where}{verdict} {needed} per device, compiled in {result.seconds:.0f} s"


def tables(result) -> list:
    """Returns what people read: the headline, memory by part, collectives, the largest arrays."""
    table = lambda *columns: Table(*columns, box=box.SIMPLE_HEAD)
    memory = table("memory of one device", "")
    for part, size in result.memory.items():
        memory.add_row(part, _size(size))
        if part == "temporaries":
            memory.add_row("  gradients among them", _size(result.gradients))
    memory.add_row("all", _size(result.needed))
    if result.available is not None:
        memory.add_row("available", _size(result.available))
    micro_batches, sequences = result.sequences
    parts = [headline(result), f"micro-batches of a step: {micro_batches}, of {sequences} sequences", memory]
    if result.collectives is not None:
        sent = table("collectives of a step", "count", "sent by a device")
        for kind, count, size in result.collectives:
            sent.add_row(kind, f"{count:,}", _size(size))
        parts += [sent] if math.prod(result.mesh.values()) > 1 else []
        largest = table("largest arrays that it makes", "", "made by")
        for of_type, size, source in result.largest:
            largest.add_row(of_type, _size(size), source.removeprefix("jit(train_step)/")[-60:])
        parts.append(largest)
    elif result.fits:
        parts.append("collectives: unknown, for the text of this program cannot be read")
    return [*parts, f"this layout: {_overrides(result)}"]


def markdown(results: list) -> str:
    """Returns a table with one line per compilation; memory in GiB of one device, collectives as count and GiB that a
    device sends.
    """
    parts = ("parameters", "optimizer state", "temporaries")
    columns = ["devices", "mesh", "micro-batches x sequences", "fits", "GiB needed / available", *parts]
    columns += ["gradients", "collectives of a step", "compiled in s"]
    lines = [columns, ["---"] * len(columns)]
    for r in results:
        needed = f"{_gib(r.needed)} / {_gib(r.available)}"
        sizes = [_gib(r.memory[part]) if part in r.memory else "" for part in parts]
        sent = ", ".join(f"{count:,} {kind} {_gib(size)}" for kind, count, size in r.collectives or ())
        row = [r.topology, _mesh(r), "{} x {}".format(*r.sequences), "yes" if r.fits else "no", needed, *sizes]
        lines.append([*row, _gib(r.gradients), sent, f"{r.seconds:.0f}"])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
