"""An image tokenizer of one's own: a VQ-VAE whose codes `objectives.names=mlm,itm,mim_codes` predicts.

    meter-fast train image_tokenizer size=tiny data.root=SCENES run.dir=runs/tokenizer
    deepspeed --num_gpus 2 --module meter_fast.train image_tokenizer size=base data.root=DATA run.dir=runs/tokenizer
    deepspeed --module meter_fast.train pretrain objectives.names=mlm,itm,mim_codes \\
        objectives.image_tokenizer=runs/tokenizer/export

The paper takes the published tokenizer of DALL-E (Dou et al. 2022, section 3.3); every number here is ours. `base`
gives 18 x 18 codes, as many as METER at 288 px has patches; `tiny` 3 x 3, the cells of drawn scenes at 96 px. For
another grid G set image_tokenizer.image_size to 8 G.
"""

from dataclasses import replace
from typing import Literal

from meter_fast.config import DataConfig, EngineConfig, ObjectivesConfig, OptimConfig, RunConfig, RunOptions
from meter_fast.models import config as models
from meter_fast.models.image_tokenizer_config import ImageTokenizerConfig
from meter_fast.recipes import pretrain

RECONSTRUCTION = ObjectivesConfig(names=("reconstruction",))


def image_tokenizer(size: Literal["tiny", "base"] = "base") -> RunConfig:
    """The configuration of a run that trains an image tokenizer."""
    return base() if size == "base" else tiny()


def base() -> RunConfig:
    """8192 codes, as DALL-E's tokenizer has, of 8 x 8 pixels each."""
    return RunConfig(
        model=models.base(),
        image_tokenizer=ImageTokenizerConfig(image_size=144, codes=8192, code_width=32, width=256, blocks=2),
        data=replace(pretrain.base().data, tokenizer=""),
        objectives=RECONSTRUCTION,
        optim=OptimConfig(lr=3e-4, weight_decay=0.0, betas=(0.9, 0.99), warmup=1000, decay_power="cosine", clip=1.0),
        engine=EngineConfig(zero=2, dtype="bf16", global_batch=512, micro_batch=64),
        run=RunOptions(dir="runs/image-tokenizer-base", max_steps=50_000, log_every=50, eval_every=5000),
    )


def tiny() -> RunConfig:
    """256 codes for drawn scenes, whose cells then are 8 x 8 pixels."""
    return RunConfig(
        model=models.tiny(),
        image_tokenizer=ImageTokenizerConfig(image_size=24, codes=256, code_width=16, width=64, blocks=1),
        data=DataConfig(
            root="data/scenes",
            sources=("coco",),
            val_sources=("arrow:coco_caption_karpathy_val",),
            tokenizer="",
            workers=1,
        ),
        objectives=RECONSTRUCTION,
        optim=OptimConfig(lr=2e-3, weight_decay=0.0, betas=(0.9, 0.99), warmup=100, decay_power="cosine", clip=1.0),
        engine=EngineConfig(zero=2, dtype="bf16", global_batch=64, micro_batch=32),
        run=RunOptions(
            dir="runs/image-tokenizer-tiny", max_steps=1000, log_every=50, eval_every=250, picture_every=250,
            save_every=500,
        ),
    )  # fmt: skip
