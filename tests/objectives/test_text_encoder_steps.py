"""Pre-training with every text encoder: gradients, the size of the vocabulary, packed texts."""

import dataclasses

import pytest
import torch
from small_case import small_batch
from text_cases import small

from benchmarks.plain import PLAIN
from meter_fast.interop import original_name
from meter_fast.models.config import TEXT_NAMES, FusionConfig, ModelConfig, TextConfig, VisionConfig
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import JointLoss
from meter_fast.training.optimizer import GROUPS, group_of


def model_of(text: TextConfig, text_form: str = "padded", dropout: float = 0.0) -> Meter:
    torch.manual_seed(1)
    model = Meter(
        ModelConfig(
            VisionConfig(width=32, layers=1, heads=2, patch_size=8, image_size=24),
            dataclasses.replace(text, dropout=dropout),
            FusionConfig(width=16, layers=2, heads=2, dropout=dropout),
        ),
        kernels=dataclasses.replace(PLAIN, text=text_form),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_pretraining_step(name: str) -> None:
    """Forward and backward: every parameter gets a gradient, and the vocabulary is scored whole."""
    config = small(name)
    model, batch = model_of(config), small_batch(pad_id=config.pad_id)
    losses = JointLoss(model)(batch)
    losses.loss.backward()
    assert losses.loss.isfinite()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert model.mlm_head.decoder.out_features == config.vocab_size
    assert model.mlm_head(torch.randn(3, 16)).shape == (3, config.vocab_size)


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_packed_model_equals_padded(name: str) -> None:
    """Also with an encoder that takes padded texts alone: the fusion is then packed."""
    config = small(name)
    results = []
    for form in ("padded", "packed"):
        model, batch = model_of(config, form), small_batch(pad_id=config.pad_id)
        model, batch = model.double(), batch.to("cpu", torch.float64)
        losses = JointLoss(model)(batch)
        losses.loss.backward()
        assert model.kernels.text == form
        results.append((losses.loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (padded, gradients), (packed, packed_gradients) = results
    tolerance = 1e-5 if name == "deberta" else 1e-11  # its LayerNorm is single precision
    assert (padded - packed).abs() < tolerance
    for parameter, gradient in gradients.items():
        error = (gradient - packed_gradients[parameter]).abs().max()
        assert error < tolerance * gradient.abs().max().clamp_min(1), parameter


def test_texts_longer_than_clip_reads() -> None:
    model = model_of(small("clip"))
    ids = torch.full((1, 21), 7)
    with pytest.raises(ValueError, match=r"21 tokens exceeds the 20"):
        model.encode_text(ids, ids > 0)


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_optimizer_groups(name: str) -> None:
    """Biases and norms are not decayed, whatever an encoder calls them."""
    for parameter, value in model_of(small(name)).text.named_parameters():
        expected = "rest_no_decay" if value.dim() == 1 else "rest"
        assert GROUPS[group_of(original_name(f"text.{parameter}"))] == expected, parameter
