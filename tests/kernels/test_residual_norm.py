"""Bias, dropout, residual sum and LayerNorm in one operator: float64, the exact mask, layouts, and torch's tools."""

import pytest
import torch
import torch.nn.functional as F
from golden_cases import relative
from interpreter_bf16 import install
from meter_fast.kernels.dropout import STREAM_RESIDUAL, keep_mask
from meter_fast.kernels.launch import INTERPRETER, Arch
from meter_fast.kernels.residual_norm import kernel, op, reference
from meter_fast.kernels.residual_norm.op import residual_norm
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

EPS = 1e-12
SEED = torch.tensor([0x3_1415_9265_3589])
NAMES = ("x", "bias", "residual", "weight", "shift")


@pytest.fixture(autouse=True)
def bf16() -> None:
    install()


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, parameters: torch.dtype | None = None
) -> dict[str, Tensor]:
    torch.manual_seed(shape[-1])
    width = shape[-1]
    values = (torch.randn(shape), torch.randn(width), torch.randn(shape), 1 + torch.randn(width), torch.randn(width))
    dtypes = (dtype, parameters or dtype, dtype, parameters or dtype, parameters or dtype)
    return {name: x.to(t).requires_grad_() for name, x, t in zip(NAMES, values, dtypes, strict=True)}


def by_hand(x: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, shift: Tensor, p: float) -> Tensor:
    """From torch's own operators; the mask from its plain form."""
    value = x if bias is None else x + bias
    if p:
        kept = keep_mask(SEED, 1, x.numel() // x.shape[-1], x.shape[-1], STREAM_RESIDUAL, p)
        value = value * kept.view(x.shape) / (1 - p)
    return F.layer_norm(residual + value, x.shape[-1:], weight, shift, EPS)


def values_and_gradients(y: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    grad = torch.randn(y.shape).to(y.dtype)
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    return {"y": y, **dict(zip(leaves, torch.autograd.grad(y, tuple(leaves.values()), grad), strict=True))}


def errors(y: Tensor, leaves: dict[str, Tensor], p: float) -> dict[str, float]:
    """Against float64 with the same gradient of y."""
    found = values_and_gradients(y, leaves)
    wide = {name: None if x is None else x.detach().double().requires_grad_() for name, x in leaves.items()}
    expected = values_and_gradients(by_hand(**wide, p=p), wide)
    return {name: relative(x, expected[name]) for name, x in found.items()}


@pytest.mark.parametrize("shape", [(37, 128), (3, 7, 192), (33, 768), (1, 8), (18, 1000), (5, 2048)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("form", ["kernel", "plain"])
def test_equals_float64(shape: tuple[int, ...], p: float, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "is_interpreted", lambda: form == "kernel")
    leaves = inputs(shape)
    y = residual_norm(**leaves, eps=EPS, dropout=p, seed=SEED)
    assert max(errors(y, leaves, p).values()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("parameters", [None, torch.float32], ids=["one dtype", "fp32 parameters"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_half_precision_is_no_worse_than_torch(dtype: torch.dtype, parameters: torch.dtype | None, p: float) -> None:
    leaves = inputs((37, 192), dtype, parameters)
    found = errors(residual_norm(**leaves, eps=EPS, dropout=p, seed=SEED), leaves, p)
    alike = {name: x.detach().to(dtype).requires_grad_() for name, x in leaves.items()}
    torch_alone = errors(by_hand(**alike, p=p), alike, p)
    assert all(found[name] <= 2 * torch_alone[name] for name in found), (found, torch_alone)
    assert max(found.values()) < 1e-2


def test_without_bias() -> None:
    leaves = inputs((9, 192)) | {"bias": None}
    assert max(errors(residual_norm(**leaves, eps=EPS, dropout=0.1, seed=SEED), leaves, 0.1).values()) < 2e-6


def test_large_mean_and_constant_rows() -> None:
    """Statistics in one pass (mean of squares less square of the mean) would lose every digit of the first."""
    leaves = inputs((4, 128))
    with torch.no_grad():
        leaves["residual"] += 3000
        y = residual_norm(**leaves, eps=EPS)
        assert relative(y, by_hand(**{name: x.double() for name, x in leaves.items()}, p=0)) < 1e-3
        flat = residual_norm(torch.ones(2, 128), None, torch.ones(2, 128), leaves["weight"], leaves["shift"], 1e-5)
        assert torch.equal(flat, leaves["shift"].expand(2, 128))


def test_reference_gradients() -> None:
    wide = [x.detach().double().requires_grad_() for x in inputs((3, 8)).values()]
    assert torch.autograd.gradcheck(lambda *x: reference.residual_norm(*x, EPS, 0.3, SEED), wide)


@pytest.mark.parametrize("layout", ["transposed", "first tokens", "every second row", "misaligned", "expanded"])
def test_layouts(layout: str) -> None:
    views = {
        "transposed": lambda x: x.transpose(0, 1),
        "first tokens": lambda x: x[:, :1],
        "every second row": lambda x: x[:, ::2],
        "misaligned": lambda x: x.flatten()[1 : 1 + 3 * 128].view(3, 128),
        "expanded": lambda x: x[:1].expand(3, *x.shape[1:]),
    }
    leaves = inputs((4, 6, 128))
    leaves |= {name: views[layout](leaves[name].detach()).requires_grad_() for name in ("x", "residual")}
    y = residual_norm(**leaves, eps=EPS, dropout=0.1, seed=SEED)
    assert y.is_contiguous()
    assert max(errors(y, leaves, 0.1).values()) < 2e-6


def test_gradient_of_any_layout() -> None:
    leaves = inputs((3, 5, 128))
    y = residual_norm(**leaves, eps=EPS)
    grad = torch.randn(128, 5, 3)
    for gradient in (grad.permute(2, 1, 0), torch.ones(()).expand(3, 5, 128)):
        found = torch.autograd.grad(y, tuple(leaves.values()), gradient, retain_graph=True)
        expected = torch.autograd.grad(y, tuple(leaves.values()), gradient.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_mask_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = {name: x.detach() for name, x in inputs((21, 192)).items()}

    def outputs(seed: Tensor) -> Tensor:
        y, normalised, rstd = kernel.launch_forward(*leaves.values(), EPS, 0.1, seed, True, INTERPRETER)
        return y, *kernel.launch_backward(leaves["x"], normalised, rstd, leaves["weight"], 0.1, seed, True, INTERPRETER)

    first = outputs(SEED)
    assert all(torch.equal(a, b) for a, b in zip(first, outputs(SEED), strict=True))
    assert not torch.equal(first[0], outputs(SEED + 1)[0])
    monkeypatch.setattr(kernel, "config", lambda *_, **__: {"C": 64, "R": 4})
    other = outputs(SEED)
    assert all(relative(a, b) < 1e-6 for a, b in zip(other, first, strict=True))
    assert torch.equal(other[2] == 0, first[2] == 0)  # where grad_x is zero is the mask


def test_share_of_dropout_and_drawn_seed() -> None:
    x = torch.randn(64, 128, requires_grad=True)
    zeros, ones = torch.zeros(64, 128), torch.ones(128)
    torch.manual_seed(5)
    first = residual_norm(x, None, zeros, ones, 0 * ones, EPS, 0.1)
    second = residual_norm(x, None, zeros, ones, 0 * ones, EPS, 0.1)
    (grad,) = torch.autograd.grad(first, x, x.detach())
    assert abs((grad == 0).float().mean().item() - 0.1) < 5 * (0.09 / grad.numel()) ** 0.5
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(residual_norm(x, None, zeros, ones, 0 * ones, EPS, 0.1), first)


def test_no_rows() -> None:
    leaves = inputs((0, 128))
    y = residual_norm(**leaves, eps=EPS, dropout=0.1)
    y.sum().backward()
    assert y.shape == (0, 128)
    assert not leaves["weight"].grad.any() and not leaves["bias"].grad.any()


def test_nothing_is_saved_without_gradients() -> None:
    leaves = inputs((3, 128))
    with torch.no_grad():
        arguments = (*leaves.values(), EPS, 0.0, None, False)
        _, normalised, rstd = torch.ops.meter_fast.residual_norm_forward(*arguments)
    assert normalised.numel() == rstd.numel() == 0
    assert not residual_norm(**{name: x.detach() for name, x in leaves.items()}, eps=EPS).requires_grad


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_torch_accepts_the_operators(p: float) -> None:
    leaves, seed = inputs((2, 3, 32)), SEED if p else None
    torch.library.opcheck(torch.ops.meter_fast.residual_norm_forward, (*leaves.values(), EPS, p, seed, True))
    plain = [x.detach() for x in leaves.values()]
    torch.library.opcheck(torch.ops.meter_fast.residual_norm_forward, (*plain, EPS, p, seed, False))
    saved = (plain[0], torch.randn(6, 32), torch.rand(6), plain[3])
    for with_bias in (True, False):
        torch.library.opcheck(torch.ops.meter_fast.residual_norm_backward, (*saved, p, seed, with_bias))


def test_compiled_for_any_number_of_rows() -> None:
    def twice(*leaves: Tensor) -> Tensor:
        return residual_norm(*leaves, EPS, 0.1, SEED) * 2

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 9):
        leaves, grad = tuple(inputs((rows, 32)).values()), torch.randn(rows, 32)
        found = torch.autograd.grad(compiled(*leaves), leaves, grad)
        expected = torch.autograd.grad(twice(*leaves), leaves, grad)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    drawn = torch.compile(lambda *x: residual_norm(*x, EPS, 0.1), fullgraph=True, backend="aot_eager")
    assert drawn(*leaves).shape == (9, 32)


def test_traced_for_a_gpu() -> None:
    with FakeTensorMode():
        x, residual = (torch.empty(2, 5, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        weight = torch.empty(32, device="cuda", requires_grad=True)
        y = residual_norm(x, weight, residual, weight, weight, EPS, 0.1)
        assert (y.shape, y.dtype, y.device, y.requires_grad) == (x.shape, x.dtype, x.device, True)
        saved = (x.new_empty(10, 32), x.new_empty(10, dtype=torch.float32), weight.detach())
        seed = torch.empty(1, dtype=torch.int64, device="cuda")
        grads = torch.ops.meter_fast.residual_norm_backward(y.detach(), *saved, 0.1, seed, True)
        assert [g.shape for g in grads] == [x.shape, x.shape, (3, 32)]


def test_autocast() -> None:
    leaves = inputs((7, 128))
    with torch.autocast("cpu", torch.bfloat16):
        first, second = (residual_norm(**leaves, eps=EPS, dropout=0.1, seed=SEED) for _ in range(2))
    found = values_and_gradients(first, leaves)
    assert [x.dtype for x in found.values()] == [torch.bfloat16] + [torch.float32] * 5
    assert 1e-4 < max(errors(second, leaves, 0.1).values()) < 1e-2


def test_activation_checkpointing_replays_the_mask() -> None:
    leaves = tuple(inputs((9, 128)).values())
    torch.manual_seed(3)
    expected = torch.autograd.grad(residual_norm(*leaves, EPS, 0.2).square().sum(), leaves)
    torch.manual_seed(3)
    y = checkpoint(residual_norm, *leaves, EPS, 0.2, use_reentrant=False)
    torch.manual_seed(4)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y.square().sum(), leaves), expected, strict=True))


@pytest.mark.parametrize("arch", [INTERPRETER, Arch(80), Arch(90)], ids=str)
def test_tiles_cover_every_width(arch: Arch) -> None:
    for width in range(8, op.MAX_WIDTH + 1, 8):
        tile = kernel.config(width, arch)
        chunks = -(-width // tile["C"])
        assert chunks <= 3
        assert (chunks - 1) * tile["C"] < width <= chunks * tile["C"]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("x", torch.zeros(3, 12)),
        ("x", torch.zeros(3, 2056)),
        ("x", torch.zeros(3, 32, dtype=torch.float64)),
        ("residual", torch.zeros(3, 32, dtype=torch.bfloat16)),
        ("residual", torch.zeros(2, 32)),
        ("bias", torch.zeros(31)),
        ("weight", torch.zeros(1, 32)),
        ("shift", torch.zeros(32, dtype=torch.int64)),
        ("dropout", 1.0),
    ],
)
def test_bad_input(argument: str, value: Tensor | float) -> None:
    with pytest.raises(ValueError, match=argument):
        residual_norm(**({**inputs((3, 32)), "eps": EPS} | {argument: value}))
