"""The GPU instructions that Numba has no word for, as inline PTX.

Intrinsics in scalars.py emit LLVM's instruction on a CPU and one of these on a GPU: libNVVM fuses a
product and a sum into one multiply-add wherever it sees both, and cannot see into these.
"""

from __future__ import annotations

from llvmlite import ir

__all__ = ["emit", "targets_gpu"]


def targets_gpu(builder: ir.IRBuilder) -> bool:
    """Whether the function being built is for an NVIDIA GPU."""
    return builder.module.triple.startswith("nvptx")


def emit(builder: ir.IRBuilder, instruction: str, constraints: str, result, arguments):
    """One PTX instruction without side effects: `constraints` as in CUDA C, "=f,h" say."""
    types = [argument.type for argument in arguments]
    assembly = ir.InlineAsm(ir.FunctionType(result, types), f"{instruction};", constraints)
    return builder.call(assembly, arguments)
