"""Fine-tuning on visual question answering (VQAv2): classification over the answers that are given often.

    deepspeed --module meter_fast.train vqa size=base data.root=DATA run.init=PRETRAINED run.dir=runs/vqa
    deepspeed --module meter_fast.train vqa size=base from_encoders=true vision=swin_b_384 data.root=DATA
    meter-fast train vqa size=tiny data.root=SCENES run.init=runs/demo/export
    meter-fast evaluate runs/vqa vqa data.root=DATA

`base` is the published run (Dou et al. 2022, section 4.1): 10 epochs at 576 px from a pre-trained model, an export
folder, a checkpoint or a METER .ckpt. It trains on train and holds out val; `published=true` trains on both, as the
published models do, whose score on val then says nothing (METER, thread 7). `tiny` is the same in miniature for scenes.

`from_encoders=true` is the paper's exploration without pre-training (section 4.1.1): encoders from their own weights,
fusion and head at random. Its table 6 compares learning rates of the bottom (encoders) and the top (fusion and head):
the bottom's is optim.lr, the top's is optim.lr times optim.cross_modal_multiplier and optim.head_multiplier, so
5e-5 / 5e-5 is `optim.lr=5e-5 optim.head_multiplier=1 optim.cross_modal_multiplier=1`.

Each number below is the published code's (zdou0830/METER, meter/config.py, task_finetune_vqa_clip_bert) unless its
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

TRAIN, HELD_OUT = ("arrow:vqav2_train",), ("arrow:vqav2_val",)


def vqa(
    size: Literal["tiny", "base"] = "base",
    vision: VisionChoice = "default",
    text: TextChoice = "default",
    fusion: FusionChoice = "co_attention",
    published: Literal["true", "false"] = "false",
    from_encoders: Literal["true", "false"] = "false",
) -> RunConfig:
    """The configuration of a fine-tuning run.

    vision, text, fusion: as of `pretrain`, to be those of the model in run.init. published: train on the validation
    split, too. from_encoders: start from encoders alone, at size base with the learning rates of section 4.1.1.
    """
    config = with_encoders_of(pretrain(size, vision, text, fusion), base() if size == "base" else tiny(), text)
    if published == "true":
        config = replace(config, data=replace(config.data, sources=("vqa",), val_sources=()))
    if from_encoders == "true" and size == "tiny":  # its encoders have no weights: all starts at random
        config = replace(config, data=replace(config.data, tokenizer="trained"))
    elif from_encoders == "true":
        rates = replace(config.optim, lr=1e-5, head_multiplier=10.0, cross_modal_multiplier=10.0)  # 1e-5 and 1e-4
        config = replace(config, optim=rates)
    return config


def base() -> RunConfig:
    """The paper's base model on VQAv2."""
    model = pretrained_base().model
    return RunConfig(
        model=replace(model, vision=replace(model.vision, image_size=576)),  # image_size of the published command
        data=DataConfig(
            sources=TRAIN,  # ours: the published run reads val, too
            val_sources=HELD_OUT,
            val_pairs=5000,  # ours
            transform="clip",
            tokenizer="roberta-base",
            max_text_length=50,  # max_text_len
            workers=8,  # num_workers
        ),
        objectives=ObjectivesConfig(names=("vqa",)),
        optim=OptimConfig(
            lr=5e-6,  # learning_rate
            head_multiplier=50.0,  # lr_mult_head
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
            global_batch=512,  # batch_size
            micro_batch=16,  # ours
        ),
        run=RunOptions(
            dir="runs/vqa-base",
            max_steps=0,
            max_epochs=10.0,  # max_epoch
            log_every=10,
            eval_every=1000,
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
        objectives=ObjectivesConfig(names=("vqa",)),
        optim=OptimConfig(lr=3e-4, head_multiplier=5.0, cross_modal_multiplier=1.0, warmup=0.1, clip=1.0),
        engine=EngineConfig(zero=2, dtype="bf16", global_batch=64, micro_batch=32),
        run=RunOptions(dir="runs/vqa-tiny", max_steps=0, max_epochs=1.0, log_every=50, eval_every=300, save_every=300),
    )
