"""`frugalmoe laws`."""

import argparse
import os

from frugalmoe.errors import UserError

SUMMARY = "Check that a routing strategy, an executor or a kind of attention obeys its laws."
EXAMPLES = """\
  frugalmoe laws my_router.py
  frugalmoe laws my_package.routers.mine
  frugalmoe laws hash --law=causal_by_perturbation
  frugalmoe laws --executor=my_executor.py
  frugalmoe laws --attention=my_attention.py
  frugalmoe laws --list

exit code: 0 all laws hold, 1 one is broken, 2 there is nothing of that name, or its file cannot be run
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
        "--attention", metavar="NAME", help="a kind of attention instead; its file ends with ATTENTION = ..."
    )
    parser.add_argument(
        "--law", action="append", default=[], metavar="NAME", help="this law alone; may be given several times"
    )
    parser.add_argument("--list", action="store_true", help="list the laws with what they mean, and check nothing")


def run(args: argparse.Namespace) -> int:
    """Prints a line for each law as it is known; 1 where one is broken."""
    named = [spec for spec in (args.router, args.executor, args.attention) if spec is not None]
    if not args.list and len(named) != 1:
        what = "name one strategy, as in `frugalmoe laws my_router.py`, or one --executor or --attention; or --list"
        raise UserError(f"laws: {what}")
    if args.router == "":
        raise UserError("laws: '' names no strategy; `frugalmoe routers` lists them")
    from frugalmoe.laws import run as laws
    from frugalmoe.laws import xla_flags

    os.environ.setdefault("XLA_FLAGS", xla_flags())

    if args.list:
        return _list(laws)
    if args.executor is not None:
        chosen, cases = laws.chosen(laws.executor_laws(), args.law), laws.cases_of_executor(args.executor)
    elif args.attention is not None:
        chosen, cases = laws.chosen(laws.attention_laws(), args.law), laws.cases_of_attention(args.attention)
    else:
        chosen, cases = laws.chosen(laws.routing_laws(), args.law), laws.cases_of_router(args.router)
    return _check(laws, chosen, cases)


def _list(laws) -> int:
    tables = {
        "strategies": laws.routing_laws(),
        "executors": laws.executor_laws(),
        "kinds of attention": laws.attention_laws(),
    }
    for title, table in tables.items():
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
