"""The masked-language-model loss against torch's cross-entropy and by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from golden_cases import relative
from meter_fast.kernels.mlm_loss.reference import mlm_loss


def test_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])
    loss, correct = mlm_loss(logits, torch.tensor([1, 1]))
    assert loss.item() == pytest.approx(math.log(4 / 3) + math.log(5.0), rel=1e-6)
    assert correct.item() == 1


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 2), (7, 33), (130, 1000)])
def test_equals_cross_entropy(rows: int, vocabulary: int) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(rows, vocabulary)).requires_grad_()
    labels = torch.randint(vocabulary, (rows,))
    loss, correct = mlm_loss(logits, labels)
    expected = F.cross_entropy(logits, labels, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert correct.item() == sum(int(row.argmax()) == label for row, label in zip(logits, labels.tolist(), strict=True))
    (found,), (golden,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
    assert relative(found, golden) < 1e-6


def test_no_rows_keep_the_graph() -> None:
    logits = torch.empty(0, 11, requires_grad=True)
    loss, correct = mlm_loss(logits, torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert (loss.item(), correct.item(), logits.grad.shape) == (0.0, 0, (0, 11))


def test_bfloat16_logits_are_summed_in_float32() -> None:
    """1000 equal rows: in bf16 the sum would stop growing at a few hundred."""
    logits = torch.zeros(1000, 8, dtype=torch.bfloat16)
    loss, _ = mlm_loss(logits, torch.zeros(1000, dtype=torch.int64))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1000 * math.log(8), rel=1e-5)
