"""The worker's side of a benchmark: it says what it is, then runs one action per line of stdin and reports its cost.

Standard library only: workers of other frameworks import it too. Peak memory is the process's largest resident set,
Python and libraries included.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Action(NamedTuple):
    prepare: Callable[[], Any]  # not timed: the batch
    run: Callable[[Any], dict[str, float]]  # timed, to the end of the computation; what else is worth noting


def serve(about: Mapping[str, Any], actions: Mapping[str, Action]) -> None:
    """Answers in JSON, one line each; ends with stdin."""
    print(json.dumps({**about, "peak_mib": _peak_mib()}), flush=True)
    for line in sys.stdin:
        action = actions[line.strip()]
        given = action.prepare()
        wall, cpu = time.perf_counter(), time.process_time()
        noted = action.run(given)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({**noted, "seconds": wall, "cpu_seconds": cpu, "peak_mib": _peak_mib()}), flush=True)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
