"""Attention in blocks against torch's plain operator in float64, its dropout by differences, and what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from golden_cases import relative
from meter_fast.kernels.cross_attention import blocked
from meter_fast.kernels.cross_attention.blocked import blocked_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

LIMITS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3}


def packed(dtype: torch.dtype, pairs: int = 3, tokens: int = 21, heads: int = 4, size: int = 8) -> torch.Tensor:
    """Queries, keys and values as one projection gives them."""
    torch.manual_seed(0)
    return torch.randn(pairs, tokens, 3, heads, size).to(dtype)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("mask", ["none", "keys", "causal"])
@pytest.mark.parametrize("block", [1, 21 * 21 * 3, 1 << 21], ids=["a head", "three heads", "a pair"])
def test_equals_the_plain_maths(dtype: torch.dtype, mask: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK", block)
    x = packed(dtype).requires_grad_()
    key_mask = None
    if mask == "keys":
        key_mask = (torch.arange(21) < torch.tensor([21, 5, 1])[:, None])[:, None, None]
    elif mask == "causal":
        key_mask = torch.ones(21, 21, dtype=torch.bool).tril()[None, None]
    found = blocked_attention(*x.permute(2, 0, 3, 1, 4).unbind(0), key_mask)
    assert found.transpose(1, 2).is_contiguous()
    exact = x.detach().double().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        plain = F.scaled_dot_product_attention(*exact.permute(2, 0, 3, 1, 4).unbind(0), attn_mask=key_mask)
    gradient = torch.randn_like(found)
    (ours,), (theirs,) = (torch.autograd.grad(y, of, gradient.to(y.dtype)) for y, of in ((found, x), (plain, exact)))
    assert relative(found, plain) < LIMITS[dtype] and relative(ours, theirs) < LIMITS[dtype]


def test_other_lengths_of_keys_and_one_query() -> None:
    query, key, value = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (1, 17, 17))
    plain = F.scaled_dot_product_attention(query, key, value)
    assert relative(blocked_attention(query, key, value), plain) < 1e-14


@pytest.mark.parametrize("block", [1, 1 << 21])
def test_backward_drops_what_forward_dropped(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK", block)
    parts = [x.requires_grad_() for x in packed(torch.float64, 2, 5, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)]

    def seeded(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        return blocked_attention(*inputs, None, 0.4)

    assert torch.autograd.gradcheck(seeded, parts)
    assert torch.equal(seeded(*parts), seeded(*parts))
    assert not torch.equal(blocked_attention(*parts, None, 0.4), seeded(*parts))


def test_keeps_no_scores() -> None:
    x = packed(torch.float32, tokens=64).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        blocked_attention(*x.permute(2, 0, 3, 1, 4).unbind(0), None, 0.1)
    assert sum(t.numel() for t in kept) <= x.numel() + 1  # queries, keys, values and a seed


def test_is_an_operator_like_others() -> None:
    parts = [x.requires_grad_() for x in packed(torch.float32, 1, 6, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)]
    mask = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    torch.library.opcheck(torch.ops.meter_fast.blocked_attention, (*parts, mask, None, 0.0))


@pytest.mark.parametrize("share", [1.0, -0.5])
def test_bad_share(share: float) -> None:
    with pytest.raises(ValueError, match="dropout="):
        blocked_attention(*packed(torch.float32).permute(2, 0, 3, 1, 4).unbind(0), None, share)
