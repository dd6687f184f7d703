"""The other vision encoders of the paper, built from timm's classes: ViT, DeiT, CaiT, VOLO, BEiT, Swin.

Each gives [B,V,D]: every token after the last norm, class tokens first, neither pooled nor classified. Knows pictures
and patches, nothing of text or files. Weights are random. Source: METER, section 4.1 and tables 1 to 3; papers below.
"""

import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.volo import VOLO
from torch import Tensor, nn

from meter_fast.models.activated_linear import GELU
from meter_fast.models.attention_layer import BeitAttention, WindowAttention
from meter_fast.models.config import VisionConfig
from meter_fast.models.vision_block import parts_of_vit

STAGES = 4
OUTLOOK_HEAD_WIDTH = 32
LAYER_NORM_EPS = 1e-6  # of ViT and DeiT


class TimmEncoder(nn.Module):
    """An encoder under a name of its own, `encoder`, so that names of its tensors tell it from CLIP's.

    ZeRO-3 gathers a module's parameters when the module is called, hence `encoder(images)` and no inner method.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> [B,V,D]."""
        tokens = self.encoder(images)
        return tokens.flatten(1, 2) if tokens.dim() == 4 else tokens

    def set_grad_checkpointing(self, on: bool) -> None:
        self.encoder.set_grad_checkpointing(on)


class DistilledTransformer(VisionTransformerDistilled):
    """timm's class, which pools in any case, without that."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B,3,S,S] -> [B,2+g*g,D]: class token, distillation token, patches."""
        return self.forward_features(x)


class FixedBatchNorm(nn.Module):
    """BatchNorm2d with the statistics of a weights file: of no batch, so that a picture's tokens depend on no other
    picture, nor on how a batch is spread over processes. They are parameters without gradient, hence in checkpoints.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean = nn.Parameter(norm.running_mean, requires_grad=False)
        self.running_var = nn.Parameter(norm.running_var, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,C,H,W] -> the same."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def build_vit(config: VisionConfig) -> VisionTransformer:
    """ViT and DeiT (Dosovitskiy et al. 2021; Touvron et al. 2021): pre-norm, GELU, LayerNorm eps 1e-6."""
    return VisionTransformer(global_pool="", **_common(config), **parts_of_vit(GELU, LAYER_NORM_EPS))


def build_deit_distilled(config: VisionConfig) -> DistilledTransformer:
    """DeiT with a distillation token after the class token (Touvron et al. 2021, section 4)."""
    return DistilledTransformer(**_common(config), **parts_of_vit(GELU, LAYER_NORM_EPS))


def build_cait(config: VisionConfig) -> Cait:
    """CaiT-M (Touvron et al. 2021b): talking heads, layer scale from 1e-6, two class-attention blocks at the end."""
    return Cait(global_pool="", **_common(config), init_values=1e-6)


def build_beit(config: VisionConfig) -> Beit:
    """BEiT (Bao et al. 2021), fine-tuned form: no position table but relative biases in each block, layer scale."""
    common, window = _common(config), (config.grid, config.grid)
    encoder = Beit(global_pool="", **common, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)
    for block in encoder.blocks:
        block.attn = BeitAttention(config.width, config.heads, qkv_bias=True, window_size=window)
    return encoder


def build_volo(config: VisionConfig) -> VOLO:
    """VOLO in the proportions of D1, D3 and D4 (Yuan et al. 2021): outlook attention at twice the grid, then a ViT."""
    ninth, width = config.layers // 9, config.width
    encoder = VOLO(
        layers=[2 * ninth, 2 * ninth, 4 * ninth, ninth],
        img_size=config.image_size,
        num_classes=0,
        global_pool="",
        patch_size=config.patch_size // 2,
        embed_dims=[width // 2, width, width, width],
        num_heads=[width // 2 // OUTLOOK_HEAD_WIDTH, config.heads, config.heads, config.heads],
        drop_path_rate=config.drop_path,
    )
    stem = encoder.patch_embed.conv
    for i, layer in enumerate(stem):
        if isinstance(layer, nn.BatchNorm2d):
            stem[i] = FixedBatchNorm(layer)
    return encoder


def build_swin(config: VisionConfig) -> SwinTransformer:
    """Swin (Liu et al. 2021) as METER has it: windows of image_size // 32, whatever size the weights were made for."""
    firsts = 2 ** (STAGES - 1)
    encoder = SwinTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size // firsts,
        num_classes=0,
        global_pool="",
        embed_dim=config.width // firsts,
        depths=(2, 2, config.layers - 6, 2),
        num_heads=tuple(config.heads // firsts * 2**stage for stage in range(STAGES)),
        window_size=config.grid,
        drop_path_rate=config.drop_path,
    )
    for stage in encoder.layers:
        for block in stage.blocks:
            block.attn = WindowAttention(block.dim, block.attn.num_heads, window_size=block.window_size)
    return encoder


BUILDERS = {
    "vit": build_vit,
    "deit_distilled": build_deit_distilled,
    "cait": build_cait,
    "volo": build_volo,
    "beit": build_beit,
    "swin": build_swin,
}


def build_timm_encoder(config: VisionConfig) -> TimmEncoder:
    """The encoder of the kind `config.name`; a position table starts with `config.position_std`."""
    encoder = BUILDERS[config.name](config)
    if isinstance(getattr(encoder, "pos_embed", None), torch.Tensor):
        nn.init.normal_(encoder.pos_embed, std=config.position_std)
    return TimmEncoder(encoder)


def _common(config: VisionConfig) -> dict[str, object]:
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "num_classes": 0,
        "embed_dim": config.width,
        "depth": config.layers,
        "num_heads": config.heads,
        "drop_path_rate": config.drop_path,
    }
