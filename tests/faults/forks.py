"""A process that has imported all that a run needs and makes commands of itself: each is a real process of its own,
that may be killed at any moment, and needs no seconds to begin.

On stdin it reads lines of JSON: [argv, file for what the command says]; it answers with the number of the process, and
with a line [number, how it ended] once it has, as of `os.waitstatus_to_exitcode`.
"""

import ctypes
import json
import os
import signal
import sys
import threading

import matplotlib

matplotlib.use("Agg")

import frugalmoe.analysis  # what a command imports as it goes
import frugalmoe.commands.data
import frugalmoe.commands.train
import frugalmoe.generate
import frugalmoe.train.loop
import frugalmoe.train.preflight
import frugalmoe.train.profile  # noqa: F401
from frugalmoe.cli import main


def end_with_parent() -> None:
    """Has the kernel kill this process when the one that made it ends, as a test that was itself killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run(argv: list[str], said: str) -> None:
    end_with_parent()
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = ["frugalmoe", *argv]
    code = 1
    try:
        code = main(argv)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    for line in sys.stdin:
        argv, said = json.loads(line)
        if not (number := os.fork()):
            run(argv, said)
        print(json.dumps(number), flush=True)
        # A thread would be copied by the next fork in whatever state it is: there is one command at a time.
        _, status = os.waitpid(number, 0)
        print(json.dumps([number, os.waitstatus_to_exitcode(status)]), flush=True)


if __name__ == "__main__":
    assert threading.active_count() == 1, threading.enumerate()
    end_with_parent()
    serve()
