"""The mask of counter-based dropout against an independent Philox, its share, and the two forms against each other."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from meter_fast.kernels import dropout as room
from meter_fast.kernels.dropout import (
    draw_seed,
    dropout,
    host_generator,
    host_mask,
    host_share,
    keep_mask,
    keep_tile,
    threshold,
)


def philox_by_hand(key: int, counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x32-10 on Python's integers (Salmon et al. 2011, section 3.3)."""
    c, k = list(counter), [key % 2**32, key >> 32]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_known_answers():
    # Random123 1.14, kat_vectors: philox4x32 10
    assert philox_by_hand(0, (0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    low = 2**32 - 1
    assert philox_by_hand(2**64 - 1, (low, low, low, low)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**62 - 1, 0x123456789ABCDEF])
def test_plain_mask_is_philox(seed: int):
    p, stream = 0.37, 1
    mask = keep_mask(torch.tensor([seed]), planes=2, rows=3, columns=7, stream=stream, p=p)
    for plane in range(2):
        for row in range(3):
            for column in range(7):
                bits = philox_by_hand(seed, (column // 4, row, plane, stream))[column % 4]
                assert mask[plane, row, column].item() == (bits / 2**32 >= threshold(p) / 2**31)


@triton.jit
def _store_tile(out, seed, plane, row, word, limit: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    kept = keep_tile(tl.load(seed), plane, row + tl.arange(0, M), word + tl.arange(0, N // 4), 2, limit, M, N)
    tl.store(out + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], kept)


@pytest.mark.parametrize("tile", [(16, 16), (32, 64), (4, 4)])
def test_tiles_are_cut_from_the_plain_mask(tile: tuple[int, int]):
    m, n = tile
    seed = torch.tensor([0x3_1415_9265_3589])
    mask = keep_mask(seed, planes=6, rows=40, columns=96, stream=2, p=0.2)
    out = torch.zeros(m, n, dtype=torch.bool)
    _store_tile[(1,)](out, seed, 5, 8, 4, threshold(0.2), m, n)
    assert torch.equal(out, mask[5, 8 : 8 + m, 16 : 16 + n])


def test_share_and_independence():
    seed = draw_seed(torch.device("cpu"))
    for p in (0.1, 0.5):
        kept = keep_mask(seed, planes=8, rows=200, columns=200, stream=0, p=p).float()
        sigma = (p * (1 - p) / kept.numel()) ** 0.5
        assert abs(kept.mean().item() - (1 - p)) < 5 * sigma
        other = keep_mask(seed, planes=8, rows=200, columns=200, stream=1, p=p).float()
        assert abs(np.corrcoef(kept.flatten(), other.flatten())[0, 1]) < 5 / kept.numel() ** 0.5


@pytest.mark.parametrize("p", [1.0, -0.1, float("nan")])
def test_bad_share(p: float):
    with pytest.raises(ValueError, match="dropout="):
        threshold(p)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.0])
@pytest.mark.parametrize("count", [1, 4 * 50_000 + 3])
def test_share_of_the_host_mask(p: float, count: int):
    kept = host_mask(host_generator(draw_seed(torch.device("cpu"))), (count,), p)
    assert kept.shape == (count,) and kept.dtype == torch.bool
    sigma = (p * (1 - p) / count) ** 0.5
    assert abs(kept.double().mean().item() - (1 - p)) <= 5 * sigma + 1 / 65536
    for lag in range(1, 5) if count > 1 and p else ():  # four neighbours come from one number
        assert abs(np.corrcoef(kept[lag:].double(), kept[:-lag].double())[0, 1]) < 5 / count**0.5


def test_host_masks_differ_by_seed_and_stream_and_repeat():
    masks = [host_mask(host_generator(torch.tensor([seed]), stream), (8, 100), 0.5)
             for seed, stream in ((1, 0), (1, 1), (2, 0), (2**62 - 1, 2))]  # fmt: skip
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    assert torch.equal(masks[0], host_mask(host_generator(torch.tensor([1]), 0), (8, 100), 0.5))


def test_the_mask_of_a_machine_without_kernels(monkeypatch: pytest.MonkeyPatch):
    seed = torch.tensor([5])
    counters = keep_mask(seed, 2, 30, 7, 1, 0.5)
    monkeypatch.setattr(room, "is_interpreted", lambda: False)
    assert torch.equal(keep_mask(seed, 2, 30, 7, 1, 0.5), host_mask(host_generator(seed, 1), (2, 30, 7), 0.5))
    assert not torch.equal(keep_mask(seed, 2, 30, 7, 1, 0.5), counters)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dropout_scales_and_repeats_in_backward(dtype: torch.dtype):
    x = torch.randn(70, 50, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.3)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    scale = 65536 / (65536 - host_share(0.3))
    kept = y != 0
    assert torch.equal(gradient, kept * torch.tensor(scale, dtype=dtype))
    assert torch.allclose(y, x * scale * kept, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert abs(kept.double().mean() - 0.7) < 0.05
    assert not torch.equal(dropout(x, 0.3), y)
    assert dropout(x, 0.0) is x


def test_dropout_is_an_operator_like_others():
    x = torch.randn(3, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.meter_fast.host_dropout, (x, torch.tensor([3]), 0.5))


def test_a_share_that_keeps_nothing():
    with pytest.raises(ValueError, match="nothing would be kept"):
        host_share(1 - 1e-9)
