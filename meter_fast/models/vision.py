"""Vision encoder: CLIP's ViT, built from timm's VisionTransformer. Knows pictures and patches, nothing of text or
files.

Source: Radford et al. 2021 (CLIP), section 2.4; METER keeps every token after the last norm and drops CLIP's last
block.
"""

from functools import partial

import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from meter_fast.kernels.cross_attention.reference import attention
from meter_fast.models.config import VisionConfig

LAYER_NORM_EPS = 1e-5


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), written as silu(1.702 x) / 1.702 so that backward keeps one tensor instead of two."""

    SLOPE = 1.702

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x * self.SLOPE) * (1 / self.SLOPE)


class SelfAttention(Attention):
    """timm's self-attention with its names and weights, on the attention core that all parts of the model share."""

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """x [B,V,D] -> [B,V,D]."""
        assert attn_mask is None and not is_causal  # the tokens of a picture all see each other
        packed = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(attention(*packed.unbind(0)).transpose(1, 2).flatten(2))


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
        norm_layer=partial(nn.LayerNorm, eps=LAYER_NORM_EPS),
        act_layer=QuickGELU,
        attn_layer=SelfAttention,
    )
    nn.init.normal_(vision.pos_embed, std=config.position_std)
    return vision


BUILDERS = {"clip_vit": build_clip_vit}


def build_vision(config: VisionConfig) -> nn.Module:
    """The encoder that `config.name` names, with random weights. Raises ValueError on an unknown name."""
    if config.name not in BUILDERS:
        raise ValueError(f"vision.name={config.name!r} is unknown: use one of {', '.join(BUILDERS)}")
    return BUILDERS[config.name](config)
