"""The connection of a process to process 0, whose coordination service the others of a run need.

When process 0 is killed JAX's client ends the others at once, with a page of C++. So it is given an address in its own
process, from which what it says is carried on, and does not hear that the connection broke: this file does, and ends
the process with a line. It is the same whether flags or a scheduler tell where process 0 is. Only what processes say to
agree goes this way, some kilobytes at a start and a few bytes a second; arrays do not.
"""

import atexit
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from frugalmoe.errors import EXIT_PEER_LOST
from frugalmoe.interrupts import may_speak
from frugalmoe.train import watch

_CONNECT = 10.0  # seconds that a connection to process 0 may take
_DYING = 5.0  # seconds in which a process that has lost its connections has gone
_LEAVE = 30.0  # seconds for whoever says why the process ends to end it
_held = threading.Event()  # while process 0 is needed


def through_here(coordinator: str) -> str:
    """Returns an address of this process from which all is carried to the coordinator's, HOST:PORT, and back."""
    host, _, port = coordinator.rpartition(":")
    server = socket.create_server(("127.0.0.1", 0))
    _begin(_serve, server, (host.strip("[]"), int(port)))
    return f"127.0.0.1:{server.getsockname()[1]}"


def hold() -> None:
    """Says that the processes have met: from here on this one ends if process 0 does, until it ends by itself. Then
    JAX lets the processes go together, and none sees which of them is the first.
    """
    _held.set()
    atexit.register(_held.clear)  # before what JAX has registered


def _serve(server: socket.socket, there: tuple[str, int]) -> None:
    while True:
        near, _ = server.accept()
        try:
            far = socket.create_connection(there, _CONNECT)
        except OSError:  # whoever asked asks again
            near.close()
            continue
        far.settimeout(None)
        for ours in (near, far):
            ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _begin(_carry, near, far)
        _begin(_carry_back, far, near, there)


def _carry(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


def _carry_back(source: socket.socket, sink: socket.socket, there: tuple[str, int]) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            sink.sendall(data)
    if _held.is_set() and _is_gone(there) and _held.is_set() and jax.distributed.is_initialized():
        _end()
    for ours in (source, sink):
        ours.close()


def _is_gone(there: tuple[str, int]) -> bool:
    """Whether nobody listens there any more. A process that was killed may lose its connections before its port."""
    until = time.monotonic() + _DYING
    while time.monotonic() < until:
        try:
            socket.create_connection(there, _CONNECT).close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:  # it goes just now
            pass
        except OSError:  # no way to the host: `train.watch` says so in time
            return False
        time.sleep(0.1)
    return False


def _end() -> None:
    if not may_speak():  # another thread has said why the process ends, and ends it
        threading.Event().wait(_LEAVE)
    rule = "the same command in all processes goes on from the last checkpoint"
    with contextlib.suppress(OSError):
        os.write(2, f"frugalmoe: another process has ended: process 0, and with it the run; {rule}\n".encode())
    watch.leave(EXIT_PEER_LOST)


def _begin(act: Callable[..., None], *given: Any) -> None:
    threading.Thread(target=act, args=given, name="link", daemon=True).start()
