"""Who is alive, told by signs that change."""

from collections.abc import Callable
from typing import Any


class Watch:
    """Signs of life, by the clock of who watches: times of different machines are never compared."""

    def __init__(self, clock: Callable[[], float], lapse: float) -> None:
        self._clock, self._lapse = clock, lapse
        self._seen: dict[str, tuple[Any, float, bool]] = {}  # sign, when it was new, whether it has ever changed

    def look(self, name: str, sign: Any) -> None:
        """Sees what an island shows now."""
        known = self._seen.get(name)
        if known is None:
            self._seen[name] = sign, self._clock(), False
        elif known[0] != sign:
            self._seen[name] = sign, self._clock(), True

    def lapsed(self, name: str) -> bool:
        """Whether its sign has been the same for `lapse` seconds."""
        return name in self._seen and self._clock() - self._seen[name][1] >= self._lapse

    def moves(self, name: str) -> bool:
        """Whether its sign has been seen to change, and not too long ago."""
        return name in self._seen and self._seen[name][2] and not self.lapsed(name)
