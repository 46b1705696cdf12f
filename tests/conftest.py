"""One CPU device. Programs are compiled fast rather than well: tests compile much and run little."""

import gc
import itertools
import os
from pathlib import Path

import pytest

# Threads of OpenBLAS that wait for each other on a busy machine make a fit of a law take a hundred times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before anything imports NumPy

from frugalmoe.laws import xla_flags

# A broken law shows its values: the modules of laws, and those of the folder `routing`.
pytest.register_assert_rewrite(*(f"frugalmoe.laws.{name}" for name in ("attention", "cases", "executors", "routing")))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", xla_flags())
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Tracing makes millions of objects that stay: to look for garbage among them every 700 is a twentieth of the time.
gc.set_threshold(50_000, 20, 20)

MAPS = Path("/proc/self/maps")
_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def room_for_programs():
    """Compiled programs hold memory maps, of which Linux lets a process have 65,530: beyond them XLA just dies."""
    yield
    if next(_tests) % 20 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        import jax  # after the flags above

        jax.clear_caches()


@pytest.fixture(scope="module")
def forks():
    """What starts commands of `frugalmoe`, each a process, one at a time: for the tests of faults."""
    from faulted import Forks

    forks = Forks()
    yield forks
    forks.close()
