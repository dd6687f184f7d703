"""The fused attention core against the plain maths, and the maths against a loop."""

import math

import pytest
import torch
from golden_cases import relative
from meter_fast.kernels.cross_attention import reference
from meter_fast.kernels.cross_attention.reference import attention, attention_form, attention_weights, fused_is_slow
from torch.nn.attention import SDPBackend, sdpa_kernel


def inputs(queries: int, keys: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8, dtype=dtype, requires_grad=True) for n in (queries, keys, keys))
    mask = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    mask[1, ..., 1 + keys // 2 :] = False
    return query, key, value, mask


def plain_maths(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """In float64, from exponentials."""
    scores = (query.double() @ key.double().transpose(-1, -2) / math.sqrt(query.shape[-1])).exp()
    scores = scores if mask is None else scores * mask
    return (scores / scores.sum(-1, keepdim=True)) @ value.double()


def test_which_form_is_used() -> None:
    assert attention_form("cpu", 50, 50, False, 0.1) == attention_form("cpu", 50, 50, True, 0.0) == "plain"
    assert attention_form("cpu", 325, 325, False, 0.0) == "fused"
    assert attention_form("cpu", 325, 325, False, 0.1) == attention_form("cpu", 325, 325, True, 0.0) == "blocked"
    assert attention_form("cuda", 1, 1, True, 0.1) == "fused"
    with sdpa_kernel(SDPBackend.MATH):  # whoever asks for torch's plain operator gets it
        assert attention_form("cpu", 325, 325, True, 0.1) == "fused"


def test_when_fused_bfloat16_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training everywhere, else on processors without matrix units; never in float32."""
    said = {}
    for units in (False, True):
        monkeypatch.setattr(reference, "MATRIX_UNITS", units)
        for dtype in (torch.float32, torch.bfloat16):
            for training in (False, True):
                query = torch.zeros(1, dtype=dtype, requires_grad=training)
                said[units, dtype == torch.bfloat16, training] = fused_is_slow(query)
    assert {case for case, slow in said.items() if slow} == {
        (False, True, False), (False, True, True), (True, True, True)
    }  # fmt: skip


def test_weights_by_hand() -> None:
    query, key, _, mask = inputs(2, 3)
    weights = attention_weights(query, key, mask)
    for pair in range(2):
        kept = mask[pair, 0, 0].sum()
        scores = [math.exp((query[pair, 1, 0] @ key[pair, 1, j]).item() / math.sqrt(8)) for j in range(kept)]
        expected = [score / sum(scores) for score in scores] + [0.0] * (3 - int(kept))
        assert weights[pair, 1, 0].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("queries", "keys"), [(5, 7), (1, 37), (17, 1), (13, 50)])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("form", ["fused", "plain", "blocked"])
def test_all_forms_equal_the_plain_maths(
    queries: int, keys: int, masked: bool, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "attention_form", lambda *_: form)
    query, key, value, mask = inputs(queries, keys, torch.float32)
    mask = mask if masked else None
    results = []
    for read in (attention(query, key, value, mask), plain_maths(query, key, value, mask)):
        gradients = torch.autograd.grad(
            (read * torch.arange(read.numel()).view_as(read).sin()).sum(), (query, key, value)
        )
        results.append((read, *gradients))
    for fused, plain in zip(*results, strict=True):
        # with a single key the gradients of query and key are zero up to rounding
        assert relative(fused, plain) < 2e-6 or (fused - plain).abs().max() < 1e-6


@pytest.mark.parametrize("form", ["fused", "plain", "blocked"])
def test_masked_keys_are_not_read(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "attention_form", lambda *_: form)
    query, key, value, mask = inputs(3, 9)
    with torch.no_grad():
        before = attention(query, key, value, mask)
        key[1, :, 5:] += 100
        value[1, :, 5:] += 100
        assert torch.equal(attention(query, key, value, mask), before)
        assert not torch.equal(attention(query, key, value), before)


def test_weights_are_float32_from_bfloat16() -> None:
    query, key, _, mask = inputs(3, 9, torch.bfloat16)
    weights = attention_weights(query, key, mask)
    assert weights.dtype == torch.float32
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-6)
    assert not weights[1, ..., 5:].any()


@pytest.mark.parametrize("form", ["fused", "plain", "blocked"])
def test_dropout_keeps_the_mean(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "attention_form", lambda *_: form)
    query, key, value, _ = inputs(4, 6, torch.float32)
    torch.manual_seed(0)
    mean = torch.stack([attention(query, key, value, None, 0.3) for _ in range(400)]).mean(0)
    assert relative(mean, attention(query, key, value)) < 0.1
    assert not torch.equal(attention(query, key, value, None, 0.3), attention(query, key, value, None, 0.3))
