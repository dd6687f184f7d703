"""Dropout by counters: whether a value is kept is a function of (seed, where it stands), of nothing else.

Forward, backward, every tile size, every kernel and the plain form therefore agree on the mask, and no mask is stored.
One call of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the counters
(column // 4, row, plane, STREAM) gives the bits of four neighbouring columns; there is no limit on sizes, as no index
is flattened. The key is the seed, drawn from torch's generator, so activation checkpointing replays it.

On a CPU that interprets no kernels nobody else has to agree, and Philox in torch's operators costs 30 ns a value: there
the seed starts a generator of torch, and 16 of its bits decide on a value (0.7 ns; `F.dropout` takes 5).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import is_interpreted

# Which use of random numbers a counter belongs to: two uses under one seed must not share bits.
STREAM_TEXT_TO_IMAGE, STREAM_IMAGE_TO_TEXT, STREAM_RESIDUAL = 0, 1, 2


HOST_STEPS = 1 << 16  # shares are multiples of its inverse on a CPU


def draw_seed(device: torch.device) -> Tensor:
    """A seed [1] int64 from torch's generator of `device`."""
    return torch.randint(2**62, (1,), device=device)


def threshold(p: float) -> int:
    """Of the 31-bit numbers, those below it are dropped. Raises ValueError unless 0 <= p < 1."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout={p}: a share of 0 or more and below 1 is needed")
    return round(p * 2**31)


@triton.jit
def keep_tile(seed, planes, rows, words, stream: tl.constexpr, limit: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Mask bool [M,N] of a tile: `rows` int32 [M], columns 4 * words + (0..3) with `words` int32 [N // 4], `planes` an
    int32 scalar or [M] for a plane each row; seed int64 scalar; limit = threshold(p)."""
    c0 = (words[None, :] + tl.zeros([M, N // 4], tl.int32)).to(tl.uint32)
    c1 = (rows[:, None] + tl.zeros([M, N // 4], tl.int32)).to(tl.uint32)
    c2 = (tl.zeros([M], tl.int32) + planes)[:, None] + tl.zeros([M, N // 4], tl.int32)
    c3 = tl.full([M, N // 4], stream, tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, c0, c1, c2.to(tl.uint32), c3)
    bits = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), [M, N])
    return (bits >> 1).to(tl.int32) >= limit


def keep_mask(seed: Tensor, planes: int, rows: int, columns: int, stream: int, p: float) -> Tensor:
    """The mask of this machine in plain form: bool [planes, rows, columns], True where a value is kept. seed int64 [1].
    Where kernels run, or are interpreted, it is theirs."""
    if seed.device.type == "cpu" and not is_interpreted():
        return host_mask(host_generator(seed, stream), (planes, rows, columns), p)
    device = seed.device
    words = (columns + 3) // 4
    shape = (planes, rows, words)
    c0 = torch.arange(words, device=device).expand(shape)
    c1 = torch.arange(rows, device=device)[:, None].expand(shape)
    c2 = torch.arange(planes, device=device)[:, None, None].expand(shape)
    bits = torch.stack(_philox(seed, c0, c1, c2, torch.full(shape, stream, device=device)), dim=-1)
    return ((bits >> 1) >= threshold(p)).flatten(2)[..., :columns]


def dropout(x: Tensor, p: float) -> Tensor:
    """x with a share p of its values dropped and the others scaled up; floating, any shape. On a CPU p is rounded to
    1 / 65536, values are scaled by what it is then, and backward draws the mask again."""
    if x.device.type != "cpu":
        return F.dropout(x, p)
    return _host_dropout(x, draw_seed(x.device), float(p)) if host_share(p) else x


@torch.library.custom_op("meter_fast::host_dropout", mutates_args=())
def _host_dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    kept = host_mask(host_generator(seed), x.shape, p)
    return (x * kept.view(torch.uint8)).mul_(HOST_STEPS / (HOST_STEPS - host_share(p)))


@_host_dropout.register_fake
def _(x, seed, p):
    return torch.empty_like(x)


def _host_dropout_context(ctx, inputs, output):
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _host_dropout_autograd(ctx, gradient):
    return _host_dropout(gradient, *ctx.saved_tensors, ctx.p), None, None


_host_dropout.register_autograd(_host_dropout_autograd, setup_context=_host_dropout_context)


def host_share(p: float) -> int:
    """Of HOST_STEPS equally likely numbers, those below it are dropped. Raises ValueError unless 0 <= p < 1, and for a
    share that would be rounded to 1."""
    threshold(p)
    share = round(p * HOST_STEPS)
    if share == HOST_STEPS:
        raise ValueError(f"dropout={p}: rounded to 1 / {HOST_STEPS} nothing would be kept")
    return share


def host_generator(seed: Tensor, stream: int = STREAM_RESIDUAL) -> torch.Generator:
    """A generator on the host that a seed [1] int64 and a stream start."""
    return torch.Generator().manual_seed(int(seed) * 4 + stream)


def host_mask(generator: torch.Generator, shape: Sequence[int], p: float) -> Tensor:
    """bool of `shape`, contiguous, True where a value is kept: the generator's next numbers."""
    count = math.prod(shape)
    bits = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    lowest = torch.iinfo(torch.int16).min
    return (bits.view(torch.int16)[:count] >= lowest + host_share(p)).view(tuple(shape))


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, rounds: int = 10) -> tuple[Tensor, ...]:
    """Philox4x32 on int64 tensors that hold 32-bit numbers."""
    low = 0xFFFFFFFF
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(rounds):
        # A product of two 32-bit numbers overflows int64 only by wrapping: its low and high halves are still exact
        # when each factor's halves are multiplied apart.
        high_b, low_b = _multiply(c2, 0xCD9E8D57)
        high_a, low_a = _multiply(c0, 0xD2511F53)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of x * factor, both 32-bit numbers in int64."""
    upper, lower = x * (factor >> 16), x * (factor & 0xFFFF)
    middle = upper + (lower >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)
