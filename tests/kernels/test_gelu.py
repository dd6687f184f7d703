"""GELU with the bias of the linear before it: float64, the tails, layouts, and torch's tools."""

import pytest
import torch
import torch.nn.functional as F
from golden_cases import relative
from interpreter_bf16 import install
from meter_fast.kernels.gelu import kernel, op, reference
from meter_fast.kernels.gelu.op import bias_gelu
from meter_fast.kernels.launch import INTERPRETER
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint


@pytest.fixture(autouse=True)
def bf16() -> None:
    install()


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, of_bias: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(shape[-1])
    x, bias = 2 * torch.randn(shape), torch.randn(shape[-1])
    return x.to(dtype).requires_grad_(), bias.to(of_bias or dtype).requires_grad_()


def values_and_gradients(y: Tensor, leaves: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return y, *torch.autograd.grad(y, leaves, torch.randn(y.shape).to(y.dtype))


def errors(y: Tensor, leaves: tuple[Tensor, Tensor]) -> list[float]:
    """Of output and gradients against float64 with the same gradient of the output."""
    wide = tuple(x.detach().double().requires_grad_() for x in leaves)
    expected = values_and_gradients(F.gelu(wide[0] + wide[1]), wide)
    return [relative(a, b) for a, b in zip(values_and_gradients(y, leaves), expected, strict=True)]


@pytest.mark.parametrize("shape", [(37, 192), (3, 7, 768), (1, 5), (70, 300)], ids=str)
@pytest.mark.parametrize("form", ["kernel", "plain"])
def test_equals_float64(shape: tuple[int, ...], form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "is_interpreted", lambda: form == "kernel")
    leaves = inputs(shape)
    assert max(errors(bias_gelu(*leaves), leaves)) < 5e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("of_bias", [None, torch.float32], ids=["one dtype", "fp32 bias"])
def test_half_precision_is_no_worse_than_torch(dtype: torch.dtype, of_bias: torch.dtype | None) -> None:
    leaves = inputs((67, 192), dtype, of_bias)
    found = errors(bias_gelu(*leaves), leaves)
    alike = tuple(x.detach().to(dtype).requires_grad_() for x in leaves)
    torch_alone = errors(F.gelu(alike[0] + alike[1]), alike)
    assert all(ours <= 2 * theirs for ours, theirs in zip(found, torch_alone, strict=True)), (found, torch_alone)
    assert max(found) < 1e-2


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # squares of 1e30 are meant to
def test_every_value_and_the_tails() -> None:
    """Point by point, not in the mean: no value is off by more than rounding, and far out nothing is left of the
    tail."""
    x = torch.cat([torch.linspace(-14, 14, 15991), torch.tensor([0.0, -0.0, 40, -40, 1e5, -1e5, 1e30, -1e30, 1])])[None]
    zero, one = torch.zeros(x.shape[1]), torch.ones_like(x)
    y = kernel.launch_forward(x, zero, INTERPRETER)
    slope, _ = kernel.launch_backward(one, x, zero, INTERPRETER)
    wide = x.double().requires_grad_()
    expected = F.gelu(wide)
    (expected_slope,) = torch.autograd.grad(expected.sum(), wide)
    assert ((y - expected).abs() <= 1.5e-7 * (1 + wide.abs())).all()
    assert ((slope - expected_slope).abs() <= 5e-7).all()
    near = (wide < 0) & (wide > -6)
    assert ((y / expected - 1)[near].abs() < 4e-3).all()  # the tail itself, small as it is


def test_reference_gradients() -> None:
    x, bias = (leaf.detach().double().requires_grad_() for leaf in inputs((5, 6)))
    assert torch.autograd.gradcheck(reference.bias_gelu, (x, bias))
    grad = torch.randn(5, 6, dtype=torch.float64)
    expected = torch.autograd.grad(reference.bias_gelu(x, bias), (x, bias), grad)
    assert all(relative(a, b) < 1e-12 for a, b in zip(reference.backward(grad, x, bias), expected, strict=True))


def test_layouts_and_no_rows() -> None:
    x, bias = inputs((4, 6, 192))
    for view in (x.transpose(0, 1), x[:, :1], x[:, ::2], x[:1].expand(3, 6, 192)):
        leaves = (view.detach().requires_grad_(), bias)
        y = bias_gelu(*leaves)
        assert y.is_contiguous()
        assert max(errors(y, leaves)) < 5e-7
    y = bias_gelu(x, bias)
    grad = torch.randn(192, 6, 4).permute(2, 1, 0)
    found, expected = (torch.autograd.grad(y, (x, bias), g, retain_graph=True) for g in (grad, grad.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    empty = torch.empty(0, 192, requires_grad=True)
    found = torch.autograd.grad(bias_gelu(empty, bias).sum(), (empty, bias))
    assert found[0].shape == (0, 192) and not found[1].any()


def test_torch_accepts_the_operators() -> None:
    x, bias = inputs((2, 3, 32))
    torch.library.opcheck(torch.ops.meter_fast.bias_gelu_forward, (x, bias))
    torch.library.opcheck(torch.ops.meter_fast.bias_gelu_backward, (torch.randn(2, 3, 32), x.detach(), bias.detach()))


def test_compiled_checkpointed_and_under_autocast() -> None:
    leaves = inputs((5, 32))
    compiled = torch.compile(lambda *x: bias_gelu(*x) * 2, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(2 * bias_gelu(*leaves).sum(), leaves)
    for y in (compiled(*leaves), 2 * checkpoint(bias_gelu, *leaves, use_reentrant=False)):
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y.sum(), leaves), expected, strict=True))
    weight = torch.randn(32, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = bias_gelu(F.linear(torch.randn(5, 16), weight), leaves[1])
    assert y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.sum(), leaves[1])[0].dtype == torch.float32


def test_traced_for_a_gpu() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 5, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        bias = torch.empty(32, device="cuda")
        y = bias_gelu(x, bias)
        assert (y.shape, y.dtype, y.device, y.requires_grad) == (x.shape, x.dtype, x.device, True)
        grads = torch.ops.meter_fast.bias_gelu_backward(y.detach(), x.detach(), bias)
        assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype), (bias.shape, torch.float32)]


@pytest.mark.parametrize(
    ("argument", "x", "bias"),
    [
        ("x", torch.zeros(3, 32, dtype=torch.float64), torch.zeros(32)),
        ("x", torch.zeros(()), torch.zeros(1)),
        ("bias", torch.zeros(3, 32), torch.zeros(1)),
        ("bias", torch.zeros(3, 32), torch.zeros(32, dtype=torch.int64)),
    ],
)
def test_bad_input(argument: str, x: Tensor, bias: Tensor) -> None:
    with pytest.raises(ValueError, match=rf"^{argument} "):
        bias_gelu(x, bias)
