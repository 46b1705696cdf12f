"""The one exception that a user can cause. The command line prints its message on one line and exits with code 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message names the field, the value, the rule and the valid choices, on one line."""


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """The tail of an 'unknown name' message: the nearest valid name if there is one, then all valid names."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"valid: {', '.join(valid) or 'none'}"
