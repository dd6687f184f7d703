"""Triton kernels of gelu(x + bias), and of its gradient together with the column sums that are the bias's.

GELU is x Phi(x) with the normal distribution's Phi, here from its tail Q(a) = Phi(-a), a >= 0: gelu(x) = max(x, 0) -
|x| Q(|x|). A library's erf takes a GPU longer than memory takes for the data; one polynomial in an exponent does not.
Shape letters: N rows, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import INTERPRETER, Arch


def launch_forward(x: Tensor, bias: Tensor, arch: Arch) -> Tensor:
    """gelu(x + bias) [N,D] in x's dtype. x [N,D], neighbouring columns side by side; bias [D]."""
    n, d = x.shape
    y = torch.empty((n, d), dtype=x.dtype, device=x.device)
    tile = config(d, arch)
    if n:
        _forward[(triton.cdiv(n, tile["R"]), triton.cdiv(d, tile["C"]))](x, bias, y, x.stride(0), n, d, **tile)
    return y


def launch_backward(grad: Tensor, x: Tensor, bias: Tensor, arch: Arch) -> tuple[Tensor, Tensor]:
    """Gradients of x [N,D] in its dtype and of bias, float32 [D]. grad, x [N,D], neighbouring columns side by side."""
    n, d = x.shape
    grad_x = torch.empty((n, d), dtype=x.dtype, device=x.device)
    tile = config(d, arch)
    blocks = triton.cdiv(d, tile["C"])
    programs = min(triton.cdiv(n, tile["R"]), max(1, _programs(arch) // blocks))
    partial = torch.empty((programs, d), dtype=torch.float32, device=x.device)
    if n:
        _backward[(programs, blocks)](grad, x, bias, grad_x, partial, grad.stride(0), x.stride(0), n, d, **tile)
    return grad_x, partial.sum(0)


def config(width: int, arch: Arch) -> dict[str, int]:
    """R rows and C columns of a tile, and warps."""
    if arch == INTERPRETER:  # few large tiles, as each costs the same
        return {"C": min(256, triton.next_power_of_2(width)), "R": 16, "num_warps": 4}
    return {"C": 256, "R": 8, "num_warps": 4}


def _programs(arch: Arch) -> int:
    """In the backward: as many as run at a time, since each adds up its columns over its rows."""
    return {INTERPRETER: 4, Arch(90): 6 * 132}.get(arch, 6 * 108)


@triton.jit
def _forward(x, bias, y, x_stride, N, D, C: tl.constexpr, R: tl.constexpr):
    columns = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    rows = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    valid = (rows < N) & (columns < D)
    rows = rows.to(tl.int64)
    value = tl.load(x + rows * x_stride + columns, mask=valid, other=0.0).to(tl.float32)
    value += tl.load(bias + columns + 0 * rows, mask=valid, other=0.0).to(tl.float32)
    value = tl.maximum(value, 0.0) - tl.abs(value) * _tail(tl.abs(value))
    tl.store(y + rows * D + columns, value.to(y.dtype.element_ty), mask=valid)


@triton.jit
def _backward(grad, x, bias, grad_x, partial, grad_stride, x_stride, N, D, C: tl.constexpr, R: tl.constexpr):
    """The sum over rows stays [R,C] in the loop and is reduced after it."""
    columns = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    shift = tl.load(bias + columns + tl.zeros([R, 1], tl.int32), mask=columns < D, other=0.0).to(tl.float32)
    total = tl.zeros([R, C], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, R), tl.num_programs(0)):
        rows = tile * R + tl.arange(0, R)[:, None]
        valid = (rows < N) & (columns < D)
        rows = rows.to(tl.int64)
        value = tl.load(x + rows * x_stride + columns, mask=valid, other=0.0).to(tl.float32) + shift
        slope = tl.load(grad + rows * grad_stride + columns, mask=valid, other=0.0).to(tl.float32)
        tail = _tail(tl.abs(value))
        density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * (value * value))  # e^(-value² / 2) / sqrt(2 pi)
        slope *= tl.where(value < 0, tail, 1 - tail) + value * density
        tl.store(grad_x + rows * D + columns, slope.to(grad_x.dtype.element_ty), mask=valid)
        total += slope
    columns = tl.program_id(1) * C + tl.arange(0, C)
    tl.store(partial + tl.program_id(0) * D + columns, tl.sum(total, 0), mask=columns < D)


@triton.jit
def _tail(a):
    """Q(a) = erfc(a / sqrt(2)) / 2 for a >= 0, float32: 2 to the power of a polynomial that fits -log2 Q on 0..6.5 so
    that neither Q nor a Q is off by more than 1e-7, the rounding of a float32; beyond, it falls to 0 as Q does."""
    p = 9.106030976897304e-07 * a - 1.5829331266477218e-05
    p = p * a + 7.330794421749772e-05
    p = p * a + 0.0004081139804249224
    p = p * a - 0.007409989577001868
    p = p * a + 0.05272636564625051
    p = p * a + 0.45913658720962197
    p = p * a + 1.1511133130509255
    p = p * a + 0.9999998482440056
    return tl.exp2(-p)
