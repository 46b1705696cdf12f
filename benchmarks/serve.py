"""The worker's side of a benchmark: it says what it is, then runs one action per line of stdin and reports its cost.

Standard library only: workers of other frameworks import it too. Linux: memory is read from /proc.
"""

import json
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Action(NamedTuple):
    prepare: Callable[[], Any]  # not timed: the batch
    run: Callable[[Any], dict[str, float]]  # timed, to the end of the computation; what else is worth noting


def serve(about: Mapping[str, Any], actions: Mapping[str, Action]) -> None:
    """Answers in JSON, one line each; ends with stdin. `peak_mib` is the largest resident set during the action."""
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        action = actions[line.strip()]
        given = action.prepare()
        _forget_peak()
        wall, cpu = time.perf_counter(), time.process_time()
        noted = action.run(given)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({**noted, "seconds": wall, "cpu_seconds": cpu, "peak_mib": _peak_mib()}), flush=True)


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_mib() -> float:
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
