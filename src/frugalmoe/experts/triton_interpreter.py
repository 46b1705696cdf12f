"""Triton kernels on CPUs, interpreted: what `experts.gpu.kernels` launches in tests."""

import threading

import jax
import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, interpreter_builder

from frugalmoe.experts import gpu_kernels

ALONE = threading.Lock()  # the interpreter has one place for the tile that it is at


def _widened(handle: TensorHandle) -> TensorHandle:
    """Triton 3.7.1 keeps bfloat16 as its bits, and multiplies those as integers."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _dot(a: TensorHandle, b: TensorHandle, *others, create_dot=interpreter_builder.create_dot) -> TensorHandle:
    return create_dot(_widened(a), _widened(b), *others)


interpreter_builder.create_dot = _dot


class Memory:
    """An array of the host as Triton's interpreter asks for the tensors of torch: it reads and writes it in place."""

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, array.dtype.name

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "Memory":
        return self

    def cpu(self) -> "Memory":
        return self

    def new_empty(self, *_, **__) -> "Memory":
        return Memory(self.array)

    def set_(self, *_) -> None: ...

    def copy_(self, *_) -> None: ...

    storage_offset = size = stride = lambda self: 0


def launch(name: str, grid: tuple[int, ...], out: jax.ShapeDtypeStruct, *arrays: jax.Array, **sizes) -> jax.Array:
    def run(*arrays: np.ndarray) -> np.ndarray:
        result = np.full(out.shape, np.nan, out.dtype)  # what a kernel does not write is not zero
        kernel = InterpretedFunction(getattr(gpu_kernels, name).fn)
        memory = [Memory(np.ascontiguousarray(array)) for array in (*arrays, result)]
        with ALONE:
            kernel[grid](*memory, **sizes)
        return result

    return jax.pure_callback(run, out, *arrays)
