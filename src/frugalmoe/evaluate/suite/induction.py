"""After a word that came before, the word that came after it then (Olsson et al. 2022, 2209.11895)."""

import random
from collections.abc import Iterator

from frugalmoe.evaluate.contract import Square, Task

LENGTH = 8


def words(rng: random.Random, count: int) -> list[str]:
    """Different words that no text has: consonant, vowel, consonant."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") + rng.choice("bdfgklmnprstvz")] = None
    return list(found)


def squares(rng: random.Random) -> Iterator[Square]:
    while True:
        made = words(rng, LENGTH)
        at = sorted(rng.sample(range(LENGTH - 1), 4))
        contexts = tuple(" ".join([*made, made[i]]) for i in at)
        yield Square(contexts, tuple(f" {made[i + 1]}" for i in at))


TASK = Task(about="the word that followed the same made-up word before", choices=4, squares=squares)
