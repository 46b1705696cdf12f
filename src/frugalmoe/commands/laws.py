"""`frugalmoe laws`."""

import argparse
import os

from frugalmoe.errors import UserError

SUMMARY = "Check that a routing strategy or an executor obeys the laws of its kind."
EXAMPLES = """\
  frugalmoe laws my_router.py
  frugalmoe laws my_package.routers.mine
  frugalmoe laws hash --law=causal_by_perturbation
  frugalmoe laws --executor=my_executor.py
  frugalmoe laws --list

exit code: 0 all laws hold, 1 one is broken, 2 there is no such strategy, or its file cannot be run
needs no packages beside those of frugalmoe"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `frugalmoe laws`."""
    parser.add_argument(
        "router",
        nargs="?",
        help="a strategy that `frugalmoe routers` lists, or your own: the path of a file that ends with ROUTER = "
        "Router(...), or a dotted module",
    )
    parser.add_argument(
        "--executor", metavar="NAME", help="an executor in place of a strategy; its file ends with EXECUTOR = ..."
    )
    parser.add_argument(
        "--law", action="append", default=[], metavar="NAME", help="this law alone; may be given several times"
    )
    parser.add_argument("--list", action="store_true", help="list the laws with what they mean, and check nothing")


def run(args: argparse.Namespace) -> int:
    """Prints a line for each law as it is known; 1 where one is broken."""
    if not args.list and (args.router is None) == (args.executor is None):
        raise UserError("laws: name one strategy, as in `frugalmoe laws my_router.py`, or one --executor; or --list")
    if args.router == "":
        raise UserError("laws: '' names no strategy; `frugalmoe routers` lists them")
    from frugalmoe.laws import run as laws
    from frugalmoe.laws import xla_flags

    os.environ.setdefault("XLA_FLAGS", xla_flags())

    if args.list:
        return _list(laws)
    if args.executor is not None:
        chosen, cases = laws.chosen(laws.executor_laws(), args.law), laws.cases_of_executor(args.executor)
    else:
        chosen, cases = laws.chosen(laws.routing_laws(), args.law), laws.cases_of_router(args.router)
    return _check(laws, chosen, cases)


def _list(laws) -> int:
    for title, table in (("strategies", laws.routing_laws()), ("executors", laws.executor_laws())):
        print(f"laws of {title}")
        for name, law in table.items():
            print(f"  {name:24} {laws.meaning(law)}")
    return 0


def _check(laws, chosen, cases) -> int:
    results = []
    print(f"{len(chosen)} laws, {len(cases)} {'case' if len(cases) == 1 else 'cases'}", flush=True)
    for result in laws.run(chosen, cases):
        results.append(result)
        print(f"{'BROKEN' if result.broken else 'holds ':7} {result.law:24} {result.seconds:5.1f} s", flush=True)
        if result.broken:
            print(f"        {result.meaning}")
        for case, message in result.broken.items():
            print(f"        {case}: {message}", flush=True)
    broken = [result.law for result in results if result.broken]
    seconds = sum(result.seconds for result in results)
    print(f"{f'{len(broken)} broken: ' + ', '.join(broken) if broken else 'all hold'} ({seconds:.0f} s)")
    return 1 if broken else 0
