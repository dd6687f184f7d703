"""Every encoder, fusion and objective of pre-training by its name trains three steps through the whole trainer, on one
process or two. Codes of an image tokenizer and questions have files of their own."""

import math
from pathlib import Path

import pytest
import torch
from ranks import RankServer
from small_run import losses, tensors

import meter_fast
from meter_fast.models.config import CLASS_TOKENS, TEXT_NAMES
from meter_fast.models.text_presets import TEXT_PRESETS
from meter_fast.models.vision_presets import VISION_PRESETS

pytestmark = pytest.mark.slow

VISION = {preset.config.name: name for name, preset in VISION_PRESETS.items()}  # one of each kind: tiny ones are alike
TEXT = {preset.config.name: name for name, preset in TEXT_PRESETS.items()}
MERGED, DECODER = ["fusion=merged_attention"], ["fusion=encoder_decoder"]
CHOICES = {
    **{f"vision {kind}": [f"vision={name}"] for kind, name in VISION.items()},
    **{f"text {kind}": [f"text={name}"] for kind, name in TEXT.items()},
    "merged attention": MERGED,
    "merged attention, swin": [*MERGED, "vision=swin_b_384"],
    "mlm alone": ["objectives.names=mlm"],
    "itm alone": ["objectives.names=itm"],
    "encoder-decoder": DECODER,
    "encoder-decoder, swin, clip text": [*DECODER, "vision=swin_b_384", "text=clip_base"],
    "decoder behind merged attention": [*DECODER, "model.fusion.name=merged_attention"],
    "span denoising alone": [*DECODER, "objectives.names=span_denoising"],
    "caption alone": [*DECODER, "objectives.names=caption"],
    "mim in batch": ["objectives.names=mlm,itm,mim_in_batch"],
    "mim in batch alone, volo": ["objectives.names=mim_in_batch", "vision=volo_d4_448"],
    "mim in batch, all ranks, swin": [
        "objectives.names=mlm,itm,mim_in_batch", "objectives.mim_negatives=all_ranks", "vision=swin_b_384",
    ],
}  # fmt: skip
ON_TWO = (
    "vision swin", "vision volo", "text deberta_v3", "text clip", "merged attention, swin", "mlm alone",
    "encoder-decoder, swin, clip text", "mim in batch, all ranks, swin",
)  # fmt: skip


def test_nothing_is_left_out() -> None:
    assert set(VISION) == set(CLASS_TOKENS)
    assert set(TEXT) == set(TEXT_NAMES)


@pytest.mark.parametrize("choice", CHOICES)
def test_three_steps(ranks: RankServer, data: Path, tmp_path: Path, choice: str) -> None:
    """Losses are numbers, every weight that is trained moves, and the export opens."""
    world = 2 if choice in ON_TWO else 1
    settings = [
        f"data.root={data}", f"data.tokenizer={data / 'tokenizer'}", "data.val_sources=", "data.workers=0",
        "engine.global_batch=8", "engine.micro_batch=4", "run.max_steps=3", "run.log_every=1", "run.eval_every=0",
        "run.save_every=1", "run.keep_last=3", "run.hang_seconds=120", "run.picture_every=0", "optim.warmup=0",
    ]  # fmt: skip
    ranks.train(world, tmp_path, [*settings, *CHOICES[choice]]).check()
    seen = losses(tmp_path)
    assert list(seen) == [1, 2, 3]
    assert all(math.isfinite(value) for row in seen.values() for value in row)
    first, last = tensors(tmp_path, 1), tensors(tmp_path, 3)
    trained = [name for name in first if name.startswith("weight/")]
    still = [name for name in trained if torch.equal(first[name], last[name])]
    assert len(trained) > 50 and not still, still
    opened = meter_fast.load(tmp_path)
    assert opened.transform.name == "clip" and opened.max_length == 40
