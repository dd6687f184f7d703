"""Triton kernels of LayerNorm(residual + dropout(x + bias)): one pass forward, one backward.

A program holds R rows in registers, in chunks of C columns (of 1024 lanes, rows of 768 would use only three quarters).
Saved for the backward are the normalised values, in the rows' dtype, and 1 / standard deviation: with them the backward
reads two tensors and needs neither x nor residual nor the output. The dropout mask is made again.
Shape letters: N rows, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout import STREAM_RESIDUAL, keep_tile, threshold
from ..launch import INTERPRETER, Arch

STREAM: tl.constexpr = tl.constexpr(STREAM_RESIDUAL)


def launch_forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    shift: Tensor,
    eps: float,
    dropout: float,
    seed: Tensor | None,
    save: bool,
    arch: Arch,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, normalised, rstd): y and normalised [N,D] in x's dtype, rstd float32 [N]; without `save` the last two are
    None.

    x, residual [N,D] of one dtype, rows contiguous; bias, weight, shift [D], floating; seed int64 [1] if dropout > 0.
    """
    n, d = x.shape
    y = torch.empty((n, d), dtype=x.dtype, device=x.device)
    normalised = torch.empty_like(y) if save else None
    rstd = torch.empty(n, dtype=torch.float32, device=x.device) if save else None
    tile = config(d, arch)
    tensors = (x, bias, residual, weight, shift, seed, y, normalised, rstd)
    sizes = (x.stride(0), residual.stride(0), n, eps, threshold(dropout), 1 / (1 - dropout), d)
    if n:
        _forward[(triton.cdiv(n, tile["R"]),)](*tensors, *sizes, **tile)
    return y, normalised, rstd


def launch_backward(
    grad: Tensor,
    normalised: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dropout: float,
    seed: Tensor | None,
    with_bias: bool,
    arch: Arch,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(grad_residual [N,D], grad_x [N,D], sums): sums float32 [2 or 3, D] are the gradients of weight, shift and, with
    `with_bias`, bias. Without dropout grad_x is None: it equals grad_residual. grad [N,D], rows contiguous."""
    n, d = normalised.shape
    grad_residual = torch.empty_like(normalised)
    grad_x = torch.empty_like(normalised) if dropout else None
    tile = config(d, arch)
    if arch != INTERPRETER and normalised.dtype == torch.bfloat16:
        # Three programs then fit on a multiprocessor; left alone, the compiler takes 196 registers and two fit. Other
        # dtypes would spill.
        tile["maxnreg"] = 168
    programs = min(triton.cdiv(n, tile["R"]), _programs(arch))
    partial = torch.empty((programs, 3 if with_bias else 2, d), dtype=torch.float32, device=grad.device)
    tensors = (grad, normalised, rstd, weight, seed, grad_residual, grad_x, partial)
    sizes = (grad.stride(0), n, threshold(dropout), 1 / (1 - dropout), with_bias, d)
    if n:
        _backward[(programs,)](*tensors, *sizes, **tile)
    return grad_residual, grad_x, partial.sum(0)


def config(width: int, arch: Arch) -> dict[str, int]:
    """R rows and C columns of a tile, and warps. A lane holds 8 neighbouring columns of each of at most 3 chunks."""
    chunk = next(c for c in (256, 512, 1024) if 3 * c >= width)
    chunk = min(chunk, triton.next_power_of_2(width))
    if arch == INTERPRETER:  # few large tiles, as each costs the same
        return {"C": chunk, "R": 16, "num_warps": 4}
    return {"C": chunk, "R": max(1, 4 * 32 * 8 // chunk), "num_warps": 4}


def _programs(arch: Arch) -> int:
    """In the backward: as many as run at a time, since each adds up gradients of the parameters over its rows."""
    return {INTERPRETER: 2, Arch(90): 3 * 132}.get(arch, 3 * 108)


@triton.jit
def _forward(
    x,
    bias,
    residual,
    weight,
    shift,
    seed,
    y,
    normalised,
    rstd,
    x_stride,
    residual_stride,
    N,
    eps,
    LIMIT: tl.constexpr,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
):
    rows = tl.program_id(0) * R + tl.arange(0, R)
    inside = (rows < N)[:, None]
    offsets = rows.to(tl.int64)[:, None]
    sums = ()
    mean = tl.zeros([R], tl.float32)
    for start in tl.static_range(0, D, C):
        columns = start + tl.arange(0, C)
        valid = inside & (columns < D)[None, :]
        value = tl.load(x + offsets * x_stride + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        if bias is not None:
            value += _tile_of(bias, columns, D, R)
        if LIMIT > 0:
            words = start // 4 + tl.arange(0, C // 4)
            value = tl.where(keep_tile(tl.load(seed), 0, rows, words, STREAM, LIMIT, R, C), value * SCALE, 0.0)
        value += tl.load(residual + offsets * residual_stride + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        mean += tl.sum(value, 1)
        sums += (value,)
    mean *= 1.0 / D
    variance = tl.zeros([R], tl.float32)
    for i in tl.static_range(len(sums)):
        columns = i * C + tl.arange(0, C)
        distance = tl.where((columns < D)[None, :], sums[i] - mean[:, None], 0.0)
        variance += tl.sum(distance * distance, 1)
    scale = tl.rsqrt(variance * (1.0 / D) + eps)
    if rstd is not None:
        tl.store(rstd + rows, scale, mask=rows < N)
    for i in tl.static_range(len(sums)):
        columns = i * C + tl.arange(0, C)
        valid = inside & (columns < D)[None, :]
        value = (sums[i] - mean[:, None]) * scale[:, None]
        places = offsets * D + columns[None, :]
        if normalised is not None:
            tl.store(normalised + places, value.to(normalised.dtype.element_ty), mask=valid)
        value = value * _tile_of(weight, columns, D, R) + _tile_of(shift, columns, D, R)
        tl.store(y + places, value.to(y.dtype.element_ty), mask=valid)


@triton.jit
def _backward(
    grad,
    normalised,
    rstd,
    weight,
    seed,
    grad_residual,
    grad_x,
    partial,
    grad_stride,
    N,
    LIMIT: tl.constexpr,
    SCALE: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
):
    """Sums over rows stay [R,C] in the loop and are reduced after it: within the loop that would cost as much as the
    rest."""
    zeros = tl.zeros([R, C], tl.float32)
    weight_sums, shift_sums, bias_sums = (), (), ()
    for _ in tl.static_range(0, D, C):
        weight_sums += (zeros,)
        shift_sums += (zeros,)
        bias_sums += (zeros,)
    for tile in range(tl.program_id(0), tl.cdiv(N, R), tl.num_programs(0)):
        rows = tile * R + tl.arange(0, R)
        inside = (rows < N)[:, None]
        offsets = rows.to(tl.int64)[:, None]
        values, slopes, new_weight_sums, new_shift_sums = (), (), (), ()
        mean_slope = tl.zeros([R], tl.float32)
        mean_product = tl.zeros([R], tl.float32)
        for start in tl.static_range(0, D, C):
            columns = start + tl.arange(0, C)
            valid = inside & (columns < D)[None, :]
            value = tl.load(normalised + offsets * D + columns[None, :], mask=valid, other=0.0).to(tl.float32)
            slope = tl.load(grad + offsets * grad_stride + columns[None, :], mask=valid, other=0.0).to(tl.float32)
            new_weight_sums += (weight_sums[start // C] + slope * value,)
            new_shift_sums += (shift_sums[start // C] + slope,)
            slope *= _tile_of(weight, columns, D, R)
            mean_slope += tl.sum(slope, 1)
            mean_product += tl.sum(slope * value, 1)
            values += (value,)
            slopes += (slope,)
        weight_sums, shift_sums = new_weight_sums, new_shift_sums
        scale = tl.load(rstd + rows, mask=rows < N, other=0.0)
        mean_slope *= scale * (1.0 / D)
        mean_product *= scale * (1.0 / D)
        new_bias_sums = ()
        for start in tl.static_range(0, D, C):
            columns = start + tl.arange(0, C)
            valid = inside & (columns < D)[None, :]
            places = offsets * D + columns[None, :]
            slope = (
                scale[:, None] * slopes[start // C] - values[start // C] * mean_product[:, None] - mean_slope[:, None]
            )
            tl.store(grad_residual + places, slope.to(grad_residual.dtype.element_ty), mask=valid)
            if LIMIT > 0:
                words = start // 4 + tl.arange(0, C // 4)
                slope = tl.where(keep_tile(tl.load(seed), 0, rows, words, STREAM, LIMIT, R, C), slope * SCALE, 0.0)
                tl.store(grad_x + places, slope.to(grad_x.dtype.element_ty), mask=valid)
            if WITH_BIAS:
                new_bias_sums += (bias_sums[start // C] + slope,)
        if WITH_BIAS:
            bias_sums = new_bias_sums
    partial += tl.program_id(0) * ((2 + WITH_BIAS) * D)
    for start in tl.static_range(0, D, C):
        columns = start + tl.arange(0, C)
        tl.store(partial + columns, tl.sum(weight_sums[start // C], 0), mask=columns < D)
        tl.store(partial + D + columns, tl.sum(shift_sums[start // C], 0), mask=columns < D)
        if WITH_BIAS:
            tl.store(partial + 2 * D + columns, tl.sum(bias_sums[start // C], 0), mask=columns < D)


@triton.jit
def _tile_of(parameter, columns, D: tl.constexpr, R: tl.constexpr):
    """[R,C] float32, each row the same: loaded as a tile, so that every thread gets its columns without an exchange."""
    places = columns[None, :] + tl.zeros([R, 1], tl.int32)
    return tl.load(parameter + places, mask=places < D, other=0.0).to(tl.float32)
