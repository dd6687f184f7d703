"""Fine-tuning on retrieval between pictures and captions: Flickr30k and COCO.

    deepspeed --module meter_fast.train retrieval_f30k size=base data.root=DATA run.init=PRETRAINED run.dir=runs/f30k
    deepspeed --module meter_fast.train retrieval_coco size=base data.root=DATA run.init=PRETRAINED run.dir=runs/coco
    meter-fast train retrieval_coco size=tiny data.root=SCENES run.init=runs/demo/export
    meter-fast evaluate runs/f30k retrieval data.root=DATA data.val_sources=f30k data.val_split=test

`base` is the published run (Dou et al. 2022, section 4.2): 10 epochs at 384 px from a pre-trained model, an export
folder, a checkpoint or a METER .ckpt, whose ITM head the rank head starts from. It trains on Flickr30k's train split,
or COCO's train and restval, and chooses by the recall over some pictures of the Karpathy val split. `published=true`
reads what the published runs read: Flickr30k's val in training, too, the test splits as "val", false texts and pictures
drawn from the whole data set, a picture's own among them. `tiny` is the same in miniature for scenes.

As published, the rank head is trained at the rate of the encoders, without optim.head_multiplier: its published name,
rank_output, is none of the heads' (METER, meter_utils.py:173). The ITM head is frozen, and its loss is added: see
objectives/retrieval.py.

Each number below is the published code's (zdou0830/METER, meter/config.py, task_finetune_irtr_*_clip_bert) unless its
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

SPLITS = {  # ours: the published runs train on val (f30k) and validate on test
    "f30k": (("arrow:f30k_caption_karpathy_train",), ("arrow:f30k_caption_karpathy_val",)),
    "coco": (
        ("arrow:coco_caption_karpathy_train,coco_caption_karpathy_restval",),
        ("arrow:coco_caption_karpathy_val",),
    ),
}


def retrieval_f30k(
    size: Literal["tiny", "base"] = "base",
    vision: VisionChoice = "default",
    text: TextChoice = "default",
    fusion: FusionChoice = "co_attention",
    published: Literal["true", "false"] = "false",
) -> RunConfig:
    """The configuration of a run on Flickr30k.

    vision, text, fusion: as of `pretrain`, to be those of the model in run.init. published: the published splits, false
    texts and false pictures.
    """
    return _retrieval("f30k", size, vision, text, fusion, published)


def retrieval_coco(
    size: Literal["tiny", "base"] = "base",
    vision: VisionChoice = "default",
    text: TextChoice = "default",
    fusion: FusionChoice = "co_attention",
    published: Literal["true", "false"] = "false",
) -> RunConfig:
    """The configuration of a run on COCO, or on scenes; arguments as of `retrieval_f30k`."""
    return _retrieval("coco", size, vision, text, fusion, published)


def _retrieval(name: str, size: str, vision: str, text: str, fusion: str, published: str) -> RunConfig:
    config = with_encoders_of(pretrain(size, vision, text, fusion), base() if size == "base" else tiny(), text)
    model = replace(config.model, itm_head=True, rank_head=True)
    sources, held_out = SPLITS[name]
    goals = config.objectives
    if published == "true":
        sources = held_out = (name,)
        goals = replace(goals, itm_negatives="dataset", false_text_choice="dataset")
    data = replace(config.data, sources=sources, val_sources=held_out)
    run = replace(config.run, dir=f"runs/{name}-{size}")
    return replace(config, model=model, data=data, objectives=goals, run=run)


def base() -> RunConfig:
    """The paper's base model."""
    model = pretrained_base().model
    return RunConfig(
        model=replace(model, vision=replace(model.vision, image_size=384)),  # image_size
        data=DataConfig(
            val_pairs=200,  # ours: pictures
            transform="clip",
            augment="randaugment_published",  # clip_randaug; data.augment=randaugment is without the published slips
            tokenizer="roberta-base",
            max_text_length=40,  # max_text_len
            workers=8,  # num_workers
        ),
        objectives=ObjectivesConfig(
            names=("retrieval", "itm"),  # loss_names irtr and itm; the total is their plain sum
            false_texts=15,  # draw_false_text
            itm_negatives="batch",  # ours: no picture is decoded for nothing; "dataset" is the published way
        ),
        optim=OptimConfig(
            lr=5e-6,  # learning_rate
            head_multiplier=5.0,  # lr_mult_head
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
            micro_batch=4,  # ours: each is a picture with 16 texts
        ),
        run=RunOptions(
            max_steps=0,
            max_epochs=10.0,  # max_epoch
            log_every=10,
            eval_every=500,
            save_every=500,
            keep_last=3,
        ),
    )


def tiny() -> RunConfig:
    """Two million parameters on drawn scenes; every number here is ours."""
    return RunConfig(
        model=pretrained_tiny().model,
        data=DataConfig(root="data/scenes", val_pairs=100, tokenizer="init", max_text_length=40, workers=1),
        objectives=ObjectivesConfig(names=("retrieval", "itm"), false_texts=7),  # of 15 more are true by chance
        optim=OptimConfig(lr=1e-4, head_multiplier=1.0, cross_modal_multiplier=1.0, warmup=0.1, clip=1.0),
        engine=EngineConfig(zero=2, dtype="bf16", global_batch=32, micro_batch=8),
        run=RunOptions(max_steps=0, max_epochs=1.0, log_every=50, eval_every=300, save_every=300),
    )
