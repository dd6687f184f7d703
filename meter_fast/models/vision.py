"""Vision encoders, built from timm's classes: CLIP's ViT, and those of `encoders`. Knows pictures and patches, nothing
of text or files.

Source: Radford et al. 2021 (CLIP), section 2.4; METER keeps every token after the last norm and drops CLIP's last
block.
"""

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from meter_fast.models.activated_linear import QUICK_GELU
from meter_fast.models.config import VisionConfig
from meter_fast.models.vision_block import parts_of_vit
from meter_fast.models.vision_encoders import build_timm_encoder

LAYER_NORM_EPS = 1e-5


def build_clip_vit(config: VisionConfig) -> VisionTransformer:
    """CLIP's ViT: images [B,3,H,W] -> [B,V,D], class token first, normalised, neither pooled nor projected.

    Pre-norm blocks, QuickGELU, no dropout, no bias in the patch projection, LayerNorm eps 1e-5. Weights are random.
    """
    vision = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=0,
        global_pool="",
        embed_dim=config.width,
        depth=config.layers,
        num_heads=config.heads,
        pre_norm=True,
        drop_path_rate=config.drop_path,
        **parts_of_vit(QUICK_GELU, LAYER_NORM_EPS),
    )
    nn.init.normal_(vision.pos_embed, std=config.position_std)
    return vision


def build_vision(config: VisionConfig) -> nn.Module:
    """The encoder of the kind `config.name`, with random weights: images [B,3,H,W] -> [B,V,D], class tokens first."""
    return build_clip_vit(config) if config.name == "clip_vit" else build_timm_encoder(config)
