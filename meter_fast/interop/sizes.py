"""Infers a model's configuration from the tensors of a published checkpoint. Knows names and shapes, reads no files.

Numbers of heads do not show in tensors: they come from the checkpoint's own configuration, from the published sizes
(768 wide: 12 heads, 1024 wide: 16), or from the caller.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from meter_fast.models.config import FusionConfig, ModelConfig, TextConfig, VisionConfig
from meter_fast.models.positions import grid_of

PUBLISHED_HEADS = {768: 12, 1024: 16}
CLIP_HEAD_WIDTH = 64
TABLE = "vit_model.visual.positional_embedding"
PATCHES = "vit_model.visual.conv1.weight"
WORDS = "text_transformer.embeddings.word_embeddings.weight"
NEEDED = (
    TABLE,
    PATCHES,
    WORDS,
    "text_transformer.embeddings.position_embeddings.weight",
    "text_transformer.embeddings.token_type_embeddings.weight",
    "text_transformer.encoder.layer.0.intermediate.dense.weight",
    "cross_modal_text_transform.weight",
    "token_type_embeddings.weight",
)


def infer_config(
    state: Mapping[str, Tensor],
    published: Mapping[str, object],
    text_heads: int | None,
    fusion_heads: int | None,
    image_size: int | None,
) -> ModelConfig:
    """The configuration of the model that `state` (published names) belongs to.

    published: METER's own configuration dict, or {}. Arguments left None are inferred. Raises ValueError if the state
    is not that of a METER with a CLIP ViT, naming what it lacks, or if a number of heads must be given.
    """
    _check_kind(state)
    words, types = state[WORDS], state[NEEDED[4]]
    name = _text_kind(published, types.shape[0])
    fusion_width = state["cross_modal_text_transform.weight"].shape[0]
    patches = state[PATCHES]
    grid = grid_of(state[TABLE].shape[0], TABLE)
    if fusion_heads is None and "num_heads" in published:
        fusion_heads = int(published["num_heads"])
    return ModelConfig(
        vision=VisionConfig(
            width=patches.shape[0],
            layers=_count(state, r"vit_model\.visual\.transformer\.resblocks\.(\d+)\."),
            heads=max(1, patches.shape[0] // CLIP_HEAD_WIDTH),
            patch_size=patches.shape[-1],
            image_size=image_size or grid * patches.shape[-1],
        ),
        text=TextConfig(
            name=name,
            width=words.shape[1],
            layers=_count(state, r"text_transformer\.encoder\.layer\.(\d+)\."),
            heads=_heads(text_heads, words.shape[1], "text_heads"),
            ffn=state[NEEDED[5]].shape[0],
            vocab_size=words.shape[0],
            max_positions=state[NEEDED[3]].shape[0],
            token_types=types.shape[0],
            eps=1e-5 if name == "roberta" else 1e-12,
            pad_id=1 if name == "roberta" else 0,
        ),
        fusion=FusionConfig(
            width=fusion_width,
            layers=_count(state, r"cross_modal_text_layers\.(\d+)\."),
            heads=_heads(fusion_heads, fusion_width, "fusion_heads"),
            dropout=float(published.get("drop_rate", 0.1)),
            token_types=state["token_type_embeddings.weight"].shape[0],
        ),
        mlm_head=any(key.startswith("mlm_score.") for key in state),
        itm_head=any(key.startswith("itm_score.") for key in state),
    )


def _check_kind(state: Mapping[str, Tensor]) -> None:
    missing = [key for key in NEEDED if key not in state]
    if not missing:
        return
    if any("relative_position_bias_table" in key for key in state):
        raise ValueError("this METER checkpoint has a Swin vision encoder: only those with a CLIP ViT can be read")
    shown = ", ".join(sorted(state)[:4]) or "nothing"
    raise ValueError(
        f"this is no METER checkpoint: {len(missing)} of the {len(NEEDED)} tensors that tell its sizes are missing "
        f"({missing[0]}, ...); it holds {len(state)} tensors: {shown}"
    )


def _text_kind(published: Mapping[str, object], token_types: int) -> str:
    tokenizer = str(published.get("tokenizer", ""))
    for name in ("roberta", "bert"):
        if name in tokenizer:
            return name
    return "roberta" if token_types == 1 else "bert"


def _heads(given: int | None, width: int, argument: str) -> int:
    if given is not None:
        return given
    if width not in PUBLISHED_HEADS:
        raise ValueError(f"the number of heads of a {width} wide part does not show in the tensors: pass {argument}=")
    return PUBLISHED_HEADS[width]


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many layers there are; they must be numbered without a gap."""
    numbers = {int(found.group(1)) for key in state if (found := re.match(pattern, key))}
    if numbers != set(range(len(numbers))):
        raise ValueError(
            f"layers {sorted(numbers)} of {pattern} are not numbered 0, 1, 2, ...: part of the file is missing"
        )
    return len(numbers)
