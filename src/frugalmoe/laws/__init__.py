"""Laws that every routing strategy, executor and kind of attention obeys: `frugalmoe laws`, and the tests."""

from importlib.metadata import version


def xla_flags() -> str:
    """Flags of XLA, which count until JAX starts, for programs that are compiled fast rather than well: laws compile
    much and run little.
    """
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    flags += " --xla_cpu_parallel_codegen_split_count=1"  # one module for LLVM, not one for each of 32 parts
    if version("jaxlib").startswith("0.10."):  # XLA ends the process over a flag that it does not know
        flags += " --xla_cpu_use_fusion_emitters=false"  # halves the time of compilation
    return flags
