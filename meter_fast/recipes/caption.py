"""Fine-tuning on captioning (COCO): write the caption of a picture from the picture alone.

    deepspeed --module meter_fast.train caption size=base data.root=DATA run.init=PRETRAINED run.dir=runs/caption
    meter-fast train caption size=tiny data.root=SCENES run.init=runs/decoder/export
    meter-fast evaluate runs/caption caption data.root=DATA data.val_split=test --beams 5

It goes on from a pre-trained encoder-decoder (`pretrain fusion=encoder_decoder`) and takes its tokenizer, which has the
sentinel that stands for the whole caption. It trains on the Karpathy split's train and restval and holds out its val;
its test is for the last score.

METER's encoder-decoder (Dou et al. 2022, section 3.2 and table 7) is scored on VQAv2 and retrieval alone: it has no
captioning run, so that every number here is ours for this task, and no score of it is known. `base` takes what the
published runs on VQAv2 have, as the comments say, and the resolution of those on COCO retrieval. `tiny` is the same in
miniature for scenes.
"""

from dataclasses import replace
from typing import Literal

from meter_fast.config import DataConfig, EngineConfig, ObjectivesConfig, OptimConfig, RunConfig, RunOptions
from meter_fast.models.text_presets import TextChoice
from meter_fast.models.vision_presets import VisionChoice
from meter_fast.recipes.pretrain import pretrain

TRAIN, HELD_OUT = ("coco",), ("arrow:coco_caption_karpathy_val",)  # "coco" as held-out data is the test split
SIDE = 384  # pixels, of the published retrieval checkpoints on the same pictures


def caption(
    size: Literal["tiny", "base"] = "base",
    vision: VisionChoice = "default",
    text: TextChoice = "default",
) -> RunConfig:
    """The configuration of a fine-tuning run. vision, text: as of `pretrain`, to be those of the model in run.init."""
    before = pretrain(size, vision, text, "encoder_decoder")
    config = base() if size == "base" else tiny()
    picture = before.model.vision
    side = SIDE if size == "base" else picture.image_size
    picture = replace(picture, image_size=side // picture.patch_size * picture.patch_size)
    words = replace(before.model.text, weights=None)  # all weights are those of run.init, sentinels included
    model = replace(before.model, vision=picture, text=words, mlm_head=False, itm_head=False)
    return replace(config, model=model, data=replace(config.data, transform=before.data.transform))


def base() -> RunConfig:
    """COCO; `model` and `data.transform` are put in by `caption`."""
    return RunConfig(
        model=pretrain("base", fusion="encoder_decoder").model,
        data=DataConfig(
            sources=TRAIN,
            val_sources=HELD_OUT,
            val_pairs=5000,  # ours
            tokenizer="init",
            max_text_length=50,  # max_text_len of pre-training
            workers=8,  # num_workers
        ),
        objectives=ObjectivesConfig(names=("caption",)),
        optim=OptimConfig(
            lr=5e-6,  # learning_rate on VQAv2
            head_multiplier=5.0,  # ours: the head over the vocabulary is pre-trained, so that it moves as the fusion
            cross_modal_multiplier=5.0,  # lr_mult_cross_modal on VQAv2
            weight_decay=0.01,
            betas=(0.9, 0.98),  # meter_utils.py:277
            eps=1e-8,  # meter_utils.py:277
            warmup=0.1,  # warmup_steps
            decay_power=1.0,
            end_lr=0.0,
            clip=0.0,  # the published runs do not clip
        ),
        engine=EngineConfig(
            zero=2,  # ours: the published runs use plain data parallelism
            dtype="bf16",  # ours, with fp32 master weights; the published runs are fp32
            global_batch=512,  # batch_size on VQAv2
            micro_batch=16,  # ours
        ),
        run=RunOptions(
            dir="runs/caption-base",
            max_steps=0,
            max_epochs=10.0,  # max_epoch on VQAv2
            log_every=10,
            eval_every=1000,
            save_every=500,
            keep_last=3,
        ),
    )


def tiny() -> RunConfig:
    """Drawn scenes; every number here is ours."""
    return RunConfig(
        model=pretrain("tiny", fusion="encoder_decoder").model,
        data=DataConfig(
            root="data/scenes",
            sources=TRAIN,
            val_sources=HELD_OUT,
            val_pairs=2000,
            tokenizer="init",
            max_text_length=40,
            workers=1,
        ),
        objectives=ObjectivesConfig(names=("caption",)),
        optim=OptimConfig(lr=3e-4, head_multiplier=1.0, cross_modal_multiplier=1.0, warmup=0.1, clip=1.0),
        engine=EngineConfig(zero=2, dtype="bf16", global_batch=64, micro_batch=32),
        run=RunOptions(
            dir="runs/caption-tiny", max_steps=0, max_epochs=1.0, log_every=50, eval_every=300, save_every=300
        ),
    )
