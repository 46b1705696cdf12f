"""One CPU device. Programs are compiled fast rather than well: tests compile much and run little."""

import itertools
import os
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.register_assert_rewrite("frugalmoe.laws")  # so that a broken law shows its values
flags = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # XLA ends the process over a flag that it does not know
    flags += " --xla_cpu_use_fusion_emitters=false"  # halves the time of compilation
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", flags)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MAPS = Path("/proc/self/maps")
_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def room_for_programs():
    """Compiled programs hold memory maps, of which Linux lets a process have 65,530: beyond them XLA just dies."""
    yield
    if next(_tests) % 20 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        import jax  # after the flags above

        jax.clear_caches()
