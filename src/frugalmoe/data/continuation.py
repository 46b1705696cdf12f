"""The text that new tokens add to a prompt, piece by piece.

A token has no text of its own: decoders strip the space of the first one, join bytes to characters and may change what
came before. So new tokens are decoded behind earlier ones, and a text is given out once it stands while others follow.
"""

from collections import deque
from collections.abc import Iterator, Sequence

from frugalmoe.data.tokenizer import Tokenizer

_STANDS = 4  # a text stands once so many later tokens have not changed it
_BYTES = 4  # of the longest character of UTF-8: in fewer tokens U+FFFD may be the beginning of a character
_WINDOW = 32  # tokens that are decoded together: at least so many, at most about twice as many


class Continuation:
    """The text that follows a prompt, piece by piece. Joined, the pieces are the text of all tokens without that of the
    prompt.

    Each token costs the decoding of a window of tokens, however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]):
        self._decode = tokenizer.decode
        self._ids = [int(i) for i in prompt_ids]
        self._text = self._decode(self._ids)
        self._given = len(self._text)  # characters of the window's text that are the prompt's, or a piece
        self._new: list[int] | None = []  # the tokens so far, until there is a piece
        self._same: deque[int] = deque(maxlen=_STANDS)  # characters that each of the last tokens left as they were
        self._waits = self._enough = 0
        self._forget()
        self._prompt = self._text

    def add(self, token: int) -> str:
        """Takes the next token; returns the text that stands now and did not before."""
        self._ids.append(token)
        if self._new is not None:
            self._new.append(token)
        text = self._decode(self._ids)
        self._waits = self._waits + 1 if text.endswith("\ufffd") else 0
        if 0 < self._waits < _BYTES:
            return ""
        self._same.append(_common(self._text, text))
        self._text = text
        return self._give(min(self._same)) if len(self._same) == _STANDS else ""

    def rest(self) -> str:
        """Returns the text that is left when no token follows."""
        self._text = self._decode(self._ids)
        return self._give(len(self._text))

    def _give(self, end: int) -> str:
        start = self._given if self._new is None else self._border(self._new)
        if end <= start:
            return ""
        piece = self._text[start:end]
        self._given, self._new = end, None
        if len(self._ids) >= self._enough:
            self._forget()
        return piece

    def _border(self, new: list[int]) -> int:
        """Returns where the prompt's text ends. If new tokens changed it, what they say alone comes after it."""
        same = _common(self._prompt, self._text)
        return same if same == len(self._prompt) else max(same, len(self._text) - len(self._decode(new)))

    def _forget(self) -> None:
        """Drops tokens from the window whose text was given out.

        The text of a shorter window may begin differently, without a space or with a part of a character. Its second
        half must be as before.
        """
        sizes = (size + more for size in _doubled(_WINDOW, len(self._ids)) for more in range(_BYTES))
        for size in sizes:
            text = self._decode(self._ids[-size:])
            half, cut = len(text) // 2, len(self._text) - len(text)
            if self._given - cut >= half and self._text.endswith(text[half:]):
                self._ids, self._text, self._given = self._ids[-size:], text, self._given - cut
                self._same = deque((n - cut for n in self._same), _STANDS)
                break
        self._enough = 2 * max(len(self._ids), _WINDOW)


def _common(a: str, b: str) -> int:
    """Returns how many characters two texts have in common at their beginning."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _doubled(first: int, end: int) -> Iterator[int]:
    while first < end:
        yield first
        first *= 2


class Until:
    """Gives out a text up to the stop text that ends first; how the text is cut into pieces makes no difference.

    A stop text may begin in the prompt, which is no part of the result. What may turn out to begin one is held back.
    """

    def __init__(self, stops: Sequence[str], prompt: str = ""):
        self.ended = False  # whether a stop text was found
        self._stops, self._most = stops, max(map(len, stops), default=1) - 1  # characters that may begin a stop text
        self._seen, self._held = prompt[max(len(prompt) - self._most, 0) :], ""

    def add(self, piece: str) -> str:
        """Takes more text; returns what is no part of a stop text, whatever follows."""
        if self.ended:
            return ""
        self._held += piece
        seen, text = self._seen, self._seen + self._held
        places = ((stop, text.find(stop, max(len(seen) + 1 - len(stop), 0))) for stop in self._stops)
        if ends := [(at + len(stop), at) for stop, at in places if at >= 0]:
            self.ended = True
            return self._held[: max(min(ends)[1] - len(seen), 0)]
        begun = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        ready = max(len(self._held) - max(begun, default=0), 0)
        given, self._held = self._held[:ready], self._held[ready:]
        seen = text[: len(seen) + ready]
        self._seen = seen[max(len(seen) - self._most, 0) :]
        return given

    def rest(self) -> str:
        """Returns the text that is left when no more comes."""
        return "" if self.ended else self._held
