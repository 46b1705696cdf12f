"""What a task of the suite is: contexts and what may follow them, where each choice is right once."""

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Square(NamedTuple):
    """n contexts, and n choices that are the same for each of them: choice i is the right one for context i alone.

    So whoever looks at the choices alone, at their length or at how frequent they are, is right in exactly 1/n.
    """

    contexts: tuple[str, ...]
    choices: tuple[str, ...]  # each begins with a space, none is the beginning of another


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One question to a model. A file of `suite/` ends with `TASK = Task(...)`."""

    about: str  # one line
    choices: int  # of each item: chance is 1 over this
    squares: Callable[[random.Random], Iterator[Square]]  # endless; the same again may come
    name: str = ""  # the file's
