"""Jinja's sandbox with what chat templates of published models count on, and with bounds that a stranger's one keeps.

This module is imported where a template is read: Jinja is an extra.
"""

import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jinja2
import jinja2.ext
import jinja2.visitor
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

STEPS = 1_000_000  # of loops and macros, in one conversation: of real templates a few for each message
SECONDS = 60  # of computing, in one conversation
LARGEST = 50_000_000  # characters of a text, or of what one operation makes
_PER_BIT = 100  # characters that take about the time of a bit of a large number


def check_size(size: int) -> None:
    """Stops a template that makes more than memory should hold."""
    if size > LARGEST:
        raise OverflowError(f"makes a text of more than {LARGEST:,} characters at one go")


_BY_SQUARES = ("striptags", "urlize", "wordwrap", "pprint")  # filters whose time may grow with the text's square


def _is_number(value: Any) -> bool:
    return isinstance(value, int)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _size_of_call(name: str, values: Sequence[Any]) -> int:
    """About how many characters or items a filter, or a method of a text, makes at most of it and of other values."""
    own, others = (values[0], values[1:]) if values else ("", ())
    widest, texts = max([0, *filter(_is_number, others)]), [value for value in others if isinstance(value, str)]
    match name:
        case "replace" if isinstance(own, str) and texts:
            return len(own) + max(map(own.count, texts)) * max(map(len, texts))
        case "join":
            parts = [part for value in values if isinstance(value, list | tuple) for part in value]
            between = max([0, *(len(value) for value in values if isinstance(value, str))])
            return sum(map(_length, parts)) + len(parts) * between
        case "sum" if any(isinstance(value, list | tuple) for value in others):
            return _length(own) * sum(map(_length, own))
        case "expandtabs" | "indent":
            return _length(own) * (1 + widest)
        case "format" | "format_map":
            return max(_size_of("%", own, tuple(others)), widest)
        case _ if name in _BY_SQUARES:
            return max(widest, _length(own) ** 2 // 1000)
    return max(widest, sum(map(_length, values)))


def _size_of(operator: str, left: Any, right: Any) -> int:
    """About how many characters or items an operation makes at most."""
    match operator:
        case "*" if isinstance(left, int) and isinstance(right, int):
            return _PER_BIT * (left.bit_length() + right.bit_length())
        case "*" if isinstance(left, int) or isinstance(right, int):
            sizes = [(_length(a), b) for a, b in ((left, right), (right, left)) if isinstance(b, int)]
            return max(size * max(count, 0) for size, count in sizes)
        case "+":
            return _length(left) + _length(right)
        case "%" if isinstance(left, str):
            given = right if isinstance(right, tuple) else (right,)
            return max([*map(int, re.findall(r"\d{1,20}", left)), *filter(_is_number, given), 0])
        case "**" if isinstance(left, int) and isinstance(right, int):
            return _PER_BIT * left.bit_length() * max(right, 0)
    return 0


class Concatenations(jinja2.visitor.NodeTransformer):
    """Makes of each `a ~ b` a call that knows how long the text gets."""

    def visit_Concat(self, node: Any) -> Any:
        node = self.generic_visit(node)
        call = nodes.Call(nodes.EnvironmentAttribute("concatenate"), node.nodes, [], None, None)
        return call.set_lineno(node.lineno).set_environment(node.environment)


class Environment(ImmutableSandboxedEnvironment):
    """With bounds on loops and macros, and on the text that an operation makes at one go."""

    intercepted_binops = frozenset(("*", "+", "**", "%"))
    steps = 0
    ends = float("inf")  # of computing, by the clock of `time.thread_time`

    def _parse(self, *args: Any) -> Any:
        """Each turn of a loop and each call of a macro is counted."""
        program = super()._parse(*args)
        program = Concatenations().visit(program)
        for node in program.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            count = nodes.Call(nodes.EnvironmentAttribute("count_step"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(count).set_lineno(node.lineno).set_environment(self))
        return program

    def concatenate(self, *values: Any) -> str:
        texts = list(map(str, values))
        check_size(sum(map(len, texts)))
        return "".join(texts)

    def count_step(self, steps: int = 1) -> None:
        self.steps += steps
        if self.steps > STEPS:
            raise OverflowError(f"makes more than {STEPS:,} steps; it may never end")
        if time.thread_time() > self.ends:
            raise OverflowError(f"makes a text for more than {SECONDS} seconds; it may never end")

    def count_size(self, size: int) -> None:
        """Large ones take many steps' time."""
        check_size(size)
        self.count_step(size // 1000)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.count_size(_size_of(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, *args: Any, **fields: Any) -> Any:
        method = getattr(called, "__wrapped__", called)  # the sandbox's own `format` stands for that of texts
        own, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        values = (*([own] if isinstance(own, str) else []), *args, *fields.values())
        self.count_size(_size_of_call(name if isinstance(own, str) else "", values))
        return super().call(context, called, *args, **fields)

    def bounded(self, name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that counts what it makes."""

        @functools.wraps(change)
        def counted(*args: Any, **fields: Any) -> Any:
            values = [value for value in (*args, *fields.values()) if isinstance(value, str | list | tuple | int)]
            self.count_size(_size_of_call(name, values))
            return change(*args, **fields)

        return counted


class Answers(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` is what the assistant says."""

    tags = frozenset({"generation"})

    def __init__(self, environment: Any):
        super().__init__(environment)
        self._pieces: list[str] = []
        self._spans: list[tuple[int, int]] = []
        environment.extend(frugalmoe_tracking=self.tracking)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_answer"), [], [], body).set_lineno(line)

    def _answer(self, caller: Callable[[], str]) -> str:
        text, begin = caller(), sum(map(len, self._pieces))
        self._spans.append((begin, begin + len(text)))
        return text

    @contextmanager
    def tracking(self, pieces: list[str], spans: list[tuple[int, int]]) -> Iterator[None]:
        self._pieces, self._spans, self.environment.steps = pieces, spans, 0
        self.environment.ends = time.thread_time() + SECONDS
        try:
            yield
        finally:
            self._pieces, self._spans = [], []


class Namespace(jinja2.utils.Namespace):
    """Without names that begin with an underscore, which lead into the interpreter."""

    def __init__(self, /, *args: Any, **fields: Any):
        given = dict(*args, **fields)
        list(map(_public, given))
        super().__init__(given)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(_public(name), value)


def _public(name: str) -> str:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the name {name!r}")
    return name


class Dict:
    """Makes dicts; the class itself leads into the interpreter."""

    def __call__(self, *args: Any, **fields: Any) -> dict:
        return dict(*args, **fields)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


def raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> Any:
    """Returns a new environment, in which templates are compiled."""
    made = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Answers, jinja2.ext.loopcontrols])
    del made.globals["lipsum"]
    made.filters["tojson"] = tojson
    made.filters = {name: made.bounded(name, change) for name, change in made.filters.items()}
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "namespace": Namespace,
        "dict": Dict(),
    }
    return made
