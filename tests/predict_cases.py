"""A small model with every head, one with a decoder, and pictures, for tests of predictions. Helpers only, no tests."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from meter_fast.data.spans import add_sentinels
from meter_fast.data.tokenizer import load_tokenizer, train_tokenizer
from meter_fast.models.config import DecoderConfig, FusionConfig, ModelConfig, TextConfig, VisionConfig
from meter_fast.models.export import save_export
from meter_fast.models.meter import Meter

SIDE = 32
ANSWERS = ["yes", "no", "red", "blue", "two", "left"]
CAPTIONS = ["a red circle on white", "two small blue squares", "is the large circle left of a green square ?"] * 2


def config(vocabulary: int) -> ModelConfig:
    """Four patches, two fusion layers, all heads."""
    return ModelConfig(
        VisionConfig(width=64, layers=1, heads=1, patch_size=16, image_size=SIDE),
        TextConfig("bert", 32, 1, 2, ffn=64, vocab_size=vocabulary, max_positions=64, token_types=2, pad_id=0),
        FusionConfig(width=32, layers=2, heads=2, token_types=3),
        vqa_answers=len(ANSWERS),
        nlvr2_head=True,
        snli_head=True,
        rank_head=True,
        init_std=0.2,
    )


def lively(model: Meter) -> Meter:
    """With biases, and token types that tell two pictures apart."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_export(folder: Path, answers: bool = True, **changes) -> Path:
    """An export folder; changes: of its `ModelConfig`."""
    train_tokenizer(CAPTIONS, folder.parent / "tokenizer")
    tokenizer = load_tokenizer(folder.parent / "tokenizer")
    torch.manual_seed(0)
    model = lively(Meter(replace(config(len(tokenizer)), **changes)))
    names = '["yes", "no", "red", "blue", "two", "left"]' if answers and model.vqa_head is not None else None
    inputs = {"transform": "clip", "max_text_length": 16}
    return save_export(model, folder, folder.parent / "tokenizer", answers=names, inputs=inputs)


def make_writer(folder: Path) -> Path:
    """An export folder of a model that writes captions."""
    opened = train_tokenizer(CAPTIONS, folder.parent / "writing")
    add_sentinels(opened, 2)
    opened.save_pretrained(folder.parent / "writing")
    torch.manual_seed(3)
    decoder = DecoderConfig(layers=1, max_positions=16)
    heads = {"mlm_head": False, "vqa_answers": 0, "nlvr2_head": False, "snli_head": False, "rank_head": False}
    model = lively(Meter(replace(config(len(opened)), decoder=decoder, **heads)))
    return save_export(model, folder, folder.parent / "writing")


def draw(number: int) -> np.ndarray:
    """Noise, uint8 [40,48,3]."""
    return np.random.default_rng(number).integers(0, 256, (40, 48, 3), np.uint8)


def write_pictures(folder: Path, count: int) -> list[Path]:
    """PNG files in the order of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(draw(number)).save(path)
    return paths
