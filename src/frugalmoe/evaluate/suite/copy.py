"""A list of made-up words again, in its own order and in no other."""

import random
from collections.abc import Iterator

from frugalmoe.evaluate.contract import Square, Task
from frugalmoe.evaluate.suite.induction import words


def squares(rng: random.Random) -> Iterator[Square]:
    while True:
        made, orders = words(rng, 4), {}
        while len(orders) < 4:
            orders[" ".join(rng.sample(made, len(made)))] = None
        yield Square(tuple(f"{order} ;" for order in orders), tuple(f" {order} ;" for order in orders))


TASK = Task(about="the same made-up words in the same order", choices=4, squares=squares)
