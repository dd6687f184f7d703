"""Our parameter names and those of the published METER code. Knows strings only.

Where we keep several matrices in one (query, key, value), one of our names stands for several of theirs, stacked
along the first dimension in the order given.
"""

import re

from meter_fast.models.clip_names import to_openai

VISION = "vit_model."
CLIP = VISION + "visual."
ENCODER = "encoder."  # of all vision encoders but CLIP's
TEXT = "text_transformer."

FUSION_TOP = {
    "text_projection": "cross_modal_text_transform",
    "image_projection": "cross_modal_image_transform",
    "token_types": "token_type_embeddings",
    "text_pooler.dense": "cross_modal_text_pooler.dense",
    "image_pooler.dense": "cross_modal_image_pooler.dense",
}
FUSION_BLOCK = {
    "self_attention.query_key_value": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "self_attention.out": ("attention.output.dense",),
    "self_attention.norm": ("attention.output.LayerNorm",),
    "cross_attention.query": ("crossattention.self.query",),
    "cross_attention.key_value": ("crossattention.self.key", "crossattention.self.value"),
    "cross_attention.out": ("crossattention.output.dense",),
    "cross_attention.norm": ("crossattention.output.LayerNorm",),
    "feed_forward.up": ("intermediate.dense",),
    "feed_forward.down": ("output.dense",),
    "feed_forward.norm": ("output.LayerNorm",),
}
MERGED_BLOCK = tuple(name for name in FUSION_BLOCK if not name.startswith("cross_attention."))
HEADS = {
    "mlm_head.dense.weight": "mlm_score.transform.dense.weight",
    "mlm_head.dense.bias": "mlm_score.transform.dense.bias",
    "mlm_head.norm.weight": "mlm_score.transform.LayerNorm.weight",
    "mlm_head.norm.bias": "mlm_score.transform.LayerNorm.bias",
    "mlm_head.decoder.weight": "mlm_score.decoder.weight",
    "mlm_head.decoder.bias": "mlm_score.bias",
    "itm_head.weight": "itm_score.fc.weight",
    "itm_head.bias": "itm_score.fc.bias",
    "rank_head.weight": "rank_output.weight",
    "rank_head.bias": "rank_output.bias",
    **{
        f"{task}_head.{ours}.{kind}": f"{task}_classifier.{theirs}.{kind}"
        for task in ("vqa", "nlvr2", "snli")
        for ours, theirs in (("dense", 0), ("norm", 1), ("out", 3))
        for kind in ("weight", "bias")
    },
    **{
        f"{head}_head.{part}{kind}": f"{head}_score.{part}{kind}"
        for head, parts in (("mim_in_batch", ("dense.", "norm.", "cell.", "cell_norm.")), ("mim_codes", ("",)))
        for part in parts
        for kind in ("weight", "bias")
    },
}


HEAD_NAMES = tuple(sorted({name.split(".")[0] + "." for name in HEADS.values()}))


def original_names(name: str) -> tuple[str, ...]:
    """Published names of one of our parameters, in the order in which they are stacked. A leading "model." is allowed.

    Layers of merged attention, decoders and heads of masked image modelling were never published; theirs are written in
    the same style, so that groups can be decided on them. Raises ValueError if the model has no such parameter.
    """
    name = name.removeprefix("model.")
    top, _, rest = name.partition(".")
    found: tuple[str, ...] = ()
    if top == "vision" and to_openai(rest) is not None:
        found = (CLIP + to_openai(rest),)
    elif top == "vision" and rest.startswith(ENCODER):
        found = (VISION + _with_downsample_behind(rest.removeprefix(ENCODER)),)
    elif top == "text":
        found = (TEXT + rest,)
    elif top == "fusion":
        found = _fusion_names(rest)
    elif top == "decoder" and rest.startswith(("embeddings.", "layers.")):
        found = (f"cross_modal_decoder.{rest}",)
    elif top == "lm_head" and f"mlm_head.{rest}" in HEADS:
        found = (f"decoder_{HEADS[f'mlm_head.{rest}']}",)
    elif name in HEADS:
        found = (HEADS[name],)
    if not found:
        raise ValueError(f"{name!r} is no parameter of a METER model")
    return found


def original_name(name: str) -> str:
    """The published name of one of our parameters (the first, where it stands for several of the same kind).

    METER decides parameter groups by substrings of this name. Raises ValueError as `original_names` does.
    """
    return original_names(name)[0]


def _with_downsample_behind(name: str) -> str:
    """Swin's patch merging ends a stage in the published code and begins the next one in today's timm."""
    return re.sub(r"^layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", name)


def _fusion_names(rest: str) -> tuple[str, ...]:
    module, _, kind = rest.rpartition(".")
    if module in FUSION_TOP:
        return (f"{FUSION_TOP[module]}.{kind}",)
    parts = module.split(".", 2)
    if len(parts) == 3 and parts[0] == "layers" and parts[2] in MERGED_BLOCK:
        return tuple(f"cross_modal_layers.{parts[1]}.{inner}.{kind}" for inner in FUSION_BLOCK[parts[2]])
    parts = module.split(".", 3)
    if len(parts) == 4 and parts[0] == "layers" and parts[2] in ("text", "image") and parts[3] in FUSION_BLOCK:
        return tuple(f"cross_modal_{parts[2]}_layers.{parts[1]}.{inner}.{kind}" for inner in FUSION_BLOCK[parts[3]])
    return ()
