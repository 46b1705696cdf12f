"""`frugalmoe compile`."""

import argparse
import json
import sys
from pathlib import Path

from frugalmoe.commands import add_config_flag, load_config
from frugalmoe.errors import UserError

SUMMARY = "Compile the train step for devices that are not there, and say what it needs of each and whether it fits."
EXAMPLES = """\
  frugalmoe compile --config=configs/ling_2.py:mini --topology=v5e --search
  frugalmoe compile --config=configs/ling_2.py:mini --topology=v5e:8x8 --config.mesh.data=1 \\
      --config.mesh.fsdp=8 --config.mesh.expert=8 --config.train.batch_size=64
  frugalmoe compile --config=configs/ling_1.py:lite --topology=v5p:4x4x4 --slices=2 ...
  frugalmoe compile --config=configs/small.py --topology=h100:1 --format=json
  frugalmoe compile --config=configs/small.py --topology=a100:1 --items

A TPU program that is too large fails in seconds, one that fits takes minutes. The compilers are packages of their own.
For v5e, v5p, v6e:
  pip install 'jax[tpu]'
For h200, h100, a100, a100-40, a6000, l40s, l4, rtx4090:
  pip install 'jax[cuda12-local]' nvidia-cuda-nvcc-cu12 nvidia-cudnn-cu12 'jax-triton>=0.3.1'"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `frugalmoe compile`."""
    add_config_flag(parser)
    parser.add_argument(
        "--topology", required=True, help="KIND:SHAPE, as v5e:8x8, v5p:4x4x4 or h100:64; KIND alone with --search"
    )
    parser.add_argument("--slices", type=int, help="TPU slices, joined by the data-centre network (default: 1)")
    parser.add_argument("--search", action="store_true", help="find the smallest slice that fits, and a layout for it")
    parser.add_argument(
        "--items", action="store_true", help="print what the kernels are for, their FLOPs and bytes beside the least"
    )
    parser.add_argument("--text", metavar="FILE", help="write the optimized program there, as XLA prints it")
    parser.add_argument("--format", choices=("table", "json", "markdown"), default="table")


def run(args: argparse.Namespace) -> int:
    """Compiles, or searches for the smallest slice, and prints what was found."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # no device is needed here, and those that are there may be in use
    from frugalmoe.aot.program import compile_step
    from frugalmoe.aot.search import search
    from frugalmoe.aot.table import headline, markdown, row, tables
    from frugalmoe.aot.topologies import parse
    from frugalmoe.console import Console

    config, results, nothing_fits = load_config(args), [], None
    if args.search and (args.items or args.text):
        raise UserError("--search compiles several programs: --items and --text are of one; give its --topology")

    def tried(result):
        results.append(result)
        print(headline(result), file=sys.stderr, flush=True)

    if args.search:
        try:
            search(config, args.topology, args.slices, tried)
        except UserError as e:
            if not results:
                raise
            nothing_fits = e  # raised at the end: what was tried is printed first
    else:
        results = [compile_step(config, parse(args.topology, args.slices))]
    if args.text or args.items:
        _program(args, config, results[0])
    if args.format == "json":
        print(json.dumps([row(result) for result in results] if args.search else row(results[0]), indent=1))
    elif args.format == "markdown":
        print(markdown(results))
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(*tables(results[-1]), sep="\n")
    if nothing_fits:
        raise nothing_fits
    return 0


def _program(args: argparse.Namespace, config, result) -> None:
    """Writes the text of a program and prints its items, as the flags say."""
    from frugalmoe.aot.program import as_expected
    from frugalmoe.console import Console
    from frugalmoe.cost.items import tables
    from frugalmoe.files import write_atomically

    if result.text is None:
        raise UserError(f"--topology={args.topology}: the text of this program cannot be had")
    if args.text:
        write_atomically(Path(args.text), result.text.encode())
    if args.items:
        of_one = as_expected(config, result.topology.num_devices)
        Console(width=None if sys.stdout.isatty() else 140).print(*tables(result.text, of_one), sep="\n")
