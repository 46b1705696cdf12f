"""The same with another noun between subject and verb, whose number says nothing (Linzen et al. 2016, 1611.01368)."""

import random
from collections.abc import Iterator

from frugalmoe.evaluate.contract import Square, Task
from frugalmoe.evaluate.suite.agreement import NOUNS, PREDICATES

BETWEEN = ("near the", "behind the", "that I saw with the", "on the left of the", "that belonged to the")


def squares(rng: random.Random) -> Iterator[Square]:
    while True:
        noun, other = rng.sample(NOUNS, 2)
        rest = f"{rng.choice(BETWEEN)} {other}{rng.choice(('', 's'))}"
        yield Square((f"The {noun} {rest}", f"The {noun}s {rest}"), rng.choice(PREDICATES))


TASK = Task(about="the same, with another noun between them", choices=2, squares=squares)
