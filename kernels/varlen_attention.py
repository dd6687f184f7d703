"""Self-attention of packed texts: one function over whichever implementation is there.

On a GPU: flash-attn where it is installed, torch's own flash attention for packed sequences where it can (no dropout),
else this package's cross-attention kernel, which holds a text in one tile. On a CPU: padded, torch's dense operators.
"""

from importlib.util import find_spec

import torch
from meter_fast.kernels.cross_attention.op import cross_attention
from meter_fast.kernels.cross_attention.reference import attention
from meter_fast.kernels.segments import Segments
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
FLASH_ATTN = find_spec("flash_attn") is not None
TORCH_VARLEN = find_spec("torch.nn.attention.varlen") is not None


def varlen_backend(device_type: str, dtype: torch.dtype, dropout: float) -> str:
    """Which implementation `varlen_attention` takes: "flash-attn", "torch", "triton" or "padded"."""
    if device_type != "cuda":
        return "padded"
    if dtype in HALF and FLASH_ATTN:
        return "flash-attn"
    if dtype in HALF and dropout == 0 and TORCH_VARLEN:
        return "torch"
    return "triton"


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_segments: Segments,
    key_segments: Segments,
    dropout: float = 0.0,
) -> Tensor:
    """Sequence b of query [N,H,K] reads sequence b of key and value [M,H,K] -> [N,H,K].

    Both segments have no rows between their sequences. dropout: share of the weights that are dropped.
    """
    backend = varlen_backend(query.device.type, query.dtype, dropout)
    if backend == "padded":
        return _padded_attention(query, key, value, query_segments, key_segments, dropout)
    if backend == "triton":
        return cross_attention(query, key, value, query_segments, key_segments, "key", dropout)
    bounds = [_boundaries(query_segments), _boundaries(key_segments)]
    longest = [query_segments.longest, key_segments.longest]
    if backend == "torch":
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(query, key, value, *bounds, *longest)
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(query, key, value, *bounds, *longest, dropout_p=dropout, deterministic=True)


def _boundaries(segments: Segments) -> Tensor:
    return torch.cat([segments.starts, (segments.starts + segments.lengths)[-1:]])


def _padded_attention(
    query: Tensor, key: Tensor, value: Tensor, query_segments: Segments, key_segments: Segments, dropout: float
) -> Tensor:
    query_rows, queries = _places(query_segments, len(query))
    key_rows, keys = _places(key_segments, len(key))
    keys = keys | ~keys.any(1, keepdim=True)  # nothing is read of an empty sequence, and a softmax over nothing is NaN
    split = [x[rows].transpose(1, 2) for x, rows in ((query, query_rows), (key, key_rows), (value, key_rows))]
    read = attention(*split, keys[:, None, None, :], dropout).transpose(1, 2)
    return torch.zeros_like(query).index_copy(0, query_rows[queries], read[queries])


def _places(segments: Segments, rows: int) -> tuple[Tensor, Tensor]:
    """Row of each token of the padded form [B,T] int64, and which of them exist [B,T] bool."""
    step = torch.arange(segments.longest, device=segments.starts.device)
    exists = step < segments.lengths[:, None]
    return (segments.starts[:, None] + step).clamp(max=rows - 1).long(), exists
