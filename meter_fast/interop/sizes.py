"""Infers a model's configuration from the tensors of a published checkpoint. Knows names and shapes, reads no files.

Numbers of heads do not show in tensors: they come from the checkpoint's own configuration, from the published sizes
(768 wide: 12 heads, 1024 wide: 16), or from the caller. Of a Swin they do show.
"""

import math
import re
from collections.abc import Mapping

from torch import Tensor

from meter_fast.models.config import FusionConfig, ModelConfig, TextConfig, VisionConfig
from meter_fast.models.positions import grid_of

PUBLISHED_HEADS = {768: 12, 1024: 16}
CLIP_HEAD_WIDTH = 64
TABLE = "vit_model.visual.positional_embedding"
PATCHES = "vit_model.visual.conv1.weight"
SWIN_STAGES = 4
SWIN_DROP_PATH = 0.1
SWIN_BIASES = f"vit_model.layers.{SWIN_STAGES - 1}.blocks.0.attn.relative_position_bias_table"
SWIN_PATCHES = "vit_model.patch_embed.proj.weight"
WORDS = "text_transformer.embeddings.word_embeddings.weight"
TEXT_POSITIONS = "text_transformer.embeddings.position_embeddings.weight"
TEXT_TYPES = "text_transformer.embeddings.token_type_embeddings.weight"
TEXT_FFN = "text_transformer.encoder.layer.0.intermediate.dense.weight"
VQA_OUT = "vqa_classifier.3.bias"
NEEDED = (
    WORDS,
    TEXT_POSITIONS,
    TEXT_TYPES,
    TEXT_FFN,
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
    is not that of a METER with a CLIP ViT or a Swin, naming what it lacks, or if a number of heads must be given.
    """
    _check_kind(state)
    words, types = state[WORDS], state[TEXT_TYPES]
    name = _text_kind(published, types.shape[0])
    fusion_width = state["cross_modal_text_transform.weight"].shape[0]
    if fusion_heads is None and "num_heads" in published:
        fusion_heads = int(published["num_heads"])
    return ModelConfig(
        vision=_swin_config(state, image_size) if _is_swin(state) else _clip_config(state, image_size),
        text=TextConfig(
            name=name,
            width=words.shape[1],
            layers=_count(state, r"text_transformer\.encoder\.layer\.(\d+)\."),
            heads=_heads(text_heads, words.shape[1], "text_heads"),
            ffn=state[TEXT_FFN].shape[0],
            vocab_size=words.shape[0],
            max_positions=state[TEXT_POSITIONS].shape[0],
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
        mim_in_batch_head=any(key.startswith("mim_in_batch_score.") for key in state),
        mim_codes_head=len(state["mim_codes_score.weight"]) if "mim_codes_score.weight" in state else 0,
        vqa_answers=len(state.get(VQA_OUT, ())),
        nlvr2_head="nlvr2_classifier.3.bias" in state,
        snli_head="snli_classifier.3.bias" in state,
        rank_head="rank_output.bias" in state,
    )


def _is_swin(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith("vit_model.layers.") for key in state)


def _check_kind(state: Mapping[str, Tensor]) -> None:
    needed = ((SWIN_BIASES, SWIN_PATCHES) if _is_swin(state) else (TABLE, PATCHES)) + NEEDED
    missing = [key for key in needed if key not in state]
    if not missing:
        return
    shown = ", ".join(sorted(state)[:4]) or "nothing"
    raise ValueError(
        f"this is no METER checkpoint: {len(missing)} of the {len(needed)} tensors that tell its sizes are missing "
        f"({missing[0]}, ...); it holds {len(state)} tensors: {shown}"
    )


def _clip_config(state: Mapping[str, Tensor], image_size: int | None) -> VisionConfig:
    patches = state[PATCHES]
    grid = grid_of(state[TABLE].shape[0], TABLE)
    return VisionConfig(
        width=patches.shape[0],
        layers=_count(state, r"vit_model\.visual\.transformer\.resblocks\.(\d+)\."),
        heads=max(1, patches.shape[0] // CLIP_HEAD_WIDTH),
        patch_size=patches.shape[-1],
        image_size=image_size or grid * patches.shape[-1],
    )


def _swin_config(state: Mapping[str, Tensor], image_size: int | None) -> VisionConfig:
    """Heads and windows show in the bias tables; the last stage is one window, so it tells the resolution."""
    rows, heads = state[SWIN_BIASES].shape
    window = (math.isqrt(rows) + 1) // 2
    if (2 * window - 1) ** 2 != rows:
        raise ValueError(f"{SWIN_BIASES} has {rows} rows, which is no square of an odd number: another kind of model?")
    depths = [_count(state, rf"vit_model\.layers\.{stage}\.blocks\.(\d+)\.") for stage in range(SWIN_STAGES)]
    if [depths[0], depths[1], depths[3]] != [2, 2, 2]:
        raise ValueError(f"a Swin with stages of {depths} blocks is not known: only 2, 2, any number, 2")
    width, _, _, patch = state[SWIN_PATCHES].shape
    firsts = 2 ** (SWIN_STAGES - 1)
    return VisionConfig(
        name="swin",
        width=width * firsts,
        layers=sum(depths),
        heads=heads,
        patch_size=patch * firsts,
        image_size=image_size or window * patch * firsts,
        drop_path=SWIN_DROP_PATH,
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
        raise ValueError(
            f"the number of heads of a {width} wide part does not show in the tensors: pass {argument}=, or make an "
            f"export with meter-fast convert SRC OUT --{argument.replace('_', '-')} N"
        )
    return PUBLISHED_HEADS[width]


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many layers there are; they must be numbered without a gap."""
    numbers = {int(found.group(1)) for key in state if (found := re.match(pattern, key))}
    if numbers != set(range(len(numbers))):
        raise ValueError(
            f"layers {sorted(numbers)} of {pattern} are not numbered 0, 1, 2, ...: part of the file is missing"
        )
    return len(numbers)
