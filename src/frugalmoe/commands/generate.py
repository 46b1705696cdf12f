"""`frugalmoe generate`."""

import argparse
from pathlib import Path

SUMMARY = "Sample text from a trained run."
EXAMPLES = """\
  frugalmoe generate runs/quickstart --prompt="To be, or not to be"
  frugalmoe generate runs/quickstart --prompt="def main" --temperature=0 --max-tokens=64
  frugalmoe generate runs/quickstart --prompt="My lord" --top-p=0.9 --seed=3 --stop='\\n\\n'"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `frugalmoe generate`."""
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most likely token (default: 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus probability (default: 0.95)")
    parser.add_argument("--max-tokens", type=int, default=200, help="(default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--stop", action="append", default=[], help="end before this text; may be repeated")


def run(args: argparse.Namespace) -> int:
    """Prints the prompt and its continuation, as it is sampled."""
    import jax

    from frugalmoe.generate import Sampling, load, stream

    stop = tuple(s.encode().decode("unicode_escape") for s in args.stop)
    sampling = Sampling(
        temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_tokens, seed=args.seed, stop=stop
    )
    sampling.check()
    config, weights, tokenizer, mesh = load(args.run)
    print(args.prompt, end="", flush=True)
    with jax.set_mesh(mesh):
        for piece in stream(config, weights, tokenizer, args.prompt, sampling):
            print(piece, end="", flush=True)
    print()
    return 0
