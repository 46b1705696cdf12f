"""`frugalmoe generate`."""

import argparse
import codecs
import re
import sys
from pathlib import Path

from frugalmoe.errors import UserError

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
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        help="end before this text, in which \\n is a line's end and \\\\ a backslash; may be repeated",
    )
    parser.add_argument(
        "--drafts",
        action="store_true",
        help="the same text in fewer steps: multi-token prediction proposes tokens, which the network checks",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the prompt and its continuation, as it is sampled."""
    import jax

    from frugalmoe.generate import Drafts, Sampling, stream
    from frugalmoe.train.weights import load_model

    sampling = Sampling(
        temperature=args.temperature,
        top_p=args.top_p,
        max_tokens=args.max_tokens,
        seed=args.seed,
        stop=tuple(map(unescaped, args.stop)),
    )
    sampling.check()
    config, weights, tokenizer, mesh = load_model(args.run)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not have every character
    with jax.set_mesh(mesh):
        drafts = Drafts() if args.drafts else None
        pieces = stream(config, weights, tokenizer, args.prompt, sampling, drafts)
        print(args.prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
    print()
    if drafts is not None and drafts.made:
        print(f"{drafts.accepted} of {drafts.made} drafts stood ({drafts.accepted / drafts.made:.0%})", file=sys.stderr)
    return 0


# The escapes of Python's strings: \n, \\, \x41, \101, \u3002, \N{IDEOGRAPHIC FULL STOP} ... The last branch is none.
_ESCAPE = re.compile(
    r"""\\([abfnrtv\\'"]|[0-7]{1,3}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|N\{[^{}]+\})|\\.?""", re.DOTALL
)


def unescaped(text: str) -> str:
    """Returns what a --stop means, escapes written out. Raises `UserError` for one that is none."""

    def written_out(escape: re.Match) -> str:
        try:
            if escape[1]:
                return codecs.decode(escape[0], "unicode_escape")
        except UnicodeDecodeError:  # a name, or a number, that no character has
            pass
        raise UserError(f"--stop={text}: {escape[0]} is no escape; write \\\\ for a backslash")

    try:
        return _ESCAPE.sub(written_out, text).encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise UserError(f"--stop={text!r}: must be UTF-8, and of a surrogate both halves") from None
