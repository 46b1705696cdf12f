"""The smallest slice of a kind of device that a config trains on: slices from small to large, a few layouts of each."""

import dataclasses
import math
from collections.abc import Callable, Iterator

from frugalmoe.aot.program import Compiled, as_expected, compile_step
from frugalmoe.aot.topologies import Topology, parse
from frugalmoe.config import Config, settle
from frugalmoe.devices import DEVICES, usable
from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.schema import Mesh
from frugalmoe.train.optim import bytes_of

HOST = 8  # devices that are near each other


def search(
    config: Config, kind: str, slices: int | None = None, tried: Callable[[Compiled], None] = lambda result: None
) -> Compiled:
    """The first layout that fits on the smallest usual slice that has one. `tried` sees every compilation.

    The batch stays as near to `train.batch_size` as micro-batches of the layout let it.
    """
    if kind not in DEVICES:
        rule = "--search finds the shape: give the kind alone" if ":" in kind else "unknown device"
        raise UserError(f"--topology={kind}: {rule}; {did_you_mean(kind, DEVICES)}")
    config = as_expected(config, None)
    of_run = bytes_of(config)
    least = sum(of_run)  # no layout needs less
    for shape in DEVICES[kind].usual:
        topology = parse(f"{kind}:{shape}", slices)
        if least > usable(topology.device) * topology.num_devices:
            continue
        for candidate in layouts(config, topology):
            tried(result := compile_step(candidate, topology))
            if result.fits:
                return result
    raise UserError(f"--topology={kind}: no slice up to {kind}:{DEVICES[kind].usual[-1]} has a layout that fits")


def layouts(config: Config, topology: Topology) -> Iterator[Config]:
    """The config with meshes that are worth a try and valid, those first that exchange least.

    Parameters are spread over all devices in each. The more ways experts and tensors are cut, the less a device holds
    of a layer that it computes.
    """
    model, devices = config.model, topology.num_devices
    most = math.gcd(devices, model.moe.num_experts)
    few = math.gcd(HOST, most)
    heads = math.gcd(HOST, model.num_kv_heads, devices // few)
    for expert, tensor in dict.fromkeys([(1, 1), (few, 1), (most, 1), (few, heads)]):
        try:
            candidate = settle(_laid_out(config, devices, expert, tensor), None, devices)
        except UserError:
            continue
        yield candidate


def _laid_out(config: Config, devices: int, expert: int, tensor: int) -> Config:
    """One sequence per device in a micro-batch, or per group of devices that share its heads."""
    sequences = devices // tensor
    steps = max(1, round(config.train.batch_size / sequences))
    train = dataclasses.replace(config.train, batch_size=steps * sequences, accumulate_steps=steps)
    mesh = Mesh(data=1, fsdp=sequences // expert, expert=expert, tensor=tensor)
    return dataclasses.replace(config, mesh=mesh, train=train)
