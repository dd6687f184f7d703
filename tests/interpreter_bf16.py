"""bfloat16 in Triton's interpreter as a GPU does it. Helpers only, no tests.

Triton 3.8 keeps bfloat16 as uint16 when it interprets, and computes with these bit patterns as if they were integers;
conversions from float32 cut digits off. Here every operation widens its operands to float32 and rounds its result to
the nearest even, as the hardware does.
"""

from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle


def install() -> None:
    """Repair the interpreter for this process; a second call does nothing."""
    if hasattr(InterpreterBuilder, "get_bf16"):
        return
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_erf", "create_rsqrt"):
        setattr(InterpreterBuilder, name, _in_float32(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.create_dot = _dot(InterpreterBuilder.create_dot)
    InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = _cast(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.get_bf16 = lambda self, value: _narrow(TensorHandle(np.float32([value]), tl.float32))
    for name in ("sum", "min_max"):
        setattr(ReduceOps, name, _reduction(getattr(ReduceOps, name)))


def _is_bf16(x: object) -> bool:
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16


def _widen(x: object) -> object:
    if not _is_bf16(x):
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(x: TensorHandle) -> TensorHandle:
    """float32 to bfloat16, ties to even, NaN stays NaN."""
    bits = np.ascontiguousarray(x.data).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = np.where(np.isnan(x.data), 0x7FC0, rounded).astype(np.uint16)
    return TensorHandle(rounded.reshape(x.data.shape), tl.bfloat16)


def _in_float32(operation: Callable) -> Callable:
    def wrapped(self: InterpreterBuilder, *args: object) -> TensorHandle:
        result = operation(self, *map(_widen, args))
        return _narrow(result) if any(map(_is_bf16, args)) and result.data.dtype == np.float32 else result

    return wrapped


def _dot(operation: Callable) -> Callable:
    def wrapped(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: object):
        result = operation(self, _widen(a), _widen(b), _widen(d), *rest)
        return _narrow(result) if _is_bf16(d) else result

    return wrapped


def _cast(operation: Callable) -> Callable:
    def wrapped(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype, *rest: object) -> TensorHandle:
        if _is_bf16(source):
            source = _widen(source)
        elif target.scalar != tl.bfloat16:
            return operation(self, source, target, *rest)
        wide = TensorHandle(source.data.astype(np.float32), tl.float32)
        if target.scalar == tl.bfloat16:
            return _narrow(wide)
        return TensorHandle(wide.data.astype(interpreter._get_np_dtype(target)), target.scalar)

    return wrapped


def _reduction(operation: Callable) -> Callable:
    def wrapped(self: ReduceOps, operand: object, *args: object, **kwargs: object):
        value = operand[0] if isinstance(operand, tuple) else operand
        if value.dtype.scalar != tl.bfloat16:
            return operation(self, operand, *args, **kwargs)
        raise TypeError("a reduction of bfloat16 depends on the order of rounding: convert to float32 before it")

    return wrapped
