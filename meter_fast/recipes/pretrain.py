"""Pre-training on image-caption pairs: masked language modelling and image-text matching together.

    deepspeed --module meter_fast.train pretrain size=base data.root=DATA run.dir=runs/base
    deepspeed --num_gpus 2 --module meter_fast.train pretrain size=tiny data.root=SCENES
    deepspeed --module meter_fast.train pretrain size=base vision=swin_b_384 text=deberta_v3_base data.root=DATA
    deepspeed --module meter_fast.train pretrain size=base fusion=encoder_decoder data.root=DATA

`base` is METER-CLIP16-RoBERTa at 288 px as published: 100,000 steps of 4096 pairs from COCO, Visual Genome, SBU and
Conceptual Captions 3M, 8 days on 8 A100 in the paper (Dou et al. 2022, arXiv 2111.02387, section 4 and its appendix).
`tiny` is the same run in miniature for two CPU cores: minutes, from files that `meter-fast data scenes` draws.

Each number below is the published code's default (zdou0830/METER, meter/config.py, meter/run.py) unless its comment
says otherwise.
"""

from dataclasses import replace
from typing import Literal

from meter_fast.config import DataConfig, EngineConfig, ObjectivesConfig, OptimConfig, RunConfig, RunOptions
from meter_fast.models import config as models
from meter_fast.models.config import DecoderConfig
from meter_fast.models.text_presets import TEXT_PRESETS, TextChoice, tiny_text
from meter_fast.models.vision_presets import VISION_PRESETS, VisionChoice, tiny_vision

FusionChoice = Literal["co_attention", "merged_attention", "encoder_decoder"]


def pretrain(
    size: Literal["tiny", "base"] = "base",
    vision: VisionChoice = "default",
    text: TextChoice = "default",
    fusion: FusionChoice = "co_attention",
) -> RunConfig:
    """The configuration of a pre-training run.

    vision, text: other encoders, with everything that belongs to them: sizes and, at size base, native resolution,
    weights, pixel values and tokenizer.
    fusion: one of the paper's table 7: pairs of co-attention layers, twice as many layers of merged attention, or half
    the pairs with as many decoder layers, which is trained on span denoising in place of MLM. At size tiny, where half
    would be a single pair, too few to match text and picture, it is both pairs and a decoder layer, trained on
    captioning too.
    """
    config = _with_fusion(base() if size == "base" else tiny(), size, fusion)
    config = config if vision == "default" else _with_vision(config, size, vision)
    return config if text == "default" else _with_text(config, size, text)


def _with_vision(config: RunConfig, size: str, vision: str) -> RunConfig:
    if size == "tiny":
        return replace(config, model=replace(config.model, vision=tiny_vision(vision)))
    preset = VISION_PRESETS[vision]
    return replace(
        config,
        model=replace(config.model, vision=preset.config),
        data=replace(config.data, transform=preset.transform),
    )


def _with_fusion(config: RunConfig, size: str, fusion: str) -> RunConfig:
    model, pairs = config.model, config.model.fusion.layers  # 6 in the paper
    if fusion == "merged_attention":
        config = replace(config, model=replace(model, fusion=replace(model.fusion, name=fusion, layers=2 * pairs)))
        # At size tiny merged attention learns where things are later than co-attention, at 4000 steps not yet.
        return config if size == "base" else replace(config, run=replace(config.run, max_steps=7000))
    if fusion == "encoder_decoder":
        layers, decoder = pairs // 2, DecoderConfig(layers=pairs // 2)
        goals = replace(config.objectives, names=("span_denoising", "itm"))
        if size == "tiny":  # captions of few words, of which the text gives most away
            layers = pairs
            goals = replace(goals, names=(*goals.names, "caption"), span_probability=0.3)
        return replace(
            config,
            model=replace(
                model,
                fusion=replace(model.fusion, layers=layers),
                decoder=decoder,
                mlm_head=False,
            ),
            objectives=goals,
        )
    return config


def _with_text(config: RunConfig, size: str, text: str) -> RunConfig:
    if size == "tiny":
        return replace(config, model=replace(config.model, text=tiny_text(text)))
    preset = TEXT_PRESETS[text]
    return replace(
        config,
        model=replace(config.model, text=preset.pretrained()),
        data=replace(config.data, tokenizer=preset.hub),
    )


def base() -> RunConfig:
    """The paper's base model: CLIP-B/16 at 288 px, RoBERTa-base, six co-attention layers."""
    model = models.base()
    return RunConfig(
        model=replace(
            model,
            vision=replace(
                model.vision, weights="vit_base_patch16_clip_quickgelu_224.openai"
            ),  # vit="ViT-B/16" of CLIP
            text=replace(model.text, weights="roberta-base"),
        ),
        data=DataConfig(
            sources=("coco", "vg", "sbu", "gcc"),  # task_mlm_itm_*: datasets
            val_sources=(),  # the published "val" of coco is its test split: name data.val_sources=coco knowingly
            transform="clip",  # train_transform_keys of the clip16 configurations
            tokenizer="roberta-base",
            max_text_length=50,  # max_text_len
            workers=8,  # num_workers
        ),
        objectives=ObjectivesConfig(
            names=("mlm", "itm"),  # loss_names of task_mlm_itm_*; the total is their plain sum
            mlm_probability=0.15,  # mlm_prob
            masking="whole_word_published",  # whole_word_masking=True; what that does to RoBERTa: METER thread 14
            itm_negatives="batch",  # ours: no picture is decoded for nothing; "dataset" is the published way
        ),
        optim=OptimConfig(
            lr=1e-5,  # learning_rate of task_mlm_itm_*
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
            global_batch=4096,  # batch_size
            micro_batch=32,  # per_gpu_batchsize of the published commands
        ),
        run=RunOptions(
            dir="runs/pretrain-base",
            seed=0,
            max_steps=100_000,
            log_every=10,
            save_every=1000,
            keep_last=3,
        ),
    )


def tiny() -> RunConfig:
    """A model of two million parameters that learns drawn scenes on a CPU; every number here is ours."""
    return RunConfig(
        model=models.tiny(),
        data=DataConfig(
            root="data/scenes",
            sources=("coco",),
            val_sources=("arrow:coco_caption_karpathy_val",),  # "coco" would read the test split, as published
            tokenizer="trained",
            max_text_length=40,
            workers=1,
        ),
        objectives=ObjectivesConfig(
            masking="content_word",  # words that the text gives away drown those of place, which are the hardest
            mlm_probability=0.5,  # of content words: captions have few
        ),
        optim=OptimConfig(
            lr=5e-4,  # at 1e-3 the picture's content drowns its positions before they are of use
            head_multiplier=1.0,
            cross_modal_multiplier=1.0,
            warmup=200,
            clip=1.0,
        ),
        engine=EngineConfig(zero=2, dtype="bf16", global_batch=64, micro_batch=32),
        run=RunOptions(
            dir="runs/pretrain-tiny",
            max_steps=4000,
            log_every=50,
            eval_every=500,
            picture_every=500,
            save_every=500,
        ),
    )
