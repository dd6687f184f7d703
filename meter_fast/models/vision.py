"""Vision encoders, built from timm's classes: CLIP's ViT, and those of `encoders`. Knows pictures and patches, nothing
of text or files.

Source: Radford et al. 2021 (CLIP), section 2.4; METER keeps every token after the last norm and drops CLIP's last
block.
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from meter_fast.models.attention_layer import SelfAttention
from meter_fast.models.config import VisionConfig
from meter_fast.models.recomputed import RecomputedMlp, RecomputedNorm
from meter_fast.models.vision_encoders import build_timm_encoder

LAYER_NORM_EPS = 1e-5


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), of which backward keeps x alone."""

    def forward(self, x: Tensor) -> Tensor:
        return _QuickGelu.apply(x)


class _QuickGelu(torch.autograd.Function):
    """Written as silu(1.702 x) / 1.702, for which torch has one kernel in each direction."""

    SLOPE = 1.702

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.silu(x * _QuickGelu.SLOPE).mul_(1 / _QuickGelu.SLOPE)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient, x * _QuickGelu.SLOPE)


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
        norm_layer=partial(RecomputedNorm, eps=LAYER_NORM_EPS),
        act_layer=QuickGELU,
        drop_path_rate=config.drop_path,
        attn_layer=SelfAttention,
        mlp_layer=RecomputedMlp,
    )
    nn.init.normal_(vision.pos_embed, std=config.position_std)
    return vision


def build_vision(config: VisionConfig) -> nn.Module:
    """The encoder of the kind `config.name`, with random weights: images [B,3,H,W] -> [B,V,D], class tokens first."""
    return build_clip_vit(config) if config.name == "clip_vit" else build_timm_encoder(config)
