"""`frugalmoe compile`: flags, and what it prints."""

import argparse
import datetime
import importlib.metadata
import json
import math
import sys

from rich import box
from rich.console import Console
from rich.table import Table

from frugalmoe.commands import add_command, add_config_flag, load_config
from frugalmoe.cost.devices import GIB
from frugalmoe.errors import UserError

_PACKAGES = {"tpu": ("libtpu",), "cuda": ("jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")}


def add_parsers(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "compile",
        _compile,
        "Compile the train step for devices that are not there, and say what it needs of each and whether it fits.",
        "  frugalmoe compile --config=configs/ling_mini_2.py --topology=v5e --search\n"
        "  frugalmoe compile --config=configs/ling_mini_2.py --topology=v5e:8x8 --config.mesh.data=1 \\\n"
        "      --config.mesh.fsdp=8 --config.mesh.expert=8 --config.train.batch_size=64\n"
        "  frugalmoe compile --config=configs/ling_lite.py --topology=v5p:4x4x4 --slices=2 ...\n"
        "  frugalmoe compile --config=configs/small.py --topology=h100:1 --format=json\n\n"
        "A TPU program that is too large fails in seconds, one that fits takes minutes. The compilers are extras:\n"
        "  pip install 'frugalmoe[aot-tpu]'    v5e, v5p, v6e\n"
        "  pip install 'frugalmoe[aot-cuda]'   h200, h100, a100, a100-40, a6000, l40s, l4, rtx4090",
    )
    add_config_flag(parser)
    parser.add_argument(
        "--topology", required=True, help="KIND:SHAPE, as v5e:8x8, v5p:4x4x4 or h100:64; KIND alone with --search"
    )
    parser.add_argument("--slices", type=int, help="TPU slices, joined by the data-centre network (default: 1)")
    parser.add_argument("--search", action="store_true", help="find the smallest slice that fits, and a layout for it")
    parser.add_argument("--format", choices=("table", "json", "markdown"), default="table")


def _compile(args: argparse.Namespace) -> int:
    import jax

    jax.config.update("jax_platforms", "cpu")  # a device that is there is of no use here, and may be in use
    from frugalmoe.cost.aot import compile_step
    from frugalmoe.cost.search import search
    from frugalmoe.cost.topologies import parse

    config, results, nothing_fits = load_config(args), [], None

    def tried(result):
        results.append(result)
        print(_headline(result), file=sys.stderr, flush=True)

    if args.search:
        try:
            search(config, args.topology, args.slices, tried)
        except UserError as e:
            if not results:
                raise
            nothing_fits = e  # what was tried is worth its minutes all the same
    else:
        results = [compile_step(config, parse(args.topology, args.slices))]
    if args.format == "json":
        print(json.dumps([_row(result) for result in results] if args.search else _row(results[0]), indent=1))
    elif args.format == "markdown":
        print(_markdown(results))
    else:
        Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(*tables(results[-1]), sep="\n")
    if nothing_fits:
        raise nothing_fits
    return 0


def _row(result) -> dict:
    """Everything that is known, ready for JSON."""
    row = {name: value for name, value in result._asdict().items() if name not in ("collectives", "largest")}
    packages = ("jax", "jaxlib", *_PACKAGES[result.topology.device.platform])
    return row | {
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


def _headline(result) -> str:
    where = f"{result.topology}, {_mesh(result)}" if result.topology else _mesh(result)
    known = result.available is not None
    needed = f"{_size(result.needed)} of {_size(result.available)}" if known else _size(result.needed)
    verdict = (": fits," if result.fits else ": does not fit,") if known else ":"
    return f"{where}{verdict} {needed} per device, compiled in {result.seconds:.0f} s"


def tables(result) -> list:
    """For people: the headline, memory by part, collectives, the largest arrays."""
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
    parts = [_headline(result), f"micro-batches of a step: {micro_batches}, of {sequences} sequences", memory]
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


def _markdown(results: list) -> str:
    """One line per compilation; memory in GiB of one device, collectives as count and GiB that a device sends."""
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
