"""The verb has the number of the subject, which stands right before it: "The keys" " are old."."""

import random
from collections.abc import Iterator

from frugalmoe.evaluate.contract import Square, Task

NOUNS = (
    *("king", "queen", "boy", "girl", "friend", "teacher", "doctor", "farmer", "horse", "dog", "bird", "river"),
    *("tree", "house", "ship", "road", "book", "letter", "picture", "machine", "number", "window", "door", "key"),
)
PREDICATES = (
    *((f" is {rest}.", f" are {rest}.") for rest in ("old", "here", "very small", "not the same")),
    *((f" was {rest}.", f" were {rest}.") for rest in ("new", "there", "quite large", "never seen again")),
    *((f" has {rest}.", f" have {rest}.") for rest in ("a name", "been found", "no end", "come back")),
    *((f" does {rest}.", f" do {rest}.") for rest in ("not move", "what we want")),
)


def squares(rng: random.Random) -> Iterator[Square]:
    while True:
        before, noun = rng.choice(("The", "Today the", "I know that the")), rng.choice(NOUNS)
        yield Square((f"{before} {noun}", f"{before} {noun}s"), rng.choice(PREDICATES))


TASK = Task(about="verb of the subject's number, right behind it", choices=2, squares=squares)
