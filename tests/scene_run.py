"""Drawn scenes, a tiny untrained model and a run directory around them, for tests of what comes after training."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from meter_fast import recipes
from meter_fast.cli import main
from meter_fast.config import override, to_dict
from meter_fast.data.sources import open_sources
from meter_fast.data.tokenizer import load_tokenizer, train_tokenizer
from meter_fast.models.config import FusionConfig, ModelConfig, TextConfig, VisionConfig
from meter_fast.models.export import save_export
from meter_fast.models.meter import Meter
from meter_fast.training.monitor import Monitor


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A folder as `meter-fast data scenes` writes it, small, with a tokenizer learned from its captions."""
    out = tmp_path_factory.mktemp("scenes")
    assert main(["data", "scenes", str(out), "--train", "40", "--val", "20", "--test", "40"]) == 0
    captions = open_sources(["coco"], out, "train")
    train_tokenizer((captions.read(i).text for i in range(len(captions))), out / "tokenizer")
    return out


@pytest.fixture(scope="session")
def scene_tokenizer(scenes):
    return load_tokenizer(scenes / "tokenizer")


def small(vocabulary: int) -> ModelConfig:
    """4 x 4 patches of 16 pixels, three fusion layers, whatever the recipes' sizes are."""
    return ModelConfig(
        VisionConfig(width=128, layers=2, heads=2, patch_size=16, image_size=64),
        TextConfig("bert", 128, 2, 4, ffn=256, vocab_size=vocabulary, max_positions=64, token_types=2, pad_id=0),
        FusionConfig(width=128, layers=3, heads=4),
    )


@pytest.fixture(scope="session")
def scene_model(scene_tokenizer) -> Meter:
    """A small Meter with random weights that differ enough for its answers to depend on picture and text."""
    torch.manual_seed(0)
    model = Meter(small(len(scene_tokenizer))).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return model


@pytest.fixture
def run_dir(tmp_path, scenes, scene_model) -> Path:
    """A run directory of its own."""
    return make_run(tmp_path / "runs" / "small", scenes, scene_model)


def make_run(folder: Path, scenes: Path, scene_model: Meter) -> Path:
    """What training leaves behind, without the training."""
    save_export(scene_model, folder / "export", scenes / "tokenizer")
    settings = [f"data.root={scenes}", f"data.tokenizer={scenes / 'tokenizer'}", "engine.global_batch=64"]
    config = override(recipes.resolve(["pretrain", "size=tiny"]), settings)
    config = dataclasses.replace(config, model=scene_model.config)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    run = {
        "world_size": 2,
        "zero_stage": 2,
        "dtype": "bf16",
        "device": "cpu",
        "seconds": 61.5,
        "steps": 30,
        "skipped": {"truncated": 1},
        "versions": {"torch": torch.__version__},
    }
    (folder / "run.json").write_text(json.dumps(run))
    monitor = Monitor(folder, 30, 64, is_main=True)
    monitor.start(0)
    for step in (10, 20, 30):
        monitor.step(step, {"mlm": 5.0 - step / 10, "itm": 0.7}, {"mlm": step / 100, "itm": 0.5})
    monitor.evaluation(30, {"mlm": {"loss": 2.1, "accuracy": 0.3}, "itm": {"loss": 0.7, "accuracy": 0.5}})
    monitor.close()
    return folder
