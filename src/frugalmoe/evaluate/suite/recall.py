"""Looking up in the context: who has what was said before (Arora et al. 2023, Zoology, 2312.04927, in words)."""

import random
from collections.abc import Iterator

from frugalmoe.evaluate.contract import Square, Task

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo")
THINGS = ("coin", "key", "book", "ring", "hat", "knife", "lamp", "map", "cup", "rope", "bell", "pen", "box", "drum")


def squares(rng: random.Random) -> Iterator[Square]:
    while True:
        names, things = rng.sample(NAMES, 4), rng.sample(THINGS, 4)
        said = " ".join(f"{name} has a {thing}." for name, thing in zip(names, things))
        yield Square(tuple(f"{said} {name} has a" for name in names), tuple(f" {thing}." for thing in things))


TASK = Task(about="what a name was said to have, of four in the context", choices=4, squares=squares)
