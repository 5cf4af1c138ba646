"""Kernels on the threads of a CPU: what they are given, how they are compiled and started.

A kernel is a plain function (task, tasks, matrix, a, b, c): one task's share of the work on one
matrix; a, b and c are addresses or sizes. It is compiled by itself, as a C function, and
called by its address from a parallel loop that all kernels share. So the loop, which takes Numba
longest, is compiled once; and starting a kernel costs two microseconds, because integers need no
unboxing, as arrays do.

    Struct            Numba type of `matrix`: the address of 64-bit fields; constants in the type
    Packed            such fields in memory; runs kernels on them
    Fields            such fields inside an intrinsic
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, prange, types
from numba.core.imputils import lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import intrinsic, models, register_model

from .launch import cache_folder, compiled

__all__ = ["Fields", "Packed", "Struct", "tasks_for"]

I64 = ir.IntType(64)
TASK_WEIGHTS = 1 << 16  # about as many as a thread works off in the time it takes to start


class Struct(types.Type):
    """The address of consecutive 64-bit fields, integers or addresses of other Structs.

    What a kernel is specialised for are its `constants`: part of the type, read like the fields.
    """

    def __init__(
        self, name: str, constants: Mapping[str, int], fields: Mapping[str, types.Type]
    ) -> None:
        self.constants = dict(constants)
        self.fields = dict(fields)
        parts = [f"{key}={value}" for key, value in self.constants.items()]
        parts += [str(kind) for kind in self.fields.values() if isinstance(kind, Struct)]
        super().__init__(name=f"{name}({', '.join(parts)})")


class Packed:
    """The fields of a Struct in memory, and the kernels compiled for it."""

    def __init__(
        self, name: str, constants: Mapping[str, int], values: Mapping[str, int | Packed]
    ) -> None:
        kinds = {
            key: value.kind if isinstance(value, Packed) else types.intp
            for key, value in values.items()
        }
        numbers = [
            value.address if isinstance(value, Packed) else value for value in values.values()
        ]
        self.kind: Struct = Struct(name, constants, kinds)
        self._memory = np.array(numbers, np.int64)
        self._inner = values  # their memory lives as long as ours
        self.address: int = self._memory.ctypes.data
        self._kernels: dict[Callable, int] = {}

    def run(self, function: Callable, tasks: int, a: int, b: int, c: int) -> None:
        """Run a kernel on the threads, as so many tasks."""
        kernel = self._kernels.get(function)
        if kernel is None:
            kernel = self._kernels[function] = compiled_kernel(function, self.kind)
        if tasks > 1:
            run_parallel(kernel, tasks, self.address, a, b, c)
        else:
            run_alone(kernel, self.address, a, b, c)


@register_model(Struct)
class StructModel(models.PrimitiveModel):
    """A Struct is an address."""

    def __init__(self, dmm: Any, fe_type: Struct) -> None:
        super().__init__(dmm, fe_type, I64.as_pointer())


@infer_getattr
class StructAttributes(AttributeTemplate):
    """The type of `struct.name`: a literal for a constant."""

    key = Struct

    def generic_resolve(self, struct: Struct, name: str) -> types.Type | None:
        """None for an unknown name."""
        if name in struct.constants:
            return types.literal(struct.constants[name])
        return struct.fields.get(name)


@lower_getattr_generic(Struct)
def read_field(context, builder, struct, address, name):
    """The value of `struct.name`."""
    if name in struct.constants:
        return ir.Constant(I64, struct.constants[name])
    value = builder.load(builder.gep(address, [ir.Constant(I64, list(struct.fields).index(name))]))
    value.set_metadata("invariant.load", builder.module.add_metadata([]))  # so it leaves the loops
    if isinstance(struct.fields[name], Struct):
        return builder.inttoptr(value, I64.as_pointer())
    return value


class Fields:
    """A Struct inside an intrinsic: constants as Python integers, fields as LLVM values."""

    def __init__(self, context: Any, builder: ir.IRBuilder, kind: Struct, address: ir.Value):
        self.builder = builder
        self._context, self._kind, self._address = context, kind, address

    def __getattr__(self, name: str) -> Any:
        """A constant, a field, or the Fields of an inner Struct."""
        if name in self._kind.constants:
            return self._kind.constants[name]
        value = read_field(self._context, self.builder, self._kind, self._address, name)
        inner = self._kind.fields[name]
        if isinstance(inner, Struct):
            return Fields(self._context, self.builder, inner, value)
        return value


@cache
def compiled_kernel(function: Callable, matrix: Struct) -> int:
    """The address of a kernel compiled for one kind of matrix."""
    integer = types.intp
    signature = types.void(integer, integer, matrix, integer, integer, integer)
    with cache_folder() as folder:
        return cfunc(signature, cache=folder is not None, error_model="numpy")(function).address


@intrinsic
def call(typingctx, kernel, task, tasks, matrix, a, b, c):
    """Call a kernel by its address."""

    def codegen(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [I64] * 6)
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), codegen


@compiled(parallel=True, nogil=True)
def run_parallel(kernel, tasks, matrix, a, b, c):
    """The tasks, shared out among the threads."""
    for task in prange(tasks):
        call(kernel, task, tasks, matrix, a, b, c)


@compiled(nogil=True)
def run_alone(kernel, matrix, a, b, c):
    """All the work as one task, on this thread."""
    call(kernel, 0, 1, matrix, a, b, c)


def tasks_for(weights: int) -> int:
    """How many tasks to make of work on so many weights: one a thread of torch's, none tiny."""
    return min(torch.get_num_threads(), 1 + weights // TASK_WEIGHTS)
