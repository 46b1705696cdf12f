"""Files of prompts: a text on each line, or JSON records with `prompt` or `messages`."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from frugalmoe.data.chat import Message, check_messages
from frugalmoe.errors import UserError

RECORDS = (".jsonl", ".ndjson")


class Entry(NamedTuple):
    """One prompt of a file."""

    where: str  # file and line, for messages
    text: str | None  # None: it is a conversation
    messages: list[Message] | None


def read(path: Path, flag: str = "--prompts") -> list[Entry]:
    """Returns the prompts of a file, in order; empty lines are left out. Raises `UserError` for what is none."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else f"not UTF-8 ({error})"
        raise UserError(f"{flag}={path}: {what}") from error
    lines = [(f"{path}:{number}", line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1)]
    of_line = _record if path.suffix in RECORDS else lambda where, line: Entry(where, line, None)
    found = [of_line(where, line) for where, line in lines if line.strip()]
    if not found:
        raise UserError(f"{flag}={path}: holds no prompt: each line is one, in {' and '.join(RECORDS)} a record")
    return found


def _record(where: str, line: str) -> Entry:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise UserError(f"{where}: must be a record with prompt or messages, one of both")
    if "messages" in record:
        check_messages(record["messages"], f"{where}: messages")
        return Entry(where, None, record["messages"])
    if not isinstance(record["prompt"], str):
        raise UserError(f"{where}: prompt={record['prompt']!r}: must be text")
    return Entry(where, record["prompt"], None)


def to_record(entry: Entry) -> dict[str, Any]:
    """The prompt as a file of records has it."""
    return {"prompt": entry.text} if entry.messages is None else {"messages": entry.messages}
