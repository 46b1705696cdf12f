"""`frugalmoe upcycle DENSE RUN`."""

import argparse
from pathlib import Path

SUMMARY = "Make a mixture of experts of a dense run: experts begin as copies of its feed-forwards, or of parts."
EXAMPLES = """\
  frugalmoe upcycle runs/dense runs/upcycled --experts=8 --per-token=2 --dry-run
  frugalmoe upcycle runs/dense runs/fine --experts=32 --per-token=8 --granularity=4   (experts of a quarter each)
  frugalmoe upcycle runs/dense@200 runs/drop --experts=8 --per-token=2 --redrawn=0.5 --config.model.moe.router=moge
  frugalmoe train --from=runs/upcycled --config=runs/upcycled --config.data.path=mine.txt --workdir=runs/continued"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `frugalmoe upcycle`."""
    parser.add_argument("dense", metavar="DENSE[@STEP]", help="a run without experts, and which checkpoint")
    parser.add_argument("run", metavar="RUN", type=Path, help="a new run directory")
    parser.add_argument("--experts", type=int, required=True, help="routed experts of a layer")
    parser.add_argument("--per-token", type=int, required=True, help="experts that a token is sent to")
    parser.add_argument(
        "--granularity",
        type=int,
        default=1,
        metavar="M",
        help="an expert is one of M equal parts of the feed-forward (default: 1, the whole)",
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        help="deviation of what is added to experts' weights, over that of the weights (default: 0)",
    )
    parser.add_argument(
        "--redrawn",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of an expert's hidden units, drawn anew with mean and deviation of the old: drop-upcycling (default: 0)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be made, and write nothing")
    parser.set_defaults(config=None)  # overrides are of the dense run's config, and --config is no flag


def run(args: argparse.Namespace) -> int:
    """Writes the upcycled run and says how far it is from the dense one."""
    from frugalmoe.console import Console
    from frugalmoe.convert import output, upcycle
    from frugalmoe.train.weights import run_and_step

    console = Console()
    output.check_new(args.run, "RUN")
    recipe = upcycle.Recipe(args.granularity, args.noise, args.redrawn)
    counts = {"experts": args.experts, "per_token": args.per_token}
    found = upcycle.look(*run_and_step(args.dense), recipe=recipe, **counts, overrides=args.overrides)
    console.print(str(found), soft_wrap=True)
    made = upcycle.upcycle(found)
    scales = sorted({f"{scale:.4g}" for scale in made.scale_L})
    console.print(
        f"experts are scaled by {', '.join(scales)}; before the first step losses of random tokens differ from the "
        f"dense model's by at most {made.difference:.1e} nats",
        soft_wrap=True,
    )
    if args.dry_run:
        console.print("nothing was written")
        return 0
    upcycle.write(found, made, args.run)
    console.print(f"{args.run}: written; continue with frugalmoe train --from={args.run}", soft_wrap=True)
    return 0
