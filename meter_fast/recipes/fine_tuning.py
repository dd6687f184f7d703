"""What recipes of fine-tuning share: the model is that of a pre-training run, without its heads."""

from dataclasses import replace

from meter_fast.config import RunConfig


def with_encoders_of(before: RunConfig, config: RunConfig, text: str) -> RunConfig:
    """`config` with the model of the pre-training run `before`, less its heads, and what belongs to its encoders.

    text: the name of the text encoder, "default" for the recipe's. The picture's side is the nearest below that its
    tokens divide: 574 of 576 with patches of 14.
    """
    vision, side = before.model.vision, config.model.vision.image_size
    vision = replace(vision, image_size=side // vision.patch_size * vision.patch_size)
    model = replace(before.model, vision=vision, mlm_head=False, itm_head=False)
    tokenizer = before.data.tokenizer if text != "default" and before.data.tokenizer != "trained" else None
    data = replace(config.data, tokenizer=tokenizer or config.data.tokenizer, transform=before.data.transform)
    return replace(config, model=model, data=data)
