"""`frugalmoe convert from-hf` and `frugalmoe convert to-hf`."""

import argparse
import pkgutil
import textwrap
from pathlib import Path

from frugalmoe.errors import UserError

SUMMARY = "Open a published model as a run, or publish a run, in the layout of Hugging Face."
EXAMPLES = """\
  frugalmoe convert from-hf models/OLMoE-1B-7B runs/olmoe --dry-run    (what would go where)
  frugalmoe convert from-hf models/OLMoE-1B-7B runs/olmoe
  frugalmoe generate runs/olmoe --prompt="The capital of France is"
  frugalmoe convert from-hf models/Moonlight-16B-A3B runs/moonlight --link --config.model.compute_dtype=bfloat16
  frugalmoe trace runs/moonlight --tokens=8192         (a layer in memory at one time)
  frugalmoe convert to-hf runs/olmoe published/olmoe"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `from-hf` and `to-hf`, each with its flags."""
    known = textwrap.fill(f"Families of models, by model_type of their config.json: {', '.join(_families())}.", 100)
    titles = {"title": "actions", "description": known}
    actions = parser.add_subparsers(dest="action", required=True, metavar="from-hf|to-hf", **titles)
    summary = "Make a run of a published model; fields of its config that change no answer are set by --config.FIELD."
    from_hf = actions.add_parser("from-hf", help=summary, description=summary, allow_abbrev=False)
    from_hf.set_defaults(parser=from_hf, config=None)
    from_hf.add_argument("directory", metavar="DIR", type=Path, help="with config.json and safetensors")
    from_hf.add_argument("run", metavar="RUN", type=Path, help="a new run directory")
    from_hf.add_argument(
        "--link", action="store_true", help="leave the weights in DIR: RUN is for `frugalmoe trace`, a layer at a time"
    )
    from_hf.add_argument("--tokenizer", default="", help="bytes, or the path of one, in place of the directory's own")
    summary = "Write a run in the layout of Hugging Face."
    to_hf = actions.add_parser("to-hf", help=summary, description=summary, allow_abbrev=False)
    to_hf.set_defaults(parser=to_hf)
    to_hf.add_argument("run", metavar="RUN[@STEP]", help="a run directory with a checkpoint; RUN@best its best")
    to_hf.add_argument("directory", metavar="DIR", type=Path, help="a new directory")
    to_hf.add_argument("--step", metavar="N|best", help="of the checkpoint (default: the newest)")
    for action in (from_hf, to_hf):
        action.add_argument(
            "--family", default="", help="a family of models, or the path of a file (default: found by itself)"
        )
        action.add_argument("--dry-run", action="store_true", help="show which tensor goes where, and write nothing")


def _families() -> list[str]:
    """The files that `convert.families` finds, without importing any."""
    folder = Path(__file__).parents[1] / "convert/families"
    return sorted(module.name for module in pkgutil.iter_modules([str(folder)]))


def run(args: argparse.Namespace) -> int:
    """Converts, or shows what would be done."""
    return {"from-hf": _from_hf, "to-hf": _to_hf}[args.action](args)


def _from_hf(args: argparse.Namespace) -> int:
    from frugalmoe.convert import from_hf, table

    console = table.console()
    options = {"family": args.family, "tokenizer": args.tokenizer, "overrides": args.overrides}
    found = from_hf.look(args.directory, args.run, **options)
    for note in found.notes:
        console.print(note, soft_wrap=True)
    if args.dry_run:
        console.print(table.of(found.plan, {name: info.dtype for name, info in found.source.tensors.items()}))
        if found.faults:
            raise UserError(found.faults)
        console.print(f"{found.family.name}: all tensors have a place; nothing was written", soft_wrap=True)
        return 0
    if args.link:
        from_hf.link(found, args.run, progress=True)
        console.print(f"{args.run}: {found.family.name}; its weights stay in {args.directory}", soft_wrap=True)
        return 0
    from_hf.convert(found, args.run, progress=True)
    console.print(f"{args.run}: {found.family.name}, {table.count(found.plan)} parameters as float32", soft_wrap=True)
    return 0


def _to_hf(args: argparse.Namespace) -> int:
    from frugalmoe.convert import table, to_hf
    from frugalmoe.train.weights import load_model, one_step

    console = table.console()
    run, step = one_step(args.run, args.step)
    config, weights, _, _ = load_model(run, step)
    made = to_hf.look(run, config, args.family)
    if args.dry_run:
        console.print(table.of(made.plan, {entry.name: entry.dtype for entry in made.entries}))
        console.print(f"{made.family.name}: nothing was written", soft_wrap=True)
        return 0
    to_hf.convert(run, made, weights, args.directory, progress=True)
    console.print(f"{args.directory}: {made.family.name}, {table.count(made.plan)} parameters", soft_wrap=True)
    return 0
