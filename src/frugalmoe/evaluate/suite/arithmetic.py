"""Sums and differences of small numbers, behind two that are worked out."""

import random
from collections.abc import Iterator

from frugalmoe.evaluate.contract import Square, Task


def _problem(rng: random.Random) -> tuple[str, int]:
    a, b = rng.randrange(1, 50), rng.randrange(1, 50)
    return (f"{a} + {b} =", a + b) if rng.random() < 0.5 else (f"{a + b} - {b} =", a)


def squares(rng: random.Random) -> Iterator[Square]:
    """Results of a square have two digits, so that all choices are of one length."""
    while True:
        shown = " ".join(f"{problem} {result}." for problem, result in (_problem(rng), _problem(rng)))
        found: dict[int, str] = {}
        while len(found) < 4:
            problem, result = _problem(rng)
            if result >= 10:
                found.setdefault(result, problem)
        yield Square(tuple(f"{shown} {problem}" for problem in found.values()), tuple(f" {r}." for r in found))


TASK = Task(about="sums and differences with results from 10 to 98", choices=4, squares=squares)
