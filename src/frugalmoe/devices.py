"""The devices that a program can be compiled for, and the memory that one program has on each."""

from typing import NamedTuple

GIB = 2**30
SHARE = 0.95  # of a GPU's memory: CUDA and NCCL take some. JAX takes 0.75 without XLA_PYTHON_CLIENT_MEM_FRACTION=0.95


class Tpu(NamedTuple):
    """Of one generation. Slices are boxes of chips, cut from a larger box."""

    memory: int  # bytes that its compiler has to give ("available HBM")
    host: tuple[int, ...]  # chips of one host
    largest: tuple[int, ...]  # chips per axis of the largest slice
    usual: tuple[str, ...]  # slices on offer, growing: what a search tries

    platform = "tpu"


class Gpu(NamedTuple):
    """What the CUDA compiler asks of a card; the rest follows from its compute capability."""

    memory: int  # bytes that its driver reports
    capability: tuple[int, int]
    multiprocessors: int
    cache: int  # bytes of L2
    bandwidth: float  # bytes per second
    clock: float  # GHz
    name: str

    platform = "cuda"
    per_host = 8

    @property
    def usual(self) -> tuple[str, ...]:
        return "1", "2", "4", *(str(8 << i) for i in range(8))


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")

# Memory: what the compilers of libtpu 0.0.42 say when a program is too large. Shapes: cloud.google.com/tpu/docs.
TPUS = {
    "v5e": Tpu(int(15.75 * GIB), (2, 2), (16, 16), _FLAT),
    "v5p": Tpu(int(95.74 * GIB), (2, 2, 1), (16, 16, 24), _CUBIC),
    "v6e": Tpu(int(31.25 * GIB), (2, 2), (16, 16), _FLAT),
}

# H, A cards: the specifications in OpenXLA's repository (xla/backends/gpu/target_config/specs). L40S, L4, RTX 4090:
# NVIDIA's data sheets, and the memory that nvidia-smi shows.
GPUS = {
    "h200": Gpu(151_397_597_184, (9, 0), 132, 50 << 20, 4.80e12, 1.98, "NVIDIA H200 141GB HBM3e"),
    "h100": Gpu(84_942_979_072, (9, 0), 132, 50 << 20, 3.35e12, 1.98, "NVIDIA H100 80GB HBM3"),
    "a100": Gpu(85_100_068_864, (8, 0), 108, 40 << 20, 2.04e12, 1.41, "NVIDIA A100-SXM4-80GB"),
    "a100-40": Gpu(42_331_013_120, (8, 0), 108, 40 << 20, 1.56e12, 1.41, "NVIDIA A100-SXM4-40GB"),
    "a6000": Gpu(51_041_271_808, (8, 6), 84, 6 << 20, 0.77e12, 1.80, "NVIDIA RTX A6000"),
    "l40s": Gpu(46_068 << 20, (8, 9), 142, 96 << 20, 0.86e12, 2.52, "NVIDIA L40S"),
    "l4": Gpu(23_034 << 20, (8, 9), 58, 48 << 20, 0.30e12, 2.04, "NVIDIA L4"),
    "rtx4090": Gpu(24_564 << 20, (8, 9), 128, 72 << 20, 1.01e12, 2.52, "NVIDIA GeForce RTX 4090"),
}

DEVICES: dict[str, Tpu | Gpu] = TPUS | GPUS


def usable(device: Tpu | Gpu) -> int:
    """Bytes of one device that a program may take."""
    return device.memory if isinstance(device, Tpu) else int(device.memory * SHARE)


# Of a multiprocessor, by compute capability: shared memory, the most of it for one block, threads, float32 units.
# CUDA C++ programming guide, table "technical specifications per compute capability".
_MULTIPROCESSOR = {
    (8, 0): (164 << 10, 163 << 10, 2048, 64),
    (8, 6): (100 << 10, 99 << 10, 1536, 128),
    (8, 9): (100 << 10, 99 << 10, 1536, 128),
    (9, 0): (228 << 10, 227 << 10, 2048, 128),
}


def target_config(gpu: Gpu) -> str:
    """The card as the text of XLA's GpuTargetConfigProto."""
    shared, of_block, threads, units = _MULTIPROCESSOR[gpu.capability]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: {threads}
  shared_memory_per_block: {48 << 10}  shared_memory_per_block_optin: {of_block}  shared_memory_per_core: {shared}
  core_count: {gpu.multiprocessors}  fpus_per_core: {units}  clock_rate_ghz: {gpu.clock}
  block_dim_limit_x: {2**31 - 1}  block_dim_limit_y: {2**16 - 1}  block_dim_limit_z: {2**16 - 1}
  registers_per_core_limit: {2**16}  registers_per_block_limit: {2**16}
  memory_bandwidth: {gpu.bandwidth:.0f}  l2_cache_size: {gpu.cache}  device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.name}"
"""
