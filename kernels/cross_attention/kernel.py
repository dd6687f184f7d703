"""Direct cross-attention in Triton: one side of the attention, the text, fits one tile.

That gives what a general flash-attention cannot assume. Where the text is read (`short="key"`), the softmax of a row
lies in one tile: nothing is saved for backward, and one program holds dK and dV of a head while it passes over the
queries. Where the text reads (`short="query"`), all queries of a head are in registers: dK and dV of a tile of keys are
final, dQ stays in registers. So each backward is one kernel without atomics, and its bits do not change between runs.

The long side is M of every matrix product of four warps (on 16 rows each warp would compute the same); where the text
is M, it has a warp for every 16 rows. On sm_80 a long tile that two products read in different orientations is loaded
twice, the second time from cache (`RELOAD`): only so does Triton 3.8 pipeline it with cp.async. From sm_90 on both
products read one tile in shared memory.

Source: Vaswani et al. 2017, section 3.2.1; the online softmax of Dao et al. 2022 (FlashAttention), algorithm 1.
Shape letters: B pairs, H heads, K head size, N rows of all sequences of one side.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout import STREAM_IMAGE_TO_TEXT, STREAM_TEXT_TO_IMAGE, keep_tile, threshold
from ..launch import Arch
from ..segments import Segments

HEAD_SIZES = (32, 64, 128)
LONGEST_SHORT_SIDE = 64
TILE_BYTES = 64 * 64 * 2  # of the short side: a program that holds more in registers spills by the kilobyte
LOG2_E = tl.constexpr(1.4426950408889634)
IMAGE_TO_TEXT, TEXT_TO_IMAGE = tl.constexpr(STREAM_IMAGE_TO_TEXT), tl.constexpr(STREAM_TEXT_TO_IMAGE)


@dataclass(frozen=True)
class Config:
    """How one kernel is cut: rows of the long side that a step takes, warps of a program, steps loaded ahead."""

    block: int
    num_warps: int
    num_stages: int


def tile_of(longest: int) -> int:
    """Tile of the short side: the next power of two, at least 16 (the smallest that the matrix instructions take)."""
    return max(16, triton.next_power_of_2(longest))


def fits(longest: int, head_size: int, element_size: int) -> bool:
    """Whether a short side whose longest sequence has `longest` tokens fits one tile."""
    return longest <= LONGEST_SHORT_SIDE and tile_of(longest) * head_size * element_size <= TILE_BYTES


def config(short: str, backward: bool, tile: int, head_size: int, dtype: torch.dtype, arch: Arch) -> Config:
    """The tile configuration of a kernel; no mask of dropout depends on it."""
    if dtype == torch.float32:  # twice the shared memory, and no matrix instructions to feed
        return Config(32, 4, 1)
    if short == "query" and not backward:
        return Config(32, tile // 16, 2 if tile == 64 else 3)
    if short == "query" and tile == 64 and arch.capability >= 90:
        return Config(64, 4, 3)  # with fewer stages it spills
    if short == "key" and backward and head_size == 128 and arch.capability < 90:
        return Config(32, 8, 2)  # 64 rows do not fit the registers
    return Config(64, 8 if head_size == 128 else 4, 2)


def launch_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_segments: Segments,
    key_segments: Segments,
    short: str,
    dropout: float,
    seed: Tensor | None,
    arch: Arch,
) -> tuple[Tensor, Tensor]:
    """Output [Nq,H,K] and the log-sum-exp of the scores, to base 2 (see `empty_lse`).

    Arguments as for `op.cross_attention`, already checked; nothing here looks at the device.
    """
    (rows, heads, head_size), batch = query.shape, len(query_segments)
    out = torch.empty((rows, heads, head_size), dtype=query.dtype, device=query.device)
    tile = tile_of((key_segments if short == "key" else query_segments).longest)
    cut = config(short, False, tile, head_size, query.dtype, arch)
    lse = empty_lse(query, short)
    if batch == 0:
        return out.zero_(), lse
    common = (query, key, value, out, *_tables(query_segments, key_segments), seed, rows, *_strides(query, key, value))
    meta = _meta(dropout, head_size, tile, cut)
    if short == "key":
        tiles = triton.cdiv(query_segments.longest, cut.block)
        _forward_short_key[(max(tiles, 1), heads, batch)](*common, **meta)
    else:
        _forward_short_query[(heads, batch)](*common, lse, **meta)
    return out, lse


def launch_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    query_segments: Segments,
    key_segments: Segments,
    short: str,
    dropout: float,
    seed: Tensor | None,
    arch: Arch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous; grad [Nq,H,K], `out` and `lse` as `launch_forward` gave them."""
    (rows, heads, head_size), batch = query.shape, len(query_segments)
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    tile = tile_of((key_segments if short == "key" else query_segments).longest)
    cut = config(short, True, tile, head_size, query.dtype, arch)
    if batch == 0:
        return tuple(x.zero_() for x in grads)
    common = (query, key, value, grad, *grads, *_tables(query_segments, key_segments), seed, rows, key.shape[0])
    strides, meta = _strides(query, key, value, grad), _meta(dropout, head_size, tile, cut)
    meta["RELOAD"] = arch.capability < 90
    if short == "key":
        _backward_short_key[(heads, batch)](*common, *strides, **meta)
    else:
        _backward_short_query[(heads, batch)](*common, *strides, out, lse, **meta)
    return grads


def empty_lse(query: Tensor, short: str) -> Tensor:
    """[Nq,H] float32 for short="query"; nothing for short="key", whose backward computes the softmax again."""
    return query.new_empty(query.shape[:2] if short == "query" else 0, dtype=torch.float32)


def _tables(query_segments: Segments, key_segments: Segments) -> tuple[Tensor, ...]:
    return query_segments.starts, query_segments.lengths, key_segments.starts, key_segments.lengths


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _meta(dropout: float, head_size: int, tile: int, cut: Config) -> dict:
    return {
        "DROPOUT": dropout,
        "LIMIT": threshold(dropout),
        "D": head_size,
        "T": tile,
        "BLOCK": cut.block,
        "num_warps": cut.num_warps,
        "num_stages": cut.num_stages,
    }


@triton.jit
def _pair(q_starts, q_lengths, k_starts, k_lengths, b):
    """Starts and lengths of both sides of pair b. Where one side is empty nothing is read: both count as empty."""
    n_q, n_k = tl.load(q_lengths + b), tl.load(k_lengths + b)
    both = (n_q > 0) & (n_k > 0)
    return tl.load(q_starts + b), tl.where(both, n_q, 0), tl.load(k_starts + b), tl.where(both, n_k, 0)


@triton.jit
def _at(x, start, h, stride_row, stride_head):
    """Where the sequence that starts at row `start` begins in head h; no tensor's size limits the offset."""
    return x + start.to(tl.int64) * stride_row + h.to(tl.int64) * stride_head


@triton.jit
def _zero_rows(x, begin, end, h, heads, D: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, D)
    for first in range(begin, end, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        pointers = x + (rows.to(tl.int64)[:, None] * heads + h) * D + columns[None, :]
        tl.store(pointers, tl.zeros([BLOCK, D], x.dtype.element_ty), mask=rows[:, None] < end)


@triton.jit
def _zero_padding(x, starts, end, b, batch, rows, h, heads, D: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros into head h of the rows between pair b's last one (`end` is behind it) and the next pair's first, and
    before the first pair: each row of x [rows,H,D] is written once, by the program that stands before it."""
    following = tl.load(starts + b + 1, mask=b + 1 < batch, other=rows)
    _zero_rows(x, end, following, h, heads, D, BLOCK)
    if b == 0:
        _zero_rows(x, 0, tl.load(starts), h, heads, D, BLOCK)


@triton.jit
def _forward_short_key(
    Q, K, V, Out,
    q_starts, q_lengths, k_starts, k_lengths, seed, rows,
    q_row, q_head, k_row, k_head, v_row, v_head,
    DROPOUT: tl.constexpr, LIMIT: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries, H, B)."""
    h, b = tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    q_start, n_q, k_start, n_k = _pair(q_starts, q_lengths, k_starts, k_lengths, b)
    if tl.program_id(0) == 0:
        _zero_padding(Out, q_starts, q_start + n_q, b, tl.num_programs(2), rows, h, heads, D, BLOCK)
    if tl.program_id(0) * BLOCK >= n_q:
        return
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j, d = tl.arange(0, T), tl.arange(0, D)
    q = tl.load(_at(Q, q_start, h, q_row, q_head) + i[:, None] * q_row + d[None, :], mask=i[:, None] < n_q, other=0.0)
    k = tl.load(_at(K, k_start, h, k_row, k_head) + j[:, None] * k_row + d[None, :], mask=j[:, None] < n_k, other=0.0)
    v = tl.load(_at(V, k_start, h, v_row, v_head) + j[:, None] * v_row + d[None, :], mask=j[:, None] < n_k, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (LOG2_E * D**-0.5)
    scores = tl.where(j[None, :] < n_k, scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    scale = 1.0 / ((1.0 - DROPOUT) * tl.sum(weights, 1))
    if LIMIT > 0:
        kept = keep_tile(tl.load(seed), b * heads + h, i, tl.arange(0, T // 4), IMAGE_TO_TEXT, LIMIT, BLOCK, T)
        weights = tl.where(kept, weights, 0.0)
    out = tl.dot(weights.to(v.dtype), v, input_precision="ieee") * scale[:, None]
    o = _at(Out, q_start, h, heads * D, D) + i[:, None] * (heads * D) + d[None, :]
    tl.store(o, out.to(Out.dtype.element_ty), mask=i[:, None] < n_q)


@triton.jit
def _backward_short_key(
    Q, K, V, dO, dQ, dK, dV,
    q_starts, q_lengths, k_starts, k_lengths, seed, q_rows, k_rows,
    q_row, q_head, k_row, k_head, v_row, v_head, do_row, do_head,
    DROPOUT: tl.constexpr, LIMIT: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    RELOAD: tl.constexpr,
):  # fmt: skip
    """Grid (H, B): dK and dV stay in registers, transposed, while the queries pass by."""
    h, b = tl.program_id(0), tl.program_id(1)
    heads, batch = tl.num_programs(0), tl.num_programs(1)
    q_start, n_q, k_start, n_k = _pair(q_starts, q_lengths, k_starts, k_lengths, b)
    _zero_padding(dQ, q_starts, q_start + n_q, b, batch, q_rows, h, heads, D, BLOCK)
    _zero_padding(dK, k_starts, k_start + n_k, b, batch, k_rows, h, heads, D, BLOCK)
    _zero_padding(dV, k_starts, k_start + n_k, b, batch, k_rows, h, heads, D, BLOCK)
    j, d = tl.arange(0, T), tl.arange(0, D)
    k = tl.load(_at(K, k_start, h, k_row, k_head) + j[:, None] * k_row + d[None, :], mask=j[:, None] < n_k, other=0.0)
    v = tl.load(_at(V, k_start, h, v_row, v_head) + j[:, None] * v_row + d[None, :], mask=j[:, None] < n_k, other=0.0)
    q_at, do_at = _at(Q, q_start, h, q_row, q_head), _at(dO, q_start, h, do_row, do_head)
    dq_at = _at(dQ, q_start, h, heads * D, D)
    dk, dv = tl.zeros([D, T], tl.float32), tl.zeros([D, T], tl.float32)
    if LIMIT > 0:
        random = tl.load(seed)
    for first in range(0, n_q, BLOCK):
        i = first + tl.arange(0, BLOCK)
        q = tl.load(q_at + i[:, None] * q_row + d[None, :], mask=i[:, None] < n_q, other=0.0)
        do = tl.load(do_at + i[:, None] * do_row + d[None, :], mask=i[:, None] < n_q, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (LOG2_E * D**-0.5)
        scores = tl.where(j[None, :] < n_k, scores, float("-inf"))
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
        weights *= (1.0 / tl.sum(weights, 1))[:, None]
        d_weights = tl.dot(do, tl.trans(v), input_precision="ieee")
        read = weights
        if LIMIT > 0:
            kept = keep_tile(random, b * heads + h, i, tl.arange(0, T // 4), IMAGE_TO_TEXT, LIMIT, BLOCK, T)
            read = tl.where(kept, weights, 0.0)
            d_weights = tl.where(kept, d_weights * (1.0 / (1.0 - DROPOUT)), 0.0)
        d_scores = (weights * (d_weights - tl.sum(weights * d_weights, 1)[:, None])).to(q.dtype)
        do_t, q_t = tl.trans(do), tl.trans(q)
        if RELOAD:
            do_t = tl.load(do_at + i[None, :] * do_row + d[:, None], mask=i[None, :] < n_q, other=0.0)
            q_t = tl.load(q_at + i[None, :] * q_row + d[:, None], mask=i[None, :] < n_q, other=0.0)
        dv = tl.dot(do_t, read.to(do.dtype), dv, input_precision="ieee")
        dk = tl.dot(q_t, d_scores, dk, input_precision="ieee")
        dq = tl.dot(d_scores, k, input_precision="ieee") * D**-0.5
        tl.store(dq_at + i[:, None] * (heads * D) + d[None, :], dq.to(dQ.dtype.element_ty), mask=i[:, None] < n_q)
    out = j[None, :] * (heads * D) + d[:, None]
    tl.store(_at(dK, k_start, h, heads * D, D) + out, (dk * D**-0.5).to(dK.dtype.element_ty), mask=j[None, :] < n_k)
    dv *= 1.0 / (1.0 - DROPOUT)
    tl.store(_at(dV, k_start, h, heads * D, D) + out, dv.to(dV.dtype.element_ty), mask=j[None, :] < n_k)


@triton.jit
def _forward_short_query(
    Q, K, V, Out,
    q_starts, q_lengths, k_starts, k_lengths, seed, rows,
    q_row, q_head, k_row, k_head, v_row, v_head, LSE,
    DROPOUT: tl.constexpr, LIMIT: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (H, B): the keys pass by. Scores are query by key, 16 queries a warp, so that no softmax crosses warps."""
    h, b = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(0)
    q_start, n_q, k_start, n_k = _pair(q_starts, q_lengths, k_starts, k_lengths, b)
    _zero_padding(Out, q_starts, q_start + n_q, b, tl.num_programs(1), rows, h, heads, D, BLOCK)
    _zero_padding(LSE, q_starts, q_start + n_q, b, tl.num_programs(1), rows, h, heads, 1, BLOCK)
    i, d = tl.arange(0, T), tl.arange(0, D)
    q = tl.load(_at(Q, q_start, h, q_row, q_head) + i[:, None] * q_row + d[None, :], mask=i[:, None] < n_q, other=0.0)
    k_at, v_at = _at(K, k_start, h, k_row, k_head), _at(V, k_start, h, v_row, v_head)
    highest, total = tl.full([T], float("-inf"), tl.float32), tl.zeros([T], tl.float32)
    out = tl.zeros([T, D], tl.float32)
    if LIMIT > 0:
        random = tl.load(seed)
    for first in range(0, n_k, BLOCK):
        j = first + tl.arange(0, BLOCK)
        k = tl.load(k_at + j[:, None] * k_row + d[None, :], mask=j[:, None] < n_k, other=0.0)
        v = tl.load(v_at + j[:, None] * v_row + d[None, :], mask=j[:, None] < n_k, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (LOG2_E * D**-0.5)
        scores = tl.where(j[None, :] < n_k, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - new_highest)
        weights = tl.exp2(scores - new_highest[:, None])
        total = total * shrink + tl.sum(weights, 1)
        if LIMIT > 0:
            kept = keep_tile(random, b * heads + h, j, tl.arange(0, T // 4), TEXT_TO_IMAGE, LIMIT, BLOCK, T)
            weights = tl.where(tl.trans(kept), weights, 0.0)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        highest = new_highest
    total = tl.maximum(total, 1.0)  # the highest score alone gives 1; less only where there is no key
    scale = 1.0 / ((1.0 - DROPOUT) * total)
    o = _at(Out, q_start, h, heads * D, D) + i[:, None] * (heads * D) + d[None, :]
    tl.store(o, (out * scale[:, None]).to(Out.dtype.element_ty), mask=i[:, None] < n_q)
    tl.store(_at(LSE, q_start, h, heads, 1) + i * heads, highest + tl.log2(total), mask=i < n_q)


@triton.jit
def _backward_short_query(
    Q, K, V, dO, dQ, dK, dV,
    q_starts, q_lengths, k_starts, k_lengths, seed, q_rows, k_rows,
    q_row, q_head, k_row, k_head, v_row, v_head, do_row, do_head, Out, LSE,
    DROPOUT: tl.constexpr, LIMIT: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    RELOAD: tl.constexpr,
):  # fmt: skip
    """Grid (H, B): dQ stays in registers, transposed, while the keys pass by."""
    h, b = tl.program_id(0), tl.program_id(1)
    heads, batch = tl.num_programs(0), tl.num_programs(1)
    q_start, n_q, k_start, n_k = _pair(q_starts, q_lengths, k_starts, k_lengths, b)
    _zero_padding(dQ, q_starts, q_start + n_q, b, batch, q_rows, h, heads, D, BLOCK)
    _zero_padding(dK, k_starts, k_start + n_k, b, batch, k_rows, h, heads, D, BLOCK)
    _zero_padding(dV, k_starts, k_start + n_k, b, batch, k_rows, h, heads, D, BLOCK)
    i, d = tl.arange(0, T), tl.arange(0, D)
    q = tl.load(_at(Q, q_start, h, q_row, q_head) + i[:, None] * q_row + d[None, :], mask=i[:, None] < n_q, other=0.0)
    do_at = _at(dO, q_start, h, do_row, do_head) + i[:, None] * do_row + d[None, :]
    do = tl.load(do_at, mask=i[:, None] < n_q, other=0.0)
    o_at = _at(Out, q_start, h, heads * D, D) + i[:, None] * (heads * D) + d[None, :]
    o = tl.load(o_at, mask=i[:, None] < n_q, other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    lse = tl.load(_at(LSE, q_start, h, heads, 1) + i * heads, mask=i < n_q, other=0.0)
    k_at, v_at = _at(K, k_start, h, k_row, k_head), _at(V, k_start, h, v_row, v_head)
    dk_at, dv_at = _at(dK, k_start, h, heads * D, D), _at(dV, k_start, h, heads * D, D)
    dq = tl.zeros([D, T], tl.float32)
    if LIMIT > 0:
        random = tl.load(seed)
    for first in range(0, n_k, BLOCK):
        j = first + tl.arange(0, BLOCK)
        k = tl.load(k_at + j[:, None] * k_row + d[None, :], mask=j[:, None] < n_k, other=0.0)
        v = tl.load(v_at + j[:, None] * v_row + d[None, :], mask=j[:, None] < n_k, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * (LOG2_E * D**-0.5) - lse[None, :]
        weights = tl.exp2(tl.where(j[:, None] < n_k, scores, float("-inf")))
        d_weights = tl.dot(v, tl.trans(do), input_precision="ieee")
        read = weights
        if LIMIT > 0:
            kept = keep_tile(random, b * heads + h, j, tl.arange(0, T // 4), TEXT_TO_IMAGE, LIMIT, BLOCK, T)
            read = tl.where(kept, weights * (1.0 / (1.0 - DROPOUT)), 0.0)
            d_weights = tl.where(kept, d_weights * (1.0 / (1.0 - DROPOUT)), 0.0)
        d_scores = (weights * (d_weights - delta[None, :])).to(q.dtype)
        out = j[:, None] * (heads * D) + d[None, :]
        dv = tl.dot(read.to(do.dtype), do, input_precision="ieee")
        tl.store(dv_at + out, dv.to(dV.dtype.element_ty), mask=j[:, None] < n_k)
        dk = tl.dot(d_scores, q, input_precision="ieee") * D**-0.5
        tl.store(dk_at + out, dk.to(dK.dtype.element_ty), mask=j[:, None] < n_k)
        k_t = tl.trans(k)
        if RELOAD:
            k_t = tl.load(k_at + j[None, :] * k_row + d[:, None], mask=j[None, :] < n_k, other=0.0)
        dq = tl.dot(k_t, d_scores, dq, input_precision="ieee")
    dq_at = _at(dQ, q_start, h, heads * D, D) + i[None, :] * (heads * D) + d[:, None]
    tl.store(dq_at, (dq * D**-0.5).to(dQ.dtype.element_ty), mask=i[None, :] < n_q)
