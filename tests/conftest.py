"""One CPU device. Programs are compiled fast rather than well: tests compile much and run little."""

import os
from importlib.metadata import version

flags = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # XLA ends the process over a flag that it does not know
    flags += " --xla_cpu_use_fusion_emitters=false"  # halves the time of compilation
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", flags)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
