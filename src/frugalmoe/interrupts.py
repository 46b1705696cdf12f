"""How a command ends when SIGINT (Ctrl-C) or SIGTERM asks it to, or nobody reads what it says."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

from frugalmoe.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED

_speaking = threading.Lock()  # held by the one who says why the process ends


@contextlib.contextmanager
def at_once(resumable: bool) -> Iterator[None]:
    """While the block runs, SIGINT ends the process at once with one line, and so does SIGTERM where `resumable`.

    A program that has something to save puts handlers of its own in place of these: then the first signal is theirs,
    and the second one ends the process. A thread watches, since Python runs handlers between two steps of its own and a
    compilation is one step of minutes. Outside of the main thread, which gets the signals, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    numbers = (signal.SIGINT, signal.SIGTERM) if resumable else (signal.SIGINT,)
    previous = {number: signal.signal(number, _leave_it_to_the_watch) for number in numbers}
    previous_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, resumable), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_writer)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(writer)  # the watch ends


def silence(stream: TextIO) -> None:
    """Points a stream at nothing, so that no later write, and not Python's last flush, meets a closed pipe."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def may_speak() -> bool:
    """Whether the caller is the first who ends the process because of a signal."""
    return _speaking.acquire(blocking=False)


def is_watched(handler: object) -> bool:
    """Whether the handler that one of the program's own has replaced leaves signals to the watch of `at_once`."""
    return handler is _leave_it_to_the_watch


def _leave_it_to_the_watch(number, frame) -> None:
    pass


def _watch(reader: int, resumable: bool) -> None:
    """Reads the numbers of signals as the C handler of Python writes them."""
    saving = False
    while received := os.read(reader, 1):
        number = received[0]
        if number not in (signal.SIGINT, signal.SIGTERM):
            continue
        if saving:
            _end("interrupted again: ended without saving; the last checkpoint is kept", 128 + number)
        if is_watched(signal.getsignal(number)):
            goes_on = "; there was nothing to save, and the same command goes on" if resumable else ""
            _end(f"interrupted{goes_on}", EXIT_PREEMPTED if number == signal.SIGTERM else EXIT_INTERRUPTED)
        saving = True
    os.close(reader)


def _end(line: str, code: int) -> None:
    """Ends the process without waiting for what it is doing."""
    if not may_speak():
        return
    flush = threading.Thread(target=lambda: (sys.stdout.flush(), sys.stderr.flush()), daemon=True)
    flush.start()
    flush.join(1)  # the main thread may hold a stream that nobody reads
    for terminal in (stream for stream in (1, 2) if os.isatty(stream)):
        os.write(terminal, b"\x1b[?25h\n")  # a progress bar hides the cursor
        break
    with contextlib.suppress(OSError):
        os.write(2, f"frugalmoe: {line}\n".encode())
    os._exit(code)
