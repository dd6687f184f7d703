"""The vision encoders of the paper by name: sizes, native resolution, weights. Knows plain values only.

What a run stores is the configuration written out (the kind "swin" and all numbers), so it does not depend on this
table.
Source: METER, tables 1 to 3; names of weights: timm.
"""

from dataclasses import dataclass, replace
from typing import Literal

from meter_fast.models.config import VisionConfig, tiny

VisionChoice = Literal[
    "default", "clip_b32_224", "clip_b16_224", "clip_l14_224", "vit_b16_384", "deit_b16_384", "deit_distilled_b16_384",
    "cait_m36_384", "volo_d4_448", "beit_b16_224", "swin_b_224", "swin_b_384", "swin_l_224", "swin_l_384",
]  # fmt: skip


@dataclass(frozen=True)
class VisionPreset:
    """config: at the native resolution, with the timm model whose weights it starts from. parameters: of the encoder
    as it is built here, without classifier (CLIP's without its last block, as published). transform: the
    `data.transform` that its weights were trained with.
    """

    config: VisionConfig
    parameters: int
    transform: str


def _clip(patch: int, width: int, layers: int, heads: int, letter: str, parameters: int) -> VisionPreset:
    weights = f"vit_{letter}_patch{patch}_clip_quickgelu_224.openai"
    config = VisionConfig("clip_vit", width, layers, heads, patch, image_size=224, weights=weights)
    return VisionPreset(config, parameters, "clip")


def _base(name: str, size: int, weights: str, parameters: int, transform: str) -> VisionPreset:
    return VisionPreset(VisionConfig(name, 768, 12, 12, 16, size, weights), parameters, transform)


def _swin(width: int, heads: int, size: int, letter: str, parameters: int) -> VisionPreset:
    weights = f"swin_{letter}_patch4_window{size // 32}_{size}.ms_in22k"
    config = VisionConfig("swin", width, 24, heads, 32, size, weights, drop_path=0.1)
    return VisionPreset(config, parameters, "imagenet")


VISION_PRESETS = {
    "clip_b32_224": _clip(32, 768, 11, 12, "base", 80_368_128),
    "clip_b16_224": _clip(16, 768, 11, 12, "base", 78_711_552),
    "clip_l14_224": _clip(14, 1024, 23, 16, "large", 290_583_552),
    "vit_b16_384": _base("vit", 384, "vit_base_patch16_384.augreg_in21k_ft_in1k", 86_090_496, "vit"),
    "deit_b16_384": _base("vit", 384, "deit_base_patch16_384.fb_in1k", 86_090_496, "imagenet"),
    "deit_distilled_b16_384": _base(
        "deit_distilled", 384, "deit_base_distilled_patch16_384.fb_in1k", 86_092_032, "imagenet"
    ),
    "cait_m36_384": VisionPreset(
        VisionConfig("cait", 768, 36, 16, 16, 384, "cait_m36_384.fb_dist_in1k"), 270_452_352, "imagenet"
    ),
    "volo_d4_448": VisionPreset(
        VisionConfig("volo", 768, 36, 16, 16, 448, "volo_d4_448.sail_in1k"), 191_875_104, "imagenet"
    ),
    "beit_b16_224": _base("beit", 224, "beit_base_patch16_224.in22k_ft_in22k", 85_761_984, "vit"),
    "swin_b_224": _swin(1024, 32, 224, "base", 86_743_224),
    "swin_b_384": _swin(1024, 32, 384, "base", 86_878_584),
    "swin_l_224": _swin(1536, 48, 224, "large", 194_995_476),
    "swin_l_384": _swin(1536, 48, 384, "large", 195_198_516),
}


def tiny_vision(choice: str) -> VisionConfig:
    """The kind of encoder of a preset at the size of `config.tiny()`, with random weights. A VOLO has at least 9 layers
    and a Swin 7."""
    kind = VISION_PRESETS[choice].config.name
    layers, heads = {"volo": (9, 4), "swin": (7, 8)}.get(kind, (3, 2))
    return replace(tiny().vision, name=kind, layers=layers, heads=heads)
