"""The outer step, which every island computes by itself and with the same bits: elementwise float32 on the host.

Sums, products and differences of two float32 numbers are rounded in one way by every machine (IEEE 754); dot products
and norms are not, as their order is the library's. So nothing here but `gram` adds up values of one array, and only
the island that commits a round needs its result: the coefficients that come of it stand in the commit record.

Letters: M contributions, Q tensors.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

_BLOCK = 1 << 16  # values of each contribution that `gram` holds in float64 at one time


class Outer(NamedTuple):
    """What all islands agree on after a round: float32 arrays by name."""

    params: dict[str, np.ndarray]
    momentum: dict[str, np.ndarray]  # what is absent is zero


def step(
    outer: Outer,
    deltas: Sequence[Mapping[str, np.ndarray]],
    coefficients_MQ: np.ndarray,
    names: Sequence[str],
    rate: float,
    momentum: float,
) -> Outer:
    """Returns the outer state after one update of the tensors `names`; the others are those of `outer`.

    With D = sum over m of coefficients_MQ[m, q] deltas[m][names[q]], added in the order of `deltas`:

        buffer = momentum * buffer + D,    params = params - rate * (D + momentum * buffer)

    which is SGD with Nesterov's momentum as in `optax.sgd` (DiLoCo, arXiv 2311.08105; rate 0.7 and momentum 0.9 there).
    deltas: outer parameters minus those of the island, float32. One whose coefficient is 0 is not read.
    Every operation is rounded to float32 by itself, so that the result does not depend on how arrays are cut.
    """
    rate, momentum = np.float32(rate), np.float32(momentum)
    params, buffers = dict(outer.params), dict(outer.momentum)
    for q, name in enumerate(names):
        old = params[name]
        total = np.zeros(old.shape, np.float32)
        for delta, coefficient in zip(deltas, np.float32(coefficients_MQ)[:, q], strict=True):
            if coefficient != 0:
                total += coefficient * delta[name]
        buffer = total if name not in buffers else momentum * buffers[name] + total
        params[name] = np.asarray(old - rate * (total + momentum * buffer))
        buffers[name] = np.asarray(buffer)
    return Outer(params, buffers)


def sha256(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns a checksum of names, shapes and bits; the order of the mapping does not matter."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], dtype="<f4", order="C")
        digest.update(f"{name} {list(array.shape)}\n".encode())
        digest.update(array.tobytes() if array.ndim == 0 else memoryview(array).cast("B") if array.size else b"")
    return digest.hexdigest()


def gram(deltas: Sequence[Mapping[str, np.ndarray]], names: Sequence[str]) -> np.ndarray:
    """Returns float64 [Q, M, M]: for each tensor the inner products of the contributions with each other.

    Formed in float64, in blocks, so that no more than M x 65,536 values are held in it. Its last bits are those of the
    machine's BLAS.
    """
    found = np.zeros((len(names), len(deltas), len(deltas)))
    for q, name in enumerate(names):
        flat = [np.ravel(delta[name]) for delta in deltas]
        for start in range(0, flat[0].size if flat else 0, _BLOCK):
            block = np.stack([values[start : start + _BLOCK] for values in flat]).astype(np.float64)
            found[q] += block @ block.T
    return found
