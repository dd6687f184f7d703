"""Sizes that cannot work are refused where they are written down."""

import dataclasses

import pytest
import torch

from meter_fast.models.config import FusionConfig, TextConfig, VisionConfig, base, tiny
from meter_fast.models.meter import Meter


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VisionConfig(width=100, heads=12), "vision.width=100 is not a multiple of vision.heads=12"),
        (lambda: VisionConfig(image_size=300), "vision.image_size=300 .*use 288 or 304"),
        (lambda: VisionConfig(patch_size=14, image_size=224 + 7), "patch_size=14: use 224 or 238"),
        (lambda: VisionConfig(image_size=8), "vision.image_size=8 .*use 16 or 32"),
        (lambda: VisionConfig(drop_path=1.0), "vision.drop_path=1.0"),
        (lambda: VisionConfig("swin", layers=6), "vision.layers=6 does not suit vision.name=swin: use 7 or more"),
        (lambda: VisionConfig("swin", heads=12, layers=8, patch_size=32), "vision.heads=12 .*a multiple of 8"),
        (lambda: VisionConfig("swin", heads=32, width=1024, patch_size=12), "vision.patch_size=12 .*a multiple of 8"),
        (lambda: VisionConfig("volo", layers=12), "vision.layers=12 .*volo: use a multiple of 9"),
        (lambda: VisionConfig("volo", layers=18, width=96), "vision.width=96 .*a multiple of 64"),
        (lambda: VisionConfig("volo", layers=18, patch_size=12), "vision.patch_size=12 .*8, 16 or 32"),
        (lambda: TextConfig(heads=0), "text.heads=0"),
        (lambda: TextConfig(vocab_size=1), "text.pad_id=1 is outside the vocabulary of 1"),
        (lambda: TextConfig(max_positions=2), "text.max_positions=2"),
        (lambda: FusionConfig(layers=0), "fusion.layers=0"),
        (lambda: FusionConfig(token_types=1), "fusion.token_types=1"),
    ],
)
def test_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_encoder() -> None:
    with pytest.raises(ValueError, match=r"vision.name='resnet' is unknown: use one of clip_vit, vit, .*swin"):
        Meter(dataclasses.replace(tiny(), vision=dataclasses.replace(tiny().vision, name="resnet")))
    with pytest.raises(ValueError, match=r"text.name='xlnet' is unknown: use one of roberta, bert"):
        Meter(dataclasses.replace(tiny(), text=dataclasses.replace(tiny().text, name="xlnet")))


def test_base_is_the_published_size() -> None:
    """358,530,139 parameters are published; ours lacks those that the published model never computes with."""
    with torch.device("meta"):
        model = Meter(base())
    never_computed = 77 * 512 + 2 * 512 + 768 * 768 + 768
    assert sum(parameter.numel() for parameter in model.parameters()) == 358_530_139 - never_computed
    assert base().vision.tokens == 325
    assert base().text.max_length == 512


def test_presets_run_at_other_sizes() -> None:
    """Nothing assumes the preset's width, depth, resolution or patch size."""
    small = tiny(vocab_size=50)
    config = dataclasses.replace(
        small,
        vision=VisionConfig(width=40, layers=1, heads=2, patch_size=32, image_size=96),
        fusion=FusionConfig(width=24, layers=1, heads=3, dropout=0.0),
    )
    model = Meter(config)
    ids = torch.randint(5, 50, (2, 7))
    with torch.no_grad():
        image, text = model.encode_image(torch.randn(2, 3, 96, 96)), model.encode_text(ids, ids > 0)
        fused = model.fuse(text, image, ids > 0)
    assert (image.shape, text.shape) == ((2, 10, 40), (2, 7, 128))
    assert (fused.text.shape, fused.image.shape, fused.cls.shape) == ((2, 7, 24), (2, 10, 24), (2, 48))
    assert model.mlm_head(fused.text[:, 0]).shape == (2, 50)
    assert model.itm_head(fused.cls).shape == (2, 2)


@pytest.mark.parametrize("std", [0.02, 0.05])
def test_new_weights_start_as_published(std: float) -> None:
    torch.manual_seed(0)
    model = Meter(dataclasses.replace(tiny(), init_std=std))
    for name, parameter in [*model.fusion.named_parameters(), *model.mlm_head.named_parameters()]:
        if "norm" in name:
            assert parameter.eq(1 if name.endswith("weight") else 0).all(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(std, rel=0.1), name
    assert base().init_std == 0.02
