"""Runs laws on one strategy, executor or kind of attention and says in one line each whether they hold."""

import inspect
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.found import one_line_errors

Laws = Mapping[str, Callable[[Any], None]]


class Result(NamedTuple):
    """One law on all cases."""

    law: str
    meaning: str
    broken: dict[str, str]  # case -> what does not hold, in one line; empty: the law holds
    seconds: float


def routing_laws() -> Laws:
    from frugalmoe.laws.routing import LAWS

    return LAWS


def executor_laws() -> Laws:
    from frugalmoe.laws.executors import LAWS

    return LAWS


def attention_laws() -> Laws:
    from frugalmoe.laws.attention import LAWS

    return LAWS


def cases_of_router(spec: str) -> list[Any]:
    """The cases of a strategy: a shipped name, the path of a file, a dotted module.

    Raises `UserError` where it cannot be had, or its `check` raises or refuses all.
    """
    from frugalmoe.laws.cases import cases_of
    from frugalmoe.routing import strategies

    router = strategies.get(spec)
    with one_line_errors(f"model.moe.router={spec!r}", inspect.getsourcefile(router.route) or spec):
        return cases_of(router)


def cases_of_executor(spec: str) -> list[Any]:
    """The executor alone. Raises `UserError` where it cannot be had."""
    from frugalmoe.experts import executors

    return [executors.get(spec)]


def cases_of_attention(spec: str) -> list[Any]:
    """The cases of a kind of attention. Raises `UserError` where it cannot be had, or its `check` raises or refuses."""
    from frugalmoe.laws.attention import cases_of
    from frugalmoe.model.attention import kinds

    kind = kinds.get(spec)
    code = getattr(kind.check, "__code__", None)  # what no `def` or `lambda` made has none
    with one_line_errors(f"model.attention={spec!r}", code.co_filename if code else spec):
        return cases_of(kind)


def chosen(laws: Laws, names: Sequence[str]) -> Laws:
    """The laws of these names, or all where there are none. Raises `UserError` for a name of none."""
    for name in names:
        if name not in laws:
            raise UserError(f"--law={name}: no such law; {did_you_mean(name, laws)}")
    return {name: law for name, law in laws.items() if name in names or not names}


def run(laws: Laws, cases: Sequence[Any]) -> Iterator[Result]:
    """The result of each law, as it is known.

    Raises `UserError` where Python leaves assertions out (-O): no law could fail.
    """
    if not __debug__:
        raise UserError("PYTHONOPTIMIZE: laws are assertions, which Python leaves out with -O; run without it")
    for name, law in laws.items():
        start, broken = time.perf_counter(), {}
        for case in cases:
            try:
                law(case)
            except Exception as e:  # of a strategy that is being written, anything may come
                broken[_name(case)] = _one_line(e)
        yield Result(name, meaning(law), broken, time.perf_counter() - start)


def meaning(law: Callable[[Any], None]) -> str:
    """The first sentences of a law's docstring, on one line."""
    return " ".join(inspect.getdoc(law).partition("\n\n")[0].split())


def _name(case: Any) -> str:
    return getattr(case, "name", None) or str(case)


def _one_line(error: Exception) -> str:
    """What an assertion says, or else its text; of any other error its kind, text and place."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "site-packages" not in frame.filename]
    frame, text = (ours or frames)[-1], str(error).strip()
    if isinstance(error, AssertionError):
        return str(UserError(text or frame.line))
    return str(UserError(f"{type(error).__name__}: {text} ({frame.filename}, line {frame.lineno})"))
