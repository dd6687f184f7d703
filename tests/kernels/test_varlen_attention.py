"""Attention of packed sequences by each implementation that is there, against one sequence at a time."""

import pytest
import torch
from meter_fast.kernels import varlen_attention as module
from meter_fast.kernels.cross_attention.reference import attention
from meter_fast.kernels.segments import Segments
from torch import Tensor

LENGTHS = (5, 1, 8, 13)


def packed(lengths: tuple[int, ...], device: str = "cpu") -> Segments:
    boundaries = torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32)
    return Segments.packed(boundaries, max(lengths))


def leaves(dtype: torch.dtype, device: str = "cpu", heads: int = 2, size: int = 32) -> list[Tensor]:
    torch.manual_seed(3)
    wide = torch.randn(sum(LENGTHS), 3, heads, size, dtype=torch.float64)
    return [x.to(device, dtype).requires_grad_() for x in wide.unbind(1)]


def one_by_one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    parts = zip(*(x.transpose(0, 1).split(LENGTHS, 1) for x in (query, key, value)), strict=True)
    return torch.cat([attention(q[None], k[None], v[None])[0] for q, k, v in parts], 1).transpose(0, 1)


def check(dtype: torch.dtype, device: str, tolerance: float) -> None:
    exact = leaves(torch.float64)
    expected = one_by_one(*exact)
    slope = torch.randn(expected.shape, dtype=torch.float64)
    expected.backward(slope)
    given = leaves(dtype, device)
    found = module.varlen_attention(*given, packed(LENGTHS, device), packed(LENGTHS, device))
    found.backward(slope.to(device, dtype))
    pairs = [(found, expected), *((x.grad, y.grad) for x, y in zip(given, exact, strict=True))]
    for value, target in pairs:
        assert (value.double().cpu() - target).norm() <= tolerance * target.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_padded(dtype: torch.dtype, tolerance: float):
    assert module.varlen_backend("cpu", dtype, 0.0) == "padded"
    check(dtype, "cpu", tolerance)


def test_triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "varlen_backend", lambda *_: "triton")
    check(torch.float32, "cpu", 1e-6)


def test_first_tokens_read_all():
    """Queries and keys of different lengths: what a classifier asks of the last layer."""
    query, key, value = leaves(torch.float64)
    firsts = packed(LENGTHS).starts.long()
    one = Segments.padded(len(LENGTHS), 1, query.device)
    found = module.varlen_attention(query[firsts], key, value, one, packed(LENGTHS))
    assert (found - one_by_one(query, key, value)[firsts]).abs().max() < 1e-14


def test_an_empty_sequence_reads_and_gives_nothing():
    query, key, value = leaves(torch.float64)
    lengths = (5, 0, 1, 8, 13)
    found = module.varlen_attention(query, key, value, packed(lengths), packed(lengths))
    assert (found - one_by_one(query, key, value)).abs().max() < 1e-14
    found.sum().backward()
    assert all(x.grad.isfinite().all() for x in (query, key, value))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash-attn", "torch", "triton"])
def test_on_a_gpu(backend: str, monkeypatch: pytest.MonkeyPatch):
    if backend == "flash-attn":
        pytest.importorskip("flash_attn")
    monkeypatch.setattr(module, "varlen_backend", lambda *_: backend)
    check(torch.bfloat16, "cuda", 2e-2)
