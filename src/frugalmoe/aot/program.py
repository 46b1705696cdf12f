"""The train step compiled ahead of time: what it needs of a device, what it sends, whether it fits.

The program is that of `frugalmoe train`, for the devices that are here or for absent ones. Its time is not estimated:
what compilers say about it is of no use.

Letters: A micro-batches of a step, B sequences, T time.
"""

import math
import re
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import ShapeDtypeStruct
from jax.sharding import NamedSharding

from frugalmoe import sharding
from frugalmoe.aot import hlo, topologies
from frugalmoe.aot.topologies import Topology
from frugalmoe.config import Config, settle
from frugalmoe.data.batches import Batch
from frugalmoe.data.tokenizer import expected_size
from frugalmoe.devices import usable
from frugalmoe.fields import to_dict
from frugalmoe.train import optim
from frugalmoe.train.objective import knobs
from frugalmoe.train.program import compiled_train_step
from frugalmoe.train.step import abstract

# What the TPU compiler says of a program that is too large. Its "temporaries" include arguments.
_TOO_LARGE = re.compile(
    r"(?:Used |HLO temporaries \()([\d.]+)([KMGT]?)(?: of [\d.]+[KMGT]? hbm|\) exceeds available HBM)", re.IGNORECASE
)
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


class Compiled(NamedTuple):
    """What is known of one compilation. Memory is in bytes of one device."""

    topology: Topology | None  # None: the devices that are here
    mesh: dict[str, int]
    sequences: tuple[int, int]  # micro-batches of a step, sequences in each
    fits: bool
    available: int | None  # what a program may take; None: not known
    needed: int  # all parts together; what the compiler said where it refused the program
    memory: dict[str, int]  # by part; of a refused program the first three only
    gradients: int  # those of all parameters that are trained: a part of the temporaries
    collectives: list[hlo.Collective] | None  # of a step; None: of a refused program, or its text cannot be read
    largest: list[hlo.Value] | None  # arrays that the program makes; None likewise
    text: str | None  # of the optimized program; None likewise
    seconds: float  # that tracing and compiling took


def compile_step(config: Config, topology: Topology | None = None) -> Compiled:
    """Compiles `config`'s train step for all devices of a topology, or for those here, laid out as its `mesh` says.

    Raises UserError where the config does not suit that many devices or the compiler is not installed. A program that
    is too large is a result.
    """
    config = as_expected(config, topology.num_devices if topology else jax.device_count())
    axes = to_dict(config.mesh)
    devices = topologies.devices(topology) if topology else jax.devices()
    mesh = sharding.make_mesh(axes, devices)
    began, executable = time.perf_counter(), None
    with jax.set_mesh(mesh):
        arguments = state, batch, _ = abstract(config), _abstract_batch(config, mesh), _abstract_knobs(config, mesh)
        memory = {
            "parameters": _bytes(state.params),
            "optimizer state": _bytes(state.opt_state),
            # The step does not look at domain ids, and what it does not look at is no argument of the program.
            "inputs": _bytes(
                (state.step, state.position, state.router_state, batch._replace(domain_ids_BT=()), arguments[2])
            ),
        }
        try:
            executable = compiled_train_step(config).lower(*arguments).compile()
        except jax.errors.JaxRuntimeError as e:
            if not (needed := _needed(str(e))):
                raise
    available = usable(topology.device) if topology else (devices[0].memory_stats() or {}).get("bytes_limit")
    of_tpu, collectives, largest, text = devices[0].platform == "tpu", None, None, None
    if executable is not None:
        memory |= _rest(executable.memory_analysis(), sum(memory.values()), of_tpu)
        needed, (collectives, largest, text) = sum(memory.values()), _read(executable)
    return Compiled(
        topology=topology,
        mesh=axes,
        sequences=batch.tokens_BT.shape[:2],
        fits=executable is not None and (of_tpu or available is None or needed <= available),
        available=available,
        needed=needed,
        memory=memory,
        gradients=_bytes(optim.split(state.params, config)[0]),
        collectives=collectives,
        largest=largest,
        text=text,
        seconds=time.perf_counter() - began,
    )


def as_expected(config: Config, num_devices: int | None) -> Config:
    """Returns the config settled for so many devices, with a vocabulary as large as the tokenizer may become.

    Where the config says its vocabulary the tokenizer, which may not be on this machine, is not looked at.
    """
    size = None if config.model.vocab_size else expected_size(config.data.tokenizer)
    return settle(config, size, num_devices)


def _abstract_batch(config: Config, mesh: jax.sharding.Mesh) -> Batch:
    """Shapes, dtypes and shardings of a step's batch, as `Program.next_batch` makes it."""
    train = config.train
    micro = train.batch_size // train.accumulate_steps
    shape = (train.accumulate_steps, micro, config.data.sequence_length)
    dtypes = Batch(*(bool if name == "loss_mask_BT" else np.int32 for name in Batch._fields))
    place = NamedSharding(mesh, sharding.spec("ABT", mesh=mesh))
    return Batch(*(ShapeDtypeStruct(shape, dtype, sharding=place) for dtype in dtypes))


def _abstract_knobs(config: Config, mesh: jax.sharding.Mesh) -> Any:
    place = NamedSharding(mesh, sharding.spec("", mesh=mesh))
    numbers = jax.eval_shape(lambda: knobs(config))
    return jax.tree.map(lambda number: ShapeDtypeStruct(number.shape, number.dtype, sharding=place), numbers)


def _bytes(tree: Any) -> int:
    """Returns the bytes of one device's shards."""
    shards = (a.dtype.itemsize * math.prod(a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(tree))
    return sum(shards)


def _needed(message: str) -> int:
    """Bytes, from a TPU compiler's refusal; 0 for any other error."""
    match = _TOO_LARGE.search(message)
    return int(float(match[1]) * 2 ** _UNITS[match[2]]) if match else 0


def _rest(stats: Any, arguments: int, of_tpu: bool) -> dict[str, int]:
    """The parts that only a compiler knows.

    A GPU program gets its temporaries in one piece; results that overwrite arguments need no memory of their own. What
    libtpu says of temporaries comes from several memories: the peak of the main one includes arguments and results.
    """
    given = stats.argument_size_in_bytes
    temporaries = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    if of_tpu:
        temporaries = max(stats.peak_memory_in_bytes - given, 0)
    return {
        "padding": max(given - arguments, 0),
        "temporaries": temporaries,
        "program": stats.generated_code_size_in_bytes,
    }


def _read(
    executable: jax.stages.Compiled,
) -> tuple[list[hlo.Collective] | None, list[hlo.Value] | None, str | None]:
    """Its collectives, largest arrays and text. Some programs' cannot be had: that is no reason to say nothing."""
    try:
        text = executable.as_text()
        return hlo.collectives(text), hlo.largest(text), text
    except (jax.errors.JaxRuntimeError, ValueError):
        return None, None, None
