"""Triton kernel of the loss over the masked rows: log-sum-exp, the label's place and the gradient, in place.

Logits come from memory once; the gradient, which overwrites them, reads them again while they are in the cache.
Shape letters: M masked rows, S vocabulary, Sp the logits' row stride (S rounded up to a multiple of 128).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import INTERPRETER, Arch


def launch_forward(
    logits: Tensor, bias: Tensor, labels: Tensor, vocabulary: int, gradient: bool, arch: Arch
) -> tuple[Tensor, Tensor]:
    """Losses float32 [M] and hits bool [M] of each row; with `gradient`, d losses / d logits overwrites the logits.

    logits [M,Sp], contiguous, without the bias; bias [Sp]; labels int64 [M]. What stands in columns from S on is not
    read as a value (but may be anything, so it must be memory of ours); the gradient there is 0.
    """
    rows, stride = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    hits = torch.empty(rows, dtype=torch.bool, device=logits.device)
    if rows:
        _cross_entropy[(rows,)](
            logits, bias, labels, losses, hits, stride, vocabulary, gradient, **config(stride, arch)
        )
    return losses, hits


def config(stride: int, arch: Arch) -> dict[str, int]:
    """Groups of 8 columns in a tile, and warps."""
    if arch == INTERPRETER:  # few large tiles, but more than one, as on a GPU
        return {"G": max(16, triton.next_power_of_2(stride) // 32), "num_warps": 4}
    # One program a row, about one a multiprocessor: many loads in flight in each matter more than many programs.
    return {"G": 1024, "num_warps": 16}


@triton.jit
def _cross_entropy(logits, bias, labels, losses, hits, stride, S, GRADIENT: tl.constexpr, G: tl.constexpr):
    """One row a program, in tiles of G groups of 8 neighbouring columns. A thread loads whole groups, so that maximum
    and sum of a group cost no exchange between threads; what is left of the groups is reduced once."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    known = (label >= 0) & (label < S)
    label = tl.where(known, label, 0).to(tl.int32)

    group = label // 8
    near = 8 * group + tl.arange(0, 8)
    neighbours = _scores(logits, bias, near, stride, S)
    own = tl.sum(tl.where(near == label, neighbours, 0.0), 0)
    # The lowest of the columns on top wins, so an equal one beats the label if it comes before: here within its group.
    beaten_near = tl.max(((neighbours == own) & (near < label)).to(tl.int32), 0)

    groups = tl.arange(0, G)
    columns = 8 * groups[:, None] + tl.arange(0, 8)[None, :]
    top = tl.full([G], -1e30, tl.float32)  # finite: a group without a column would give inf - inf
    total = tl.zeros([G], tl.float32)
    beaten = tl.zeros([G], tl.int32)
    for start in range(0, stride, 8 * G):
        x = _scores(logits, bias, start + columns, stride, S)
        highest = tl.max(x, 1)
        beaten |= ((highest > own) | ((highest == own) & (start // 8 + groups < group))).to(tl.int32)
        highest = tl.maximum(top, highest)
        total = total * tl.exp(top - highest) + tl.sum(tl.exp(x - highest[:, None]), 1)
        top = highest
    row_top = tl.max(top, 0)
    row_total = tl.sum(total * tl.exp(top - row_top), 0)
    tl.store(losses + row, tl.where(known, row_top - own + tl.log(row_total), float("nan")))
    tl.store(hits + row, known & ((tl.max(beaten, 0) | beaten_near) == 0))

    if GRADIENT:
        scale = 1 / row_total
        for start in range(0, stride, 8 * G):
            v = start + columns
            share = tl.exp(_scores(logits, bias, v, stride, S) - row_top) * scale
            slope = tl.where(v == label, share - 1, share)
            tl.store(logits + v, slope.to(logits.dtype.element_ty), mask=v < stride)


@triton.jit
def _scores(logits, bias, v, stride, S):
    """Logits + bias in float32, -inf in the padding. Masked by the stride, a multiple of 128, and not by S: only then
    is a load one of 128 bits."""
    x = tl.load(logits + v, mask=v < stride, other=0.0).to(tl.float32)
    b = tl.load(bias + v, mask=v < stride, other=0.0).to(tl.float32)
    return tl.where(v < S, x + b, float("-inf"))
