"""What kind of thing a word names: "A sparrow is a kind of" " bird.". The words were chosen here."""

import random
from collections.abc import Iterator

from frugalmoe.evaluate.contract import Square, Task

KINDS = {
    "bird": ("sparrow", "robin", "crow", "pigeon", "swan", "falcon", "parrot", "gull"),
    "fish": ("salmon", "trout", "cod", "carp", "herring", "shark", "tuna", "pike"),
    "tree": ("birch", "pine", "willow", "maple", "beech", "cedar", "poplar", "spruce"),
    "fruit": ("banana", "pear", "cherry", "plum", "lemon", "peach", "grape", "melon"),
    "tool": ("hammer", "saw", "chisel", "wrench", "spade", "drill", "pair of pliers", "screwdriver"),
    "metal": ("piece of iron", "piece of copper", "piece of zinc", "piece of lead", "piece of tin", "bar of silver"),
    "vehicle": ("car", "bus", "lorry", "bicycle", "tram", "van", "tractor", "motorcycle"),
    "garment": ("shirt", "coat", "skirt", "jacket", "scarf", "blouse", "sweater", "pair of trousers"),
    "instrument": ("violin", "flute", "piano", "trumpet", "drum", "guitar", "harp", "cello"),
    "illness": ("fever", "flu", "case of measles", "cold", "case of cholera", "case of malaria"),
}


def squares(rng: random.Random) -> Iterator[Square]:
    while True:
        kinds = rng.sample(sorted(KINDS), 4)
        contexts = tuple(f"A {rng.choice(KINDS[kind])} is a kind of" for kind in kinds)
        yield Square(contexts, tuple(f" {kind}." for kind in kinds))


TASK = Task(about="the kind of thing that a word names", choices=4, squares=squares)
