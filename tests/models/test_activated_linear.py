"""The end of a feed-forward network in blocks, its input alone kept: numbers, gradients, how much is there at once."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meter_fast.models import activated_linear as module
from meter_fast.models.activated_linear import GELU, QUICK_GELU, ActivatedLinear, Activation
from meter_fast.training.activations import LiveBytes


def kept_bytes(work) -> tuple[Tensor, int]:
    """The result of `work` and the bytes of the tensors that autograd keeps for it, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    return result, sum(kept.values())


def applied(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """By a layer of these parameters, which stay the leaves that they are."""
    layer = ActivatedLinear(weight.shape[1], len(weight), bias is not None, activation)
    del layer.weight, layer.bias
    layer.weight, layer.bias = weight, bias
    return layer(x)


PLAIN = {"gelu": (GELU, F.gelu), "quick": (QUICK_GELU, lambda x: x * torch.sigmoid(1.702 * x))}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 5)


def made(shape: tuple[int, ...], biased: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, dtype=dtype), torch.randn(7, shape[-1], dtype=dtype)
    bias = torch.randn(7, dtype=dtype, requires_grad=True) if biased else None
    return x.requires_grad_(), weight.requires_grad_(), bias


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("shape", [(2, 6, 10), (10, 9), (1, 3), (0, 4)])
@pytest.mark.parametrize("biased", [True, False])
def test_numbers_and_gradients(name: str, shape: tuple[int, ...], biased: bool) -> None:
    """Against the plain form in float64: blocks that divide rows and columns, that do not, a single one, none."""
    activation, plain = PLAIN[name]
    x, weight, bias = made(shape, biased, torch.float64)
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    expected = F.linear(plain(x), weight, bias)
    found = applied(x, weight, bias, activation)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    pairs = zip(*(torch.autograd.grad(y.sin().sum(), leaves) for y in (found, expected)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PLAIN)
def test_bfloat16_differs_by_rounding(name: str) -> None:
    activation, plain = PLAIN[name]
    x, weight, bias = made((40, 32), True, torch.bfloat16)
    found = applied(x, weight, bias, activation)
    exact = F.linear(plain(x.double()), weight.double(), bias.double())
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=5e-2)
    for ours, theirs in zip(*(torch.autograd.grad(y.sum(), (x, weight, bias)) for y in (found, exact)), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-1)


@pytest.mark.parametrize("frozen", ["weight", "bias", "x"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    leaves = dict(zip(("x", "weight", "bias"), made((12, 8), True, torch.float32), strict=True))
    leaves[frozen].requires_grad_(False)
    applied(**leaves, activation=GELU).sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is None} == {frozen}


def test_a_layer_keeps_its_input_alone() -> None:
    """Of 32 rows of 64 values each; where it is told to keep, or under autocast, act(x), too."""
    layer, x = ActivatedLinear(64, 16, True, GELU), torch.randn(32, 64, requires_grad=True)

    def other_bytes() -> int:
        result, kept = kept_bytes(lambda: layer(x))
        assert result.requires_grad
        return kept - x.nbytes - layer.weight.nbytes

    assert other_bytes() == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert other_bytes() > 0
    layer.keep = True
    assert other_bytes() == x.nbytes


def test_no_wide_tensor_is_whole_but_the_gradient() -> None:
    """Bytes of both passes at once: in blocks the gradient of x and a part of act(x); else two and more of them."""
    layer = ActivatedLinear(256, 4, True, GELU)
    x = torch.randn(400, 256, requires_grad=True)
    peaks = {}
    for layer.keep in (False, True):
        with LiveBytes([x, *layer.parameters()]) as live:
            torch.autograd.grad(layer(x).sum(), (x, layer.weight))
        peaks[layer.keep] = live.peak / x.nbytes
    assert peaks[False] < 1.5
    assert peaks[True] > 1.9


def test_quick_gelu_keeps_its_input_alone() -> None:
    x = torch.randn(100, dtype=torch.float64, requires_grad=True)
    out, kept = kept_bytes(lambda: QUICK_GELU(x))
    assert kept == 8 * 100
    plain = x * torch.sigmoid(1.702 * x)
    assert torch.allclose(out, plain, rtol=1e-14)
    (ours,), (theirs,) = (torch.autograd.grad(y.sin().sum(), x) for y in (out, plain))
    assert torch.allclose(ours, theirs, rtol=1e-13)
