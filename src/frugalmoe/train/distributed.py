"""One run in several processes: how they meet, agree, and end together.

Each process runs the same program on its own devices; a step is one computation over all of them. What happens outside
of steps is agreed on by `exchange`: no process may leave the others waiting.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from frugalmoe.errors import EXIT_PEER_LOST, EXIT_USER_ERROR, UserError, one_line
from frugalmoe.interrupts import is_watched, may_speak
from frugalmoe.train import link
from frugalmoe.train.gathering import check_flags
from frugalmoe.train.rundir import differences
from frugalmoe.train.supervise import AGAIN

# After these a process counts as dead, and JAX ends those that wait for it, with a page. `train.watch` is earlier, and
# says who.
_SECONDS_OF_SILENCE = 300
_SECONDS_TO_SPEAK = 2.0  # for the others to notice by themselves that one is gone, and to say so
_FLAGS = "--coordinator=HOST:PORT --num-processes=N --process-id=I"
_WHERE = ("coordinator_address", "num_processes", "process_id")  # as `jax.distributed.initialize` names them
_PERHAPS_A_POD = "TPU VM"
_ALONE = "--num-processes=1 trains in this process alone"


def start(coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int) -> None:
    """Meets the other processes that the flags, or else the environment, tell of; returns at once where none do.

    To be called before JAX has made a device. The process ends with exit code 2 if they do not meet in `timeout`
    seconds.
    """
    given = check_flags(coordinator, num_processes, process_id, timeout)
    told_by = f"--coordinator={coordinator}" if given else _told_by_environment()
    if num_processes == 1 or not told_by:
        return
    with _time_limit(timeout, f"{told_by}: the processes did not all meet within {timeout} s (--connect-timeout)"):
        try:
            limits = dict(initialization_timeout=timeout + 60, heartbeat_timeout_seconds=_SECONDS_OF_SILENCE)
            # With flags nothing is looked up: all devices that the process sees are its own.
            off = {"cluster_detection_method": "deactivate"} if given else {}
            where = dict(zip(_WHERE, given)) if given else _looked_up(timeout + 60)
            # A certificate would be of another host than this one.
            if where.get("process_id") and not getattr(jax.config, "jax_mtls_cert_file", None):
                where["coordinator_address"] = link.through_here(where["coordinator_address"])
            jax.distributed.initialize(**where, **off, **limits)
        except Exception as e:
            if told_by == _PERHAPS_A_POD:
                return
            rule = f"cannot join the other processes ({_first_line(e)}); give {_FLAGS}, or {_ALONE}"
            if _is_again():
                print(f"frugalmoe: {told_by}: {rule}", file=sys.stderr)
                _leave(EXIT_PEER_LOST)
            raise UserError(f"{told_by}: {rule}") from e
    link.hold()


def _is_again() -> bool:
    """Whether a supervisor starts a run again, in the processes that are there: others than those may meet next."""
    return AGAIN in os.environ


def _looked_up(timeout: int) -> dict[str, Any]:
    """What JAX finds in the environment of a scheduler; empty where its way to look is not the one known here.

    `jax.distributed` has no public way to ask before it connects. What is given to it, it does not look up again.
    """
    try:
        from jax._src.clusters import ClusterEnv

        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, timeout)
        where = dict(zip((*_WHERE, "local_device_ids"), found, strict=True))
    except (ImportError, AttributeError, TypeError, ValueError):
        return {}
    return {} if None in [where[name] for name in _WHERE] else where


def _told_by_environment() -> str:
    """Returns the variable that says that there are other processes; empty if none does.

    Only then is JAX asked who they are: it would take a single task of SLURM for a cluster too, hide all but one of its
    GPUs and open a port, and in any pod it would ask Kubernetes.
    """
    values = os.environ
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES"):
        if values.get(name, "1") not in ("", "0", "1"):
            return f"{name}={values[name]}"
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if "," in values.get(name, ""):
            return f"{name}={values[name]}"
    if "KUBERNETES_SERVICE_HOST" in values and "JOB_COMPLETION_INDEX" in values:
        return f"JOB_COMPLETION_INDEX={values['JOB_COMPLETION_INDEX']}"
    # Set by `import jax` where it finds TPU chips; only the metadata of a TPU VM tells whether it is a part of a pod.
    if "TPU_ML_PLATFORM" in values and "TPU_SKIP_MDS_QUERY" not in values and "TPU_WORKER_HOSTNAMES" not in values:
        return _PERHAPS_A_POD
    return ""


@contextmanager
def _time_limit(seconds: int, message: str) -> Iterator[None]:
    """Ends the process with one line after so many seconds, where JAX would abort it with a page of C++."""

    def give_up() -> None:
        print(f"frugalmoe: {message}; is process 0 running, and its port open to the others?", file=sys.stderr)
        _leave(EXIT_PEER_LOST if _is_again() else EXIT_USER_ERROR)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _leave(code: int) -> None:
    """Ends the process without JAX's orderly end, which waits for processes that may never come."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_main() -> bool:
    """Whether this is the process that writes logs and talks to the user."""
    return jax.process_index() == 0


def exchange(value: Any) -> list[Any]:
    """Returns the JSON-able values of all processes, in the order of their ids. All must call it."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.pad(data, (0, int(sizes.max()) - data.size))
    return [json.loads(row[:size].tobytes()) for row, size in zip(multihost_utils.process_allgather(padded), sizes)]


@contextmanager
def together() -> Iterator[None]:
    """Wraps a block that every process runs by itself: an error in one is an error in all. No collectives inside."""
    try:
        yield
    except Exception as e:
        exchange(one_line(e) or _first_line(e))
        raise
    for number, error in enumerate(exchange("")):
        if error:
            raise UserError(f"process {number}: {error}")


def check_same(values: Mapping[str, Any]) -> None:
    """Raises UserError in all processes where one has other values than process 0, and names them."""
    first, *others = exchange(values)
    for number, other in enumerate(others, 1):
        if differing := differences(first, other, "in process 0", f"in process {number}"):
            raise UserError(f"processes must be started alike: {', '.join(differing[:5])}")


@contextmanager
def all_or_none(*shared: type[Exception]) -> Iterator[None]:
    """Wraps a block of steps: an error ends this process at once, and with it the others. An error of a type in
    `shared`, which all processes have, is raised.

    An orderly end would never come: it waits for the other processes, whose devices wait for ours in the middle of a
    step. With one process every error is raised.
    """
    try:
        yield
    except shared:
        raise
    except BaseException as e:
        if jax.process_count() == 1:
            raise
        if not may_speak():  # the watch has said why the process ends
            time.sleep(60)
        print(f"frugalmoe: process {jax.process_index()}: {_what_happened(e)}", file=sys.stderr, flush=True)
        if is_main():  # it runs the service that the others need: without a pause they would end before they speak
            time.sleep(_SECONDS_TO_SPEAK)
        _leave(EXIT_USER_ERROR if one_line(e) else EXIT_PEER_LOST)


def _what_happened(error: BaseException) -> str:
    if line := one_line(error):
        return line
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if _is_loss_of_peer(error):
        how = "the same command in all processes goes on from the last checkpoint"
        return f"another process has ended, or cannot be reached ({_first_line(error)}); {how}"
    return "".join(traceback.format_exception(error))


def _is_loss_of_peer(error: BaseException) -> bool:
    return isinstance(error, ValueError | RuntimeError) and "gloo" in str(error).lower()


class StopNow(Exception):
    """A signal came while there was nothing to do but wait."""


class Received:
    """The signals that came; called, whether any did. `waits` is set while the first one is to end what waits."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.waits = False

    def __call__(self, step: int = 0) -> bool:
        return bool(self.numbers)


@contextmanager
def while_waiting(stop: Callable[[int], bool] | None) -> Iterator[None]:
    """Wraps a block that changes nothing: the first signal ends it with `StopNow`, so that a loader that sleeps keeps
    no process alone from stopping. stop: as `stop_requests` gave it; of several processes nothing is done.
    """
    if not isinstance(stop, Received):
        yield
        return
    stop.waits = True
    try:
        yield
    finally:
        stop.waits = False


@contextmanager
def stop_signals() -> Iterator[Received]:
    """Collects SIGTERM and SIGINT; a second one ends the process at once."""
    received = Received()
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number, frame):
        if not received():
            received.numbers.append(number)
            if received.waits:
                raise StopNow
        elif not is_watched(previous[number]):  # a watch ends the process itself
            raise KeyboardInterrupt

    for number in previous:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Gives `stop(step)`, asked after each step: whether a signal ends the run there, in all processes.

    One process's signal is enough: JAX's coordination service, which listens for SIGTERM, picks a step that none has
    reached. Asking costs a look at a number.
    """
    if jax.process_count() == 1:
        with stop_signals() as received:
            yield received
        return

    def interrupt(number, frame):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one ends the process at once
        signal.raise_signal(signal.SIGTERM)

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield multihost_utils.reached_preemption_sync_point
    finally:
        signal.signal(signal.SIGINT, previous)
