"""The one exception that a user can cause. The command line prints its message on one line and exits with code 2."""

import difflib
import errno
import os
import shlex
from collections.abc import Iterable

EXIT_PEER_LOST = 1  # another process of the run has ended
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # by Ctrl-C, before anything was saved
EXIT_READER_GONE = 141  # whoever read the output, as `head` in a pipe, has ended
EXIT_HARDWARE = 74  # a device computed or kept something wrong; the same command goes on from its last checkpoint
EXIT_PREEMPTED = 75  # a signal stopped a run after it saved; the same command continues it (EX_TEMPFAIL of sysexits.h)
EXIT_STUCK = 70  # a run that no longer moved has ended itself; the same command goes on from its last checkpoint
_OF_THE_DISK = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EFBIG)
_IN_TENSORSTORE = {"RESOURCE_EXHAUSTED": errno.ENOSPC, "PERMISSION_DENIED": errno.EACCES}  # in its messages


LONGEST_MESSAGE = 1000  # characters


class UserError(ValueError):
    """Bad input: the message names the field, the value, the rule and the valid choices, on one line.

    Values that users give go into messages as they are: here line ends and other control characters, which a terminal
    would obey, are escaped, and the middle of what is longer than LONGEST_MESSAGE is left out.
    """

    def __init__(self, message: str):
        super().__init__(_shortened(printable(message)))


class HardwareError(RuntimeError):
    """A device has computed or kept something wrong: the message names it, on one line."""


def exit_code(error: BaseException) -> int:
    """Returns the exit code of a process that ends with an error which `one_line` tells."""
    return EXIT_HARDWARE if isinstance(error, HardwareError) else EXIT_USER_ERROR


def printable(text: str) -> str:
    """`text` on one line: pieces of several lines joined by a space, what cannot be printed as an escape."""
    joined = " ".join(line.strip() for line in text.splitlines() if line.strip()) if "\n" in text else text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in joined)


def _shortened(text: str) -> str:
    """The name of a field is at the beginning and the rule often at the end, so the middle goes."""
    half = LONGEST_MESSAGE // 2
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:half]} [...] {text[-half + 7 :]}"


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """The tail of an 'unknown name' message: the nearest valid name if there is one, then all valid names."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"valid: {', '.join(valid) or 'none'}"


def needs_package(what: str, *requirements: str) -> UserError:
    """What to raise where `what` needs an optional package: names a command that installs it in any environment."""
    return UserError(f"{what}: needs a package that is not installed: pip install {shlex.join(requirements)}")


def one_line(error: BaseException) -> str:
    """What to tell a user who can do something about an error; empty for one that only a traceback explains."""
    if isinstance(error, UserError | HardwareError):
        return str(error)
    if isinstance(error, OSError) and of_disk(error):
        return str(UserError(f"{error.filename or 'write'}: {error.strerror}"))
    if why := of_disk(error):
        return f"checkpoint: {why}; the last whole one is kept"
    return ""


def of_disk(error: BaseException) -> str:
    """What is wrong with the disk, as a full one, where an error of a write says so; "" for another error."""
    if isinstance(error, OSError):
        return (error.strerror or "") if error.errno in _OF_THE_DISK else ""
    if isinstance(error, RuntimeError) and os.strerror(errno.ENOSPC) in str(error):  # of ArrayRecord
        return os.strerror(errno.ENOSPC)
    names = [name for name in _IN_TENSORSTORE if isinstance(error, ValueError) and name in str(error)]
    return os.strerror(_IN_TENSORSTORE[names[0]]) if names else ""
