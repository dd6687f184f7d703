"""Triton kernels of the segmented softmax, and the functions that launch them.

A tile is M rows (v, h) by N text tokens: neighbouring rows lie next to each other in memory, a row's text tokens H
apart. A softmax over text tokens is a reduction within the tile. A softmax over image tokens first takes the logarithm
of each column's sum, in a pass of its own; forward and backward are element-wise after that.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout import keep_tile, threshold
from ..launch import INTERPRETER, Arch
from .reference import STREAM, accumulation_dtype

LOG2E = math.log2(math.e)


def config(text: int, text_is: str, backward: bool, arch: Arch) -> dict[str, int]:
    """Tile of the forward and backward kernels: M rows, N text tokens, warps.

    One warp, so that up to 16 tokens of a row lie in one thread; 64 elements a thread, or 32 where they need more
    registers: two numbers of its column for each, or rows that are not aligned for wide accesses.
    """
    tile = max(4, triton.next_power_of_2(text))
    if arch == INTERPRETER:
        return {"M": 128, "N": tile, "num_warps": 4}
    few = (text_is == "query" and backward) or text % 4 != 0
    columns = min(tile, 16) if text_is == "query" else tile
    return {"M": max(16, (1024 if few else 2048) // columns), "N": columns, "num_warps": 1}


def statistics_config(arch: Arch) -> dict[str, int]:
    """Tile of the pass over a column: M image tokens, N columns."""
    return {"M": 64, "N": 32, "num_warps": 4}


def launch_forward(
    scores: Tensor,
    text_lengths: Tensor,
    text_is: str,
    scale: float,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    out: Tensor,
    arch: Arch,
) -> tuple[Tensor, Tensor]:
    """As `reference.forward`; scores and out contiguous, out may be the scores; bias contiguous, in the accumulation
    dtype."""
    pairs, image, text, heads = scores.shape
    dropped = torch.empty_like(scores) if dropout else out
    if scores.numel() == 0:
        return out, dropped
    log_sums = None
    if text_is == "query":
        log_sums = torch.empty(pairs, text * heads, dtype=accumulation_dtype(scores.dtype), device=scores.device)
        tile = statistics_config(arch)
        _column_log_sums[(triton.cdiv(text * heads, tile["N"]), pairs)](
            scores, text_lengths, bias, log_sums, image, text * heads, H=heads, SCALE=scale * LOG2E, **tile
        )
    tile = config(text, text_is, False, arch)
    _forward[(triton.cdiv(image * heads, tile["M"]), triton.cdiv(text, tile["N"]), pairs)](
        scores,
        text_lengths,
        bias,
        log_sums,
        seed,
        out,
        dropped if dropout else None,
        image,
        text,
        text * heads,
        SCALE=scale * LOG2E,
        **_constants(heads, text_is, dropout),
        **tile,
    )
    return out, dropped


def launch_backward(
    probabilities: Tensor,
    gradient: Tensor,
    text_is: str,
    scale: float,
    delta: Tensor | None,
    shift: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    out: Tensor,
    arch: Arch,
) -> tuple[Tensor, Tensor]:
    """As `reference.backward`; everything contiguous, out may be the gradient; delta and shift in the accumulation
    dtype. text_is "query" needs delta, "key" takes none."""
    pairs, image, text, heads = probabilities.shape
    dropped = torch.empty_like(probabilities) if dropout else probabilities
    if probabilities.numel() == 0:
        return out, dropped
    tile = config(text, text_is, True, arch)
    _backward[(triton.cdiv(image * heads, tile["M"]), triton.cdiv(text, tile["N"]), pairs)](
        probabilities,
        gradient,
        delta,
        shift,
        seed,
        out,
        dropped if dropout else None,
        image,
        text,
        text * heads,
        SCALE=scale,
        **_constants(heads, text_is, dropout),
        **tile,
    )
    return out, dropped


def _constants(heads: int, text_is: str, dropout: float) -> dict[str, float]:
    return {"H": heads, "STREAM": STREAM[text_is], "LIMIT": threshold(dropout), "KEPT": 1 / (1 - dropout)}


@triton.jit
def _column_log_sums(
    scores, lengths, bias, log_sums, V, J, H: tl.constexpr, SCALE: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """log2 of the sum of 2 ** (SCALE * score) over the image tokens of N of the J = T * H columns; infinite for text
    tokens that do not exist, which makes their probabilities 0."""
    pair = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * N + tl.arange(0, N)
    exists = (j < J)[None, :]
    scores += pair * V * J + j[None, :]
    rows = tl.arange(0, M)
    dtype = log_sums.dtype.element_ty
    # Each row of the tile keeps a sum of its own: reduced once, after the loop.
    top = tl.full([M, N], -1e30, dtype)
    total = tl.zeros([M, N], dtype)
    for begin in range(0, V, M):
        v = (begin + rows)[:, None]
        x = tl.load(scores + v * J, mask=(v < V) & exists, other=float("-inf")).to(dtype) * SCALE
        higher = tl.maximum(top, x)
        total = total * tl.exp2(top - higher) + tl.exp2(x - higher)
        top = higher
    highest = tl.max(top, 0)
    total = tl.sum(total * tl.exp2(top - highest[None, :]), 0)
    result = highest + tl.log2(tl.maximum(total, 1e-30))  # 0 only in columns that are not there
    if bias is not None:
        result += tl.load(bias + pair * J + j, mask=j < J, other=0.0) * SCALE
    result = tl.where(j // H < tl.load(lengths + pair), result, float("inf"))
    tl.store(log_sums + pair * J + j, result, mask=j < J)


@triton.jit
def _tile(V, T, J, H: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Of this program's tile: v, h [M], t [N], offsets [M,N] into [V,T,H] and into [T,H], and what is inside."""
    rows = tl.program_id(0) * M + tl.arange(0, M)
    v, h = rows // H, rows % H
    t = tl.program_id(1) * N + tl.arange(0, N)
    inside = (v < V)[:, None] & (t < T)[None, :]
    columns = (t * H)[None, :]
    return v, h, t, (v * J + h)[:, None] + columns, h[:, None] + columns, inside


@triton.jit
def _keep(
    seed, pair, v, h, H: tl.constexpr, STREAM: tl.constexpr, LIMIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    words = tl.program_id(1) * (N // 4) + tl.arange(0, N // 4)
    return keep_tile(tl.load(seed), pair.to(tl.int32) * H + h, v, words, STREAM, LIMIT, M, N)


@triton.jit
def _forward(
    scores,
    lengths,
    bias,
    log_sums,
    seed,
    out,
    dropped,
    V,
    T,
    J,
    SCALE: tl.constexpr,
    H: tl.constexpr,
    STREAM: tl.constexpr,
    LIMIT: tl.constexpr,
    KEPT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Probabilities of a tile; without `log_sums` each of its rows is a segment of its own. SCALE includes log2(e)."""
    pair = tl.program_id(2).to(tl.int64)
    v, h, t, offsets, columns, inside = _tile(V, T, J, H, M, N)
    dtype = tl.float64 if scores.dtype.element_ty == tl.float64 else tl.float32
    start = pair * V * J
    exists = inside & (t < tl.load(lengths + pair))[None, :]
    x = tl.load(scores + start + offsets, mask=exists, other=0.0).to(dtype)
    if log_sums is not None:
        if bias is not None:
            x += tl.load(bias + pair * J + columns, mask=inside, other=0.0)
        probability = tl.exp2(x * SCALE - tl.load(log_sums + pair * J + columns, mask=inside, other=float("inf")))
    else:
        if bias is not None:
            x += tl.load(bias + pair * J + columns, mask=exists, other=float("-inf"))
        else:
            x = tl.where(exists, x, float("-inf"))
        top = tl.maximum(tl.max(x, 1), -1e30) * SCALE  # finite even if the text is empty
        x = tl.exp2(x * SCALE - top[:, None])
        probability = x * (1 / tl.maximum(tl.sum(x, 1), 1e-30))[:, None]
    probability = probability.to(out.dtype.element_ty)
    tl.store(out + start + offsets, probability, mask=inside)
    if dropped is not None:
        keep = _keep(seed, pair, v, h, H, STREAM, LIMIT, M, N)
        probability = tl.where(keep, probability.to(dtype) * KEPT, 0.0)
        tl.store(dropped + start + offsets, probability.to(dropped.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    probabilities,
    gradient,
    delta,
    shift,
    seed,
    out,
    dropped,
    V,
    T,
    J,
    SCALE: tl.constexpr,
    H: tl.constexpr,
    STREAM: tl.constexpr,
    LIMIT: tl.constexpr,
    KEPT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Gradient of a tile of scores; without `delta` each of its rows is a segment of its own."""
    pair = tl.program_id(2).to(tl.int64)
    v, h, _, offsets, columns, inside = _tile(V, T, J, H, M, N)
    dtype = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    start = pair * V * J
    probability = tl.load(probabilities + start + offsets, mask=inside, other=0.0).to(dtype)
    g = tl.load(gradient + start + offsets, mask=inside, other=0.0).to(dtype)
    if shift is not None:
        g += tl.load(shift + pair * J + columns, mask=inside, other=0.0)
    if dropped is not None:
        keep = _keep(seed, pair, v, h, H, STREAM, LIMIT, M, N)
        g = tl.where(keep, g * KEPT, 0.0)
        kept = tl.where(keep, probability * KEPT, 0.0)
        tl.store(dropped + start + offsets, kept.to(dropped.dtype.element_ty), mask=inside)
    if delta is not None:
        g -= tl.load(delta + pair * J + columns, mask=inside, other=0.0)
    else:
        g -= tl.sum(probability * g, 1)[:, None]
    tl.store(out + start + offsets, (probability * g * SCALE).to(out.dtype.element_ty), mask=inside)
