"""The layer that ends each part of a fusion layer, in torch's operators."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from meter_fast.kernels.dropout import dropout as drop

from meter_fast.models.blocks import ResidualNorm
from meter_fast.models.config import tiny

CONFIG = tiny().fusion


@pytest.mark.parametrize("dropout", [0.0, 1e-9, 0.3])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_only_what_dropout_made_is_written_over(dropout: float, training: bool, autocast: bool) -> None:
    """1e-9 is rounded to none: dropout gives what it was given. Under autocast the residual is the wider one."""
    norm = ResidualNorm(replace(CONFIG, dropout=dropout), "reference").train(training)
    torch.manual_seed(0)
    residual = torch.randn(3, 5, CONFIG.width)
    x = torch.randn(3, 5, CONFIG.width, dtype=torch.bfloat16 if autocast else torch.float32, requires_grad=True)
    given = x.detach().clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.manual_seed(1)
        found = norm(x, None, residual)
        torch.manual_seed(1)
        dropped = drop(x, dropout) if training else x
        expected = F.layer_norm(residual + dropped, (CONFIG.width,), norm.weight, norm.bias, norm.eps)
    assert torch.equal(x, given)
    assert torch.equal(found, expected)
    for ours, plain in zip(
        *(torch.autograd.grad(y.sin().sum(), (x, norm.weight)) for y in (found, expected)), strict=True
    ):
        assert torch.equal(ours, plain)
