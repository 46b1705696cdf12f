"""Conversations as text: the chat template of a tokenizer, and which of its text a model has to answer.

A template is a program in Jinja that a published model brings along. It runs in Jinja's sandbox, sees plain data
alone and can change nothing, as in `transformers` (`utils/chat_template_utils.py`), whose text ours equals. Beyond that
it comes to an end: its loops and calls have a number of steps, and what it makes at one go a size.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from frugalmoe.data.end_of_text import read_object
from frugalmoe.errors import UserError, needs_package

REQUIREMENT = "jinja2>=3.1.6"  # earlier sandboxes can be left
FILE, CONFIG, MAP = "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


Message = Mapping[str, Any]  # `role` and `content`, texts; a template may know more


class Rendered(NamedTuple):
    """The text of a conversation."""

    text: str  # with the tokens that stand between messages: `Tokenizer.encode_chat` knows them
    answers: tuple[tuple[int, int], ...]  # characters begin .. end - 1 of what `{% generation %}` encloses, in order


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How a tokenizer writes conversations."""

    source: str
    tokens: Mapping[str, str]  # those of `TOKENS` that the tokenizer has, by which a template calls them
    where: str  # for messages

    @property
    def marks_answers(self) -> bool:
        """Whether the template says which text is the assistant's."""
        return "generation" in _tags(self.source, self.where)

    def render(self, messages: Sequence[Message], *, answer: bool = False) -> Rendered:
        """Returns the text of a conversation; with `answer`, up to where the assistant's next message begins.

        Raises `UserError` for messages that are none, or that the template refuses, and for a template that fails.
        """
        check_messages(messages, "messages")
        try:
            plain = [{k: _plain(v) for k, v in message.items() if v is not None} for message in messages]
        except RecursionError:
            raise UserError("messages: hold lists and records in more levels than can be followed") from None
        template, spans, pieces = _compiled(self.source, self.where), [], []
        values = {"tools": None, "documents": None, **self.tokens}
        from frugalmoe.data.templates import check_size  # which needs Jinja: it is there, for the template is compiled

        try:
            with template.environment.frugalmoe_tracking(pieces, spans):
                size = 0
                for piece in template.generate(messages=plain, add_generation_prompt=answer, **values):
                    pieces.append(piece)
                    check_size(size := size + len(piece))
        except Exception as error:  # the program is a stranger's: it may raise anything
            raise UserError(f"{self.where}: the chat template: {type(error).__name__}: {error}") from error
        text = "".join(pieces)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            rule = f"character {error.start} of its text is half of a character"
            raise UserError(f"{self.where}: the chat template: {rule}") from error
        return Rendered(text, tuple(spans))


def find(directory: Path) -> ChatTemplate | None:
    """Returns the template of a tokenizer's directory, None where it has none.

    It is `chat_template.jinja`, else `chat_template` in `tokenizer_config.json`: a text, or several with names, of
    which that called default counts.
    """
    config, file = _object(directory / CONFIG), directory / FILE
    if file.is_file():
        try:
            return ChatTemplate(file.read_bytes().decode("utf-8-sig"), _tokens(directory, config), str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read as text ({error})") from error
    found, where = config.get("chat_template"), f"{directory / CONFIG}: chat_template"
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, Mapping)}
        if "default" not in named:
            raise UserError(f"{where}: has none that is named default; it has {', '.join(map(repr, named)) or 'none'}")
        found = named["default"]
    if found is None:
        return None
    if not isinstance(found, str):
        raise UserError(f"{where}: must be text, or a list of records with name and template")
    return ChatTemplate(found, _tokens(directory, config), where)


def check_messages(messages: Any, where: str) -> None:
    """Raises `UserError` for what is no conversation: one message or more, each with a role and a content in text."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"{where}: must be a list of one message or more, each with role and content")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"{where}[{number}]: must be a record with role and content, not {message!r}")
        for name in ("role", "content"):
            text = message.get(name)
            if not isinstance(text, str):
                rule = "must be text" if name in message else "is missing"
                raise UserError(f"{where}[{number}].{name}: {rule}{f', not {text!r}' if name in message else ''}")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"{where}[{number}].{name}: character {error.start} is half of a character") from None


def _object(path: Path) -> Mapping[str, Any]:
    return read_object(path) if path.is_file() else {}


def _tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens that the files beside a vocabulary state, as text or as records with `content`."""
    text = lambda token: token.get("content") if isinstance(token, Mapping) else token
    files = (config, _object(directory / MAP))
    named = {name: [text(file.get(name)) for file in files] for name in TOKENS}
    first = {name: next((token for token in tokens if isinstance(token, str)), None) for name, tokens in named.items()}
    return {name: token for name, token in first.items() if token is not None}


def _plain(value: Any) -> Any:
    """A copy of plain data. Anything else has methods that a stranger's program should not get hold of."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return f"<{type(value).__name__}>"


def _tags(source: str, where: str) -> set[str]:
    """The names with which the blocks of a template begin."""
    environment = _compiled(source, where).environment
    kinds = [(kind, value) for _, kind, value in environment.lex(source) if kind != "whitespace"]
    return {value for (before, _), (_, value) in itertools.pairwise(kinds) if before == "block_begin"}


@functools.lru_cache(8)
def _compiled(source: str, where: str) -> Any:
    """The template as a program. Raises `UserError` where it is none, or Jinja is not there."""
    try:
        import jinja2

        from frugalmoe.data.templates import environment
    except ImportError:
        raise needs_package(f"{where}: to read a chat template", REQUIREMENT) from None
    if tuple(int(part) for part in jinja2.__version__.split(".")[:3]) < (3, 1, 6):
        raise needs_package(f"{where}: to read a chat template", REQUIREMENT)
    try:
        return environment().from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: the chat template: line {getattr(error, 'lineno', '?')}: {error.message}") from error
    except (RecursionError, MemoryError, ValueError, SyntaxError) as error:  # nested too deep for Jinja, or for Python
        raise UserError(f"{where}: the chat template: {type(error).__name__}: {error}") from error
