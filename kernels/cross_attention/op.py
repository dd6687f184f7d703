"""Direct cross-attention as an operator of torch: Triton on CUDA, the plain form on a CPU.

Autograd, torch.compile (also with fullgraph), fake tensors and activation checkpointing work with it.
"""

import torch
from torch import Tensor

from ..dropout import draw_seed, threshold
from ..launch import arch_of, is_interpreted
from ..segments import Segments
from .kernel import HEAD_SIZES, empty_lse, fits, launch_backward, launch_forward
from .reference import ragged_attention, ragged_attention_backward

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_segments: Segments,
    key_segments: Segments,
    short: str,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """softmax(Q Kᵀ / √K) V of B pairs of sequences, queries of pair b reading the keys of pair b: [Nq,H,K], contiguous.

    query [Nq,H,K], key and value [Nk,H,K]: rows of all sequences, as views of padded tensors or packed; bfloat16,
    float16 or float32 (sums are float32), K 32, 64 or 128, any strides but a contiguous last dimension. Segments: in
    ascending order, without overlap. Rows in no segment, and queries whose pair has no key, get zeros, and give no
    gradient. short: "key" where the text is read, "query" where it reads. The text fits one tile up to 64 tokens
    (`Segments.longest`), up to 32 in float32 or with K = 128, 16 with both; beyond that the plain form computes, and
    stores the weights.
    dropout: share of the weights that are dropped, by the mask of `dropout.keep_mask` with rows image tokens, columns
    text tokens, planes b * H + h; seed int64 [1] on the device, None: drawn from torch's generator.

    Raises ValueError for anything else. Source: Vaswani et al. 2017, section 3.2.1.
    """
    _check(query, key, value, query_segments, key_segments, short, dropout, seed)
    if dropout > 0 and seed is None:
        seed = draw_seed(query.device)
    if not fits((key_segments if short == "key" else query_segments).longest, query.shape[2], query.element_size()):
        return ragged_attention(query, key, value, query_segments, key_segments, short, dropout, seed)
    tables = (query_segments.starts, query_segments.lengths, key_segments.starts, key_segments.lengths)
    longest = (query_segments.longest, key_segments.longest)
    return _forward(query, key, value, *tables, *longest, short, dropout, seed)[0]


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_segments: Segments,
    key_segments: Segments,
    short: str,
    dropout: float,
    seed: Tensor | None,
) -> None:
    threshold(dropout)
    if short not in ("query", "key"):
        raise ValueError(f'short={short!r}: "query" (the text reads) or "key" (the text is read) is needed')
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 3 or x.shape[1:] != query.shape[1:]:
            raise ValueError(f"{name} is {list(x.shape)}: [rows, heads, head size] as of query {list(query.shape)}")
        if x.dtype not in DTYPES or x.dtype != query.dtype:
            raise ValueError(f"{name} is {x.dtype}, query {query.dtype}: one of {DTYPES} for all; convert with .to()")
        if x.stride(2) != 1:
            raise ValueError(f"{name} has strides {x.stride()}: the last must be 1; use .contiguous()")
    if query.shape[2] not in HEAD_SIZES:
        raise ValueError(f"head size {query.shape[2]}: the kernels take {HEAD_SIZES}; use reference.ragged_attention")
    if key.shape != value.shape:
        raise ValueError(f"key is {list(key.shape)}, value {list(value.shape)}: one shape is needed")
    if len(query_segments) != len(key_segments):
        raise ValueError(f"query_segments has {len(query_segments)} sequences, key_segments {len(key_segments)}")
    for name, segments in (("query_segments", query_segments), ("key_segments", key_segments)):
        for x in (segments.starts, segments.lengths):
            if x.dtype != torch.int32 or x.device != query.device:
                raise ValueError(f"{name} is {x.dtype} on {x.device}: int32 on {query.device} is needed; use .to()")
    if seed is not None and (seed.dtype != torch.int64 or seed.shape != (1,) or seed.device != query.device):
        raise ValueError(f"seed is {seed.dtype} {list(seed.shape)} on {seed.device}: use dropout.draw_seed(device)")


@torch.library.custom_op("meter_fast::cross_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_starts: Tensor,
    q_lengths: Tensor,
    k_starts: Tensor,
    k_lengths: Tensor,
    longest_query: int,
    longest_key: int,
    short: str,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [Nq,H,K] and the log-sum-exp that the backward of short="query" reads (see `launch_forward`)."""
    sides = Segments(q_starts, q_lengths, longest_query), Segments(k_starts, k_lengths, longest_key)
    if query.is_cuda or is_interpreted():
        return launch_forward(query, key, value, *sides, short, dropout, seed, arch_of(query))
    return ragged_attention(query, key, value, *sides, short, dropout, seed), empty_lse(query, short).zero_()


@torch.library.custom_op("meter_fast::cross_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    q_starts: Tensor,
    q_lengths: Tensor,
    k_starts: Tensor,
    k_lengths: Tensor,
    longest_query: int,
    longest_key: int,
    short: str,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous; out and lse are needed for short="query" only."""
    sides = Segments(q_starts, q_lengths, longest_query), Segments(k_starts, k_lengths, longest_key)
    grad = grad if grad.stride(2) == 1 else grad.contiguous()
    if query.is_cuda or is_interpreted():
        return launch_backward(grad, query, key, value, out, lse, *sides, short, dropout, seed, arch_of(query))
    return ragged_attention_backward(grad, query, key, value, *sides, short, dropout, seed)


@_forward.register_fake
def _(query: Tensor, *inputs: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), empty_lse(query, short=inputs[8])


@_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *inputs: object) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, longest_query, longest_key, short, dropout, seed = inputs
    ctx.save_for_backward(*tensors, seed, *(output if short == "query" else (None, None)))
    ctx.options = longest_query, longest_key, short, dropout


def _gradients(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, *tables, seed, out, lse = ctx.saved_tensors
    gradients = _backward(grad, query, key, value, out, lse, *tables, *ctx.options, seed)
    return *gradients, *[None] * 9


_forward.register_autograd(_gradients, setup_context=_save)
