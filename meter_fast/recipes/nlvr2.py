"""Fine-tuning on NLVR2: is a statement about two pictures true?

    deepspeed --module meter_fast.train nlvr2 size=base data.root=DATA run.init=PRETRAINED run.dir=runs/nlvr2
    meter-fast train nlvr2 size=tiny data.root=SCENES run.init=runs/demo/export
    meter-fast evaluate runs/nlvr2 nlvr2 data.root=DATA data.val_sources=arrow:nlvr2_test1

`base` is the published run (Dou et al. 2022, section 4.1): 10 epochs at 288 px from a pre-trained model, an export
folder, a checkpoint or a METER .ckpt. It trains on train and chooses its best step by dev, as the published run does.
`published=true` holds out what the published code reads as its validation split, dev and test1 together: the best step
is then chosen with the test data in sight. `tiny` is the same in miniature for scenes.

The second picture has a token type of its own. Starting from a model that knows one picture, it starts as that of the
first (METER, modules/meter_module.py); a model fine-tuned here gives its two to any other task.

Each number below is the published code's (zdou0830/METER, meter/config.py, task_finetune_nlvr2_clip_bert) unless its
comment says otherwise.
"""

from dataclasses import replace
from typing import Literal

from meter_fast.config import DataConfig, EngineConfig, ObjectivesConfig, OptimConfig, RunConfig, RunOptions
from meter_fast.models.text_presets import TextChoice
from meter_fast.models.vision_presets import VisionChoice
from meter_fast.recipes.fine_tuning import with_encoders_of
from meter_fast.recipes.pretrain import FusionChoice, pretrain
from meter_fast.recipes.pretrain import base as pretrained_base
from meter_fast.recipes.pretrain import tiny as pretrained_tiny

TRAIN, HELD_OUT = ("arrow:nlvr2_train",), ("arrow:nlvr2_dev",)


def nlvr2(
    size: Literal["tiny", "base"] = "base",
    vision: VisionChoice = "default",
    text: TextChoice = "default",
    fusion: FusionChoice = "co_attention",
    published: Literal["true", "false"] = "false",
) -> RunConfig:
    """The configuration of a fine-tuning run.

    vision, text, fusion: as of `pretrain`, to be those of the model in run.init. published: the published splits.
    """
    config = with_encoders_of(pretrain(size, vision, text, fusion), base() if size == "base" else tiny(), text)
    model = replace(config.model, nlvr2_head=True, fusion=replace(config.model.fusion, token_types=3))
    config = replace(config, model=model)
    if published == "true":
        config = replace(config, data=replace(config.data, sources=("nlvr2",), val_sources=("nlvr2",)))
    return config


def base() -> RunConfig:
    """The paper's base model on NLVR2."""
    model = pretrained_base().model
    return RunConfig(
        model=replace(model, vision=replace(model.vision, image_size=288)),  # image_size of the published command
        data=DataConfig(
            sources=TRAIN,
            val_sources=HELD_OUT,
            val_pairs=7000,  # ours: all of dev
            transform="clip",
            tokenizer="roberta-base",
            max_text_length=50,  # max_text_len
            workers=8,  # num_workers
        ),
        objectives=ObjectivesConfig(names=("nlvr2",)),
        optim=OptimConfig(
            lr=1e-5,  # learning_rate
            head_multiplier=10.0,  # lr_mult_head
            cross_modal_multiplier=5.0,  # lr_mult_cross_modal
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
            global_batch=256,  # batch_size
            micro_batch=16,  # ours: 32 pictures
        ),
        run=RunOptions(
            dir="runs/nlvr2-base",
            max_steps=0,
            max_epochs=10.0,  # max_epoch
            log_every=10,
            eval_every=300,
            save_every=500,
            keep_last=3,
        ),
    )


def tiny() -> RunConfig:
    """Two million parameters on drawn scenes; every number here is ours."""
    return RunConfig(
        model=pretrained_tiny().model,
        data=DataConfig(
            root="data/scenes",
            sources=TRAIN,
            val_sources=HELD_OUT,
            val_pairs=2000,
            tokenizer="init",
            max_text_length=40,
            workers=1,
        ),
        objectives=ObjectivesConfig(names=("nlvr2",)),
        optim=OptimConfig(lr=3e-4, head_multiplier=5.0, cross_modal_multiplier=1.0, warmup=0.1, clip=1.0),
        engine=EngineConfig(zero=2, dtype="bf16", global_batch=64, micro_batch=32),
        run=RunOptions(
            dir="runs/nlvr2-tiny", max_steps=0, max_epochs=1.0, log_every=50, eval_every=300, save_every=300
        ),
    )
