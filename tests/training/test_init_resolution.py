"""Starting from an export of another resolution: position tables as the published code makes them, and a report."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_cases import GOLDEN
from safetensors.torch import load_file

from meter_fast.config import RunConfig
from meter_fast.models.config import FusionConfig, ModelConfig, TextConfig, VisionConfig
from meter_fast.models.export import save_export
from meter_fast.models.meter import Meter
from meter_fast.training.resume import Start, load_weights

TABLES = load_file(GOLDEN / "position_tables.safetensors")
TEXT = TextConfig(
    name="bert", width=8, layers=1, heads=2, ffn=8, vocab_size=20, max_positions=16, token_types=2, pad_id=0
)


def config_of(vision: VisionConfig, run_init: str = "") -> RunConfig:
    model = ModelConfig(vision=vision, text=TEXT, fusion=FusionConfig(width=8, layers=1, heads=2))
    config = RunConfig(model=model)
    return replace(config, run=replace(config.run, init=run_init))


def started(folder: Path, vision: VisionConfig, tables: dict[str, torch.Tensor], size: int) -> tuple[Meter, Start]:
    """A model at `size` px that starts from an export of `vision` with these position tables."""
    before = Meter(config_of(vision).model)
    state = before.state_dict()
    assert {name: table.shape for name, table in tables.items()} == {name: state[name].shape for name in tables}
    save_export(before, folder / "export", None, state | tables)
    config, start = config_of(replace(vision, image_size=size), str(folder / "export")), Start()
    model = Meter(config.model)
    load_weights(model, config, start)
    kept = [name for name in state if name not in tables and "relative_position" not in name]
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in kept)
    return model.eval(), start


@pytest.mark.parametrize("size", [576, 384, 224])
def test_clip_from_288(tmp_path: Path, size: int) -> None:
    golden, name = f"clip.p16.288to{size}", "vision.pos_embed"
    vision = VisionConfig(width=4, layers=1, heads=1, patch_size=16, image_size=288)
    model, start = started(tmp_path, vision, {name: TABLES[f"{golden}.in"][None]}, size)
    assert torch.allclose(model.state_dict()[name][0], TABLES[f"{golden}.out"], atol=1e-6)
    rows = (size // 16) ** 2 + 1
    assert start.notes == [f"resized: {name} from 325 to {rows} rows"]
    assert start.masters[name].dtype == torch.float32
    with torch.no_grad():
        assert model.encode_image(torch.randn(1, 3, size, size)).shape == (1, rows, 4)


def test_swin_from_224_to_384(tmp_path: Path) -> None:
    vision = VisionConfig("swin", width=48, layers=8, heads=24, patch_size=32, image_size=224)
    names = {f"vision.encoder.layers.{stage}.blocks.{block}.attn.relative_position_bias_table": 2**stage
             for stage in range(4) for block in range(2)}  # fmt: skip
    before, after = TABLES["swin.224to384.in"], TABLES["swin.224to384.out"]
    model, start = started(tmp_path, vision, {name: before.repeat(1, times) for name, times in names.items()}, 384)
    for name, times in names.items():
        assert torch.allclose(model.state_dict()[name], after.repeat(1, times), atol=1e-6)
        assert f"resized: {name} from 169 to 529 rows" in start.notes
    assert len(start.notes) == len(names)
    with torch.no_grad():
        assert model.encode_image(torch.randn(1, 3, 384, 384)).shape == (1, 144, 48)
