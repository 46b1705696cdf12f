"""The reflexive agrees with its subject in gender or number: "The queen saw" " herself in the mirror."."""

import random
from collections.abc import Iterator

from frugalmoe.evaluate.contract import Square, Task

HE = ("king", "boy", "man", "father", "brother", "uncle", "husband", "prince")
SHE = ("queen", "girl", "woman", "mother", "sister", "aunt", "wife", "princess")
MANY = ("kings", "boys", "men", "fathers", "brothers", "uncles", "husbands", "princes")
SUBJECTS = {"himself": HE, "herself": SHE, "themselves": MANY}
VERBS = ("saw", "hurt", "asked", "believed", "washed", "will help", "could not see", "did not know", "wrote to")
BETWEEN = ("", " with the dog", " behind the houses", " who came late", " in the old pictures")
AFTER = ("in the end", "that day", "again", "for the first time")


def squares(rng: random.Random) -> Iterator[Square]:
    while True:
        pronouns = rng.choice((("himself", "herself"), ("himself", "themselves"), ("herself", "themselves")))
        middle, after = f"{rng.choice(BETWEEN)} {rng.choice(VERBS)}", rng.choice(AFTER)
        contexts = tuple(f"The {rng.choice(SUBJECTS[pronoun])}{middle}" for pronoun in pronouns)
        yield Square(contexts, tuple(f" {pronoun} {after}." for pronoun in pronouns))


TASK = Task(about="reflexive pronoun of the subject's gender or number", choices=2, squares=squares)
