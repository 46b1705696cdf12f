"""`frugalmoe report PATH`."""

import argparse
from pathlib import Path

SUMMARY = "Write PATH/report/index.html: what a run or a study shows, with pictures."
EXAMPLES = """\
  frugalmoe report runs/quickstart
  frugalmoe report runs/balance
  frugalmoe report runs/balance --publish=experiments
  frugalmoe report runs/isoflop --fit
  frugalmoe report runs/leverage --fit=leverage"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `frugalmoe report`."""
    parser.add_argument("path", metavar="PATH", help="the directory of a run or of a study, finished or not")
    parser.add_argument(
        "--publish", metavar="DIR", help="write a study's results, pictures and RESULTS.md into DIR/NAME and its index"
    )
    parser.add_argument(
        "--fit",
        nargs="?",
        const="size",
        metavar="LAW",
        help="fit a law to a study's trained arms. size, the default: of size and tokens, which foretells its other "
        "arms, PATH/fit.json; leverage: of compute, activation and granularity, PATH/leverage.json",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the page and prints its path."""
    if args.fit:
        from frugalmoe import ablate

        print(f"fit: {ablate.fit_study(args.path, args.fit)}")
    if args.publish or args.fit or (Path(args.path) / "study.json").is_file():
        from frugalmoe import ablate

        print(ablate.publish_study(args.path, args.publish) if args.publish else ablate.write_study_report(args.path))
        return 0
    from frugalmoe.analysis import write_report

    print(write_report(args.path))
    return 0
