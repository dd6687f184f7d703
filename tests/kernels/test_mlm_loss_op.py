"""The operator of the masked-language-model loss: float64, ties, padding, and torch's tools."""

import pytest
import torch
import torch.nn.functional as F
from golden_cases import relative
from interpreter_bf16 import install
from meter_fast.kernels.launch import INTERPRETER
from meter_fast.kernels.mlm_loss import kernel, op
from meter_fast.kernels.mlm_loss import reference as plain
from meter_fast.kernels.mlm_loss.op import linear_cross_entropy
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

# What stands in the padding is whatever memory held.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
SHAPES = [(5, 16, 1003), (9, 24, 1000), (1, 8, 640), (3, 8, 7), (33, 8, 2)]  # M, D, S


@pytest.fixture(autouse=True)
def bf16() -> None:
    install()


def inputs(m: int, d: int, s: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """rows, weight, bias (leaves), labels with both ends of the vocabulary among them."""
    torch.manual_seed(m + s)
    rows, weight, bias = (x.to(dtype).requires_grad_() for x in (torch.randn(m, d), torch.randn(s, d), torch.randn(s)))
    labels = torch.randint(s, (m,))
    labels[-1:] = s - 1
    labels[1:2] = 0
    return rows, weight, bias, labels


def float64(rows: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor]:
    """Loss and gradients of 0.37 * loss; logits."""
    leaves = [x.detach().double().requires_grad_() for x in (rows, weight, bias)]
    logits = F.linear(*leaves)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return [loss, *torch.autograd.grad(0.37 * loss, leaves)], logits


def errors(loss: Tensor, leaves: tuple[Tensor, ...], expected: list[Tensor]) -> list[float]:
    found = [loss, *torch.autograd.grad(0.37 * loss, leaves)]
    return [relative(x, y) for x, y in zip(found, expected, strict=True)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 2e-3)], ids=["fp32", "fp16"])
@pytest.mark.parametrize("form", ["kernel", "plain"])
def test_equals_float64(
    shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "is_interpreted", lambda: form == "kernel")
    *leaves, labels = inputs(*shape, dtype)
    expected, logits = float64(*leaves, labels)
    loss, correct = linear_cross_entropy(*leaves, labels)
    assert loss.dtype == torch.float32
    assert correct.item() == (logits.argmax(1) == labels).sum().item()
    assert max(errors(loss, leaves, expected)) < tolerance


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_is_no_worse_than_torch(shape: tuple[int, int, int]) -> None:
    *leaves, labels = inputs(*shape, torch.bfloat16)
    expected, _ = float64(*leaves, labels)
    found = errors(linear_cross_entropy(*leaves, labels)[0], leaves, expected)
    torch_alone = errors(F.cross_entropy(F.linear(*leaves).float(), labels, reduction="sum"), leaves, expected)
    assert found[0] < 1e-3  # rounding errors of few rows may cancel in one form and not in the other
    assert all(ours <= 2 * theirs for ours, theirs in zip(found[1:], torch_alone[1:], strict=True)), (
        found,
        torch_alone,
    )


def test_reference_gradients() -> None:
    *leaves, labels = (x.double() if x.is_floating_point() else x for x in inputs(3, 4, 11))
    leaves = [x.detach().requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(lambda *x: plain.linear_cross_entropy(*x, labels)[0], leaves)


def test_bias_may_be_wider_than_the_logits() -> None:
    """A bias of 1000.5 is not a bfloat16 number: only its float32 value gives the float64 loss."""
    rows, weight, _, labels = inputs(4, 8, 131, torch.bfloat16)
    bias = torch.full((131,), 1000.5)
    bias[labels] += 0.25
    expected, _ = float64(rows, weight, bias, labels)
    loss, _ = linear_cross_entropy(rows, weight, bias.requires_grad_(), labels)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-2)
    assert torch.autograd.grad(loss, bias)[0].dtype == torch.float32


@pytest.mark.parametrize("pair", [(3, 5), (8, 15), (3, 500), (0, 1002), (1000, 1002)], ids=str)
def test_first_of_equal_logits_is_on_top(pair: tuple[int, int]) -> None:
    logits = torch.zeros(2, 1024)
    logits[:, list(pair)] = 2.0
    _, hits = kernel.launch_forward(logits, torch.zeros(1024), torch.tensor(pair), 1003, False, INTERPRETER)
    assert hits.tolist() == [True, False]


@pytest.mark.parametrize("garbage", [1e4, float("nan"), float("inf")])
def test_padding_is_not_read_and_has_no_gradient(garbage: float) -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 1003) - 100
    labels = scores.argmax(1)
    logits = torch.full((4, 1024), garbage)
    logits[:, :1003] = scores
    losses, hits = kernel.launch_forward(logits, torch.zeros(1024), labels, 1003, True, INTERPRETER)
    assert hits.all()
    assert relative(losses, F.cross_entropy(scores.double(), labels, reduction="none")) < 2e-6
    assert not logits[:, 1003:].any()
    expected = torch.softmax(scores.double(), 1) - F.one_hot(labels, 1003)
    assert relative(logits[:, :1003], expected) < 2e-6


def test_large_and_infinite_logits() -> None:
    logits = torch.full((2, 128), -3e4)
    logits[0, 77], logits[1, :77] = 3e4, float("-inf")
    expected = F.cross_entropy(logits[:, :101].double(), torch.tensor([3, 100]), reduction="none")
    losses, _ = kernel.launch_forward(logits, torch.zeros(128), torch.tensor([3, 100]), 101, True, INTERPRETER)
    assert relative(losses, expected) < 1e-6
    assert logits.isfinite().all()


def test_no_rows() -> None:
    *leaves, labels = inputs(0, 8, 131)
    loss, correct = linear_cross_entropy(*leaves, labels)
    loss.backward()
    assert (loss.item(), correct.item()) == (0, 0)
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in leaves)


def test_gradient_is_kept_only_when_needed() -> None:
    rows, weight, bias, labels = (x.detach() for x in inputs(4, 8, 131))
    loss, _, slopes = torch.ops.meter_fast.mlm_loss_forward(rows, weight, bias, labels, False)
    assert slopes.numel() == 0
    assert loss.item() == linear_cross_entropy(rows, weight.requires_grad_(), bias, labels)[0].item()
    with torch.no_grad():
        assert not linear_cross_entropy(rows, weight, bias, labels)[0].requires_grad


def test_views_and_repeated_backward() -> None:
    rows, weight, bias, labels = inputs(5, 16, 131)
    wide, tall = rows.detach().repeat(1, 2)[:, 8:24].requires_grad_(), weight.detach().t().contiguous().t()
    expected, _ = float64(wide, tall, bias, labels)
    loss, _ = linear_cross_entropy(wide, tall.requires_grad_(), bias, labels)
    first = torch.autograd.grad(0.37 * loss, (wide, tall, bias), retain_graph=True)
    again = torch.autograd.grad(0.37 * loss, (wide, tall, bias))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert all(relative(x, y) < 2e-6 for x, y in zip(first, expected[1:], strict=True))


def test_torch_accepts_the_operators() -> None:
    rows, weight, bias, labels = inputs(4, 8, 131)
    torch.library.opcheck(torch.ops.meter_fast.mlm_loss_forward, (rows, weight, bias, labels, True))
    torch.library.opcheck(
        torch.ops.meter_fast.mlm_loss_forward, (*(x.detach() for x in (rows, weight, bias)), labels, False)
    )
    slopes = torch.randn(4, 256)
    torch.library.opcheck(
        torch.ops.meter_fast.mlm_loss_backward, (torch.tensor(0.5), slopes, rows.detach(), weight.detach())
    )


def test_compiled_for_any_number_of_rows() -> None:
    compiled = torch.compile(
        lambda *x: linear_cross_entropy(*x)[0] * 2, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for m in (4, 7):
        *leaves, labels = inputs(m, 8, 131)
        found = torch.autograd.grad(compiled(*leaves, labels), leaves)
        expected = torch.autograd.grad(2 * linear_cross_entropy(*leaves, labels)[0], leaves)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_traced_for_a_gpu() -> None:
    with FakeTensorMode():
        rows, weight = (torch.empty(n, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (4, 131))
        bias = torch.empty(131, device="cuda", requires_grad=True)
        labels = torch.empty(4, device="cuda", dtype=torch.int64)
        loss, correct = linear_cross_entropy(rows, weight, bias, labels)
        assert (loss.dtype, loss.device.type, correct.dtype) == (torch.float32, "cuda", torch.int64)
        assert loss.requires_grad and not correct.requires_grad
        slopes = torch.empty(4, 256, device="cuda", dtype=torch.bfloat16)
        found = torch.ops.meter_fast.mlm_loss_backward(loss.detach(), slopes, rows.detach(), weight.detach())
        for gradient, leaf in zip(found, (rows, weight, bias), strict=True):
            assert (gradient.shape, gradient.dtype, gradient.device) == (leaf.shape, leaf.dtype, leaf.device)


def test_autocast() -> None:
    *leaves, labels = inputs(4, 8, 131)
    expected, _ = float64(*leaves, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(*leaves, labels)
    found = torch.autograd.grad(0.37 * loss, leaves)
    assert [x.dtype for x in found] == [torch.float32] * 3
    assert 1e-4 < max(relative(x, y) for x, y in zip(found, expected[1:], strict=True)) < 1e-2


def test_activation_checkpointing() -> None:
    *leaves, labels = inputs(4, 8, 131)
    expected = torch.autograd.grad(linear_cross_entropy(*leaves, labels)[0], leaves)
    loss, _ = checkpoint(linear_cross_entropy, *leaves, labels, use_reentrant=False)
    assert all(torch.equal(x, y) for x, y in zip(torch.autograd.grad(loss, leaves), expected, strict=True))


@pytest.mark.parametrize("label", [-100, 131])
def test_label_outside(label: int) -> None:
    rows, weight, bias, labels = inputs(4, 8, 131)
    labels[2] = label
    with pytest.raises(ValueError, match=r"labels .*0\.\.130"):
        linear_cross_entropy(rows, weight, bias, labels)
    losses, hits = kernel.launch_forward(torch.zeros(4, 256), torch.zeros(256), labels, 131, True, INTERPRETER)
    assert losses.isnan().tolist() == [False, False, True, False]
    assert not hits[2]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("rows", torch.zeros(2, 2, 8)),
        ("weight", torch.zeros(131, 9)),
        ("weight", torch.zeros(131, 8, dtype=torch.float16)),
        ("bias", torch.zeros(130)),
        ("labels", torch.zeros(4, dtype=torch.int32)),
        ("labels", torch.zeros(3, dtype=torch.int64)),
    ],
)
def test_bad_input(argument: str, value: Tensor) -> None:
    arguments = dict(zip(("rows", "weight", "bias", "labels"), inputs(4, 8, 131), strict=True))
    with pytest.raises(ValueError, match=argument):
        linear_cross_entropy(**(arguments | {argument: value}))
