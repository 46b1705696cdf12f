"""`frugalmoe generate`."""

import argparse
import codecs
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from frugalmoe.errors import UserError

if TYPE_CHECKING:
    from frugalmoe.generate import Drafts, Prompt, Sampling
    from frugalmoe.generate.prompts import Entry
    from frugalmoe.train.weights import Loaded

SUMMARY = "Sample text from a trained run."
EXAMPLES = """\
  frugalmoe generate runs/quickstart --prompt="To be, or not to be"
  frugalmoe generate runs/quickstart@100 --prompt="def main" --temperature=0 --max-tokens=64
  frugalmoe generate runs/quickstart --prompt="My lord" --top-k=50 --min-p=0.05 --seed=3 --stop='\\n\\n'
  frugalmoe generate runs/quickstart --prompts=prompts.txt --batch-size=16     (a prompt on each line)
  frugalmoe generate runs/quickstart --prompts=prompts.jsonl --output=answers.jsonl
  frugalmoe generate runs/olmoe --chat --prompt="Which rivers cross Basel?"    (with the tokenizer's chat template)"""
_WRITTEN = (".jsonl", ".ndjson")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `frugalmoe generate`."""
    parser.add_argument("run", metavar="RUN[@STEP]", help="a run directory, and which checkpoint (default: the newest)")
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint, as RUN@N")
    parser.add_argument("--prompt", help="text to continue (default: the beginning of a document)")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a file of prompts: a text on each line; in .jsonl a record with `prompt`, or with `messages`, which are "
        "records with role and content and are written with the tokenizer's chat template",
    )
    parser.add_argument(
        "--chat", action="store_true", help="prompts are what a user says; the model answers (by the chat template)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="write a record for each prompt: it, text, tokens, and what ended it (end, stop or length)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="prompts of a file at one time (default: 8)"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most likely token (default: 0.8)")
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="only the K most likely tokens (default: all)"
    )
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus probability (default: 0.95)")
    parser.add_argument(
        "--min-p", type=float, default=0.0, help="no token less likely than this times the most likely (default: 0)"
    )
    parser.add_argument("--max-tokens", type=int, default=200, help="(default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        help="end before this text, in which \\n is a line's end and \\\\ a backslash; may be repeated",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="the most tokens of a prompt (default: what the model was published or trained with)",
    )
    parser.add_argument(
        "--drafts",
        action="store_true",
        help="the same text in fewer steps: multi-token prediction proposes tokens, which the network checks",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the prompt and its continuation as it is sampled, or those of a file of prompts."""
    import jax

    from frugalmoe.generate import Sampling, prompts
    from frugalmoe.train.weights import load_checkpoint, run_and_step

    sampling = Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        max_tokens=args.max_tokens,
        seed=args.seed,
        stop=tuple(map(unescaped, args.stop)),
    )
    sampling.check()
    _check(args)
    entries = (
        [prompts.Entry("--prompt", args.prompt or "", None)] if args.prompts is None else prompts.read(args.prompts)
    )
    if args.chat:
        said = lambda entry: [{"role": "user", "content": entry.text}]
        entries = [e if e.text is None else prompts.Entry(e.where, None, said(e)) for e in entries]
    directory, step = run_and_step(args.run)
    if step is not None and args.step is not None:
        raise UserError(f"--step={args.step}: RUN names step {step} already")
    loaded = load_checkpoint(directory, args.step if step is None else step)
    found = _prompts(args, directory, loaded, entries)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not have every character
    with jax.set_mesh(loaded.mesh):
        if args.prompts is None and args.output is None:
            _stream(args, loaded, found[0], sampling)
        else:
            _write(args, loaded, entries, found, sampling)
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be refused before anything is read."""
    for name, least in (("batch_size", 1), ("context", 1), ("step", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}={value}: must be {'positive' if least else '0 or more'}")
    if args.prompts is not None and args.prompt is not None:
        raise UserError(f"--prompts={args.prompts}: cannot be given with --prompt")
    if args.output is not None:
        from frugalmoe.files import check_writable

        if args.output.suffix not in _WRITTEN:
            raise UserError(f"--output={args.output}: must end with {' or '.join(_WRITTEN)}")
        if args.output.is_dir() or not args.output.absolute().parent.is_dir():
            raise UserError(f"--output={args.output}: must be a file in a directory that is there")
        check_writable(args.output, f"--output={args.output}")


def _prompts(args: argparse.Namespace, run: Path, loaded: "Loaded", entries: Sequence["Entry"]) -> list["Prompt"]:
    from frugalmoe.generate import chat_prompt, text_prompt

    config, tokenizer, found = loaded.config, loaded.tokenizer, []
    longest, why = (args.context, "--context") if args.context else _context(run, loaded)
    for entry in entries:
        if entry.messages is None:
            found.append(text_prompt(config, tokenizer, entry.text, entry.where))
        else:
            found.append(chat_prompt(tokenizer, entry.messages, "--chat" if args.chat else f"{entry.where}: messages"))
        if (count := len(found[-1].ids)) > longest:
            hint = "" if args.context else "; --context=N allows more"
            raise UserError(f"{entry.where}: the prompt has {count} tokens, and the context {longest} ({why}){hint}")
    return found


def _context(run: Path, loaded: "Loaded") -> tuple[int, str]:
    """(tokens of the longest text that a model knows, what says so): its publisher, else the rows of its training."""
    from frugalmoe.convert.from_hf import FOLDER
    from frugalmoe.files import read_json

    published = run / FOLDER / "config.json"
    if published.is_file() and type(longest := read_json(published).get("max_position_embeddings")) is int:
        return longest, f"max_position_embeddings={longest}"
    length = loaded.config.data.sequence_length
    return length, f"data.sequence_length={length}"


def _stream(args: argparse.Namespace, loaded: "Loaded", prompt: "Prompt", sampling: "Sampling") -> None:
    from frugalmoe.generate import Drafts, stream

    drafts = Drafts() if args.drafts else None
    pieces = stream(loaded.config, loaded.weights, loaded.tokenizer, prompt, sampling, drafts)
    print(prompt.text, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    _tell(drafts)


def _tell(drafts: "Drafts | None") -> None:
    if drafts is not None and drafts.made:
        print(f"{drafts.accepted} of {drafts.made} drafts stood ({drafts.accepted / drafts.made:.0%})", file=sys.stderr)


def _write(
    args: argparse.Namespace,
    loaded: "Loaded",
    entries: Sequence["Entry"],
    found: Sequence["Prompt"],
    sampling: "Sampling",
) -> None:
    """All prompts, printed with an empty line between them, or written as records when all are there."""
    import json

    from rich.progress import Progress

    from frugalmoe.console import Console
    from frugalmoe.files import write_atomically
    from frugalmoe.generate import Drafts, completions, prompts

    console, records, drafts = Console(stderr=True), [], Drafts() if args.drafts else None
    with Progress(console=console, disable=not console.is_terminal, transient=True) as shown:
        task = shown.add_task("prompts", total=len(found))
        all_of_them = completions(
            loaded.config, loaded.weights, loaded.tokenizer, found, sampling,
            batch_size=args.batch_size, ended=lambda: shown.advance(task), drafts=drafts,
        )  # fmt: skip
        for number, (entry, prompt, completion) in enumerate(zip(entries, found, all_of_them)):
            if args.output is None:
                print(f"{'' if number == 0 else chr(10)}{prompt.text}{completion.text}", flush=True)
            records.append(prompts.to_record(entry) | completion._asdict())
    if args.output is not None:
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        write_atomically(args.output, "".join(lines).encode())
        print(f"{args.output}: {len(records)} {'text' if len(records) == 1 else 'texts'}")
    _tell(drafts)


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
