"""Models with every text encoder, as folders: written, read, and refused where the published code has no place."""

import dataclasses
from pathlib import Path

import pytest
import torch
from text_cases import small, texts

from meter_fast.convert import to_checkpoint
from meter_fast.models.config import TEXT_NAMES, FusionConfig, ModelConfig, VisionConfig
from meter_fast.models.export import load_export, save_export
from meter_fast.models.meter import Meter


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_export(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    text = dataclasses.replace(small(name), dropout=0.0)
    vision = VisionConfig(width=32, layers=1, heads=2, patch_size=8, image_size=24)
    model = Meter(ModelConfig(vision, text, FusionConfig(width=16, layers=1, heads=2, dropout=0.0))).eval()
    again = load_export(save_export(model, tmp_path / "export", None))
    assert again.config == model.config
    ids, mask = texts(text)
    with torch.no_grad():
        assert torch.equal(again.encode_text(ids, mask)[mask], model.encode_text(ids, mask)[mask])
    if name in ("roberta", "bert"):
        assert to_checkpoint(tmp_path / "export", tmp_path / "meter.ckpt") > 50
    else:
        with pytest.raises(ValueError, match=rf"text.name={name}: the published code knows roberta and bert only"):
            to_checkpoint(tmp_path / "export", tmp_path / "meter.ckpt")
        assert not (tmp_path / "meter.ckpt").exists()
