"""Pre-norm blocks of ViT, CLIP and DeiT: timm's, with their names and weights, of which a step keeps less.

Shape letters: B pictures, V tokens, D width. Source: Dosovitskiy et al. 2021, section 3.1.
"""

from functools import partial
from typing import Any

from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from meter_fast.models.activated_linear import ActivatedLinear, Activation
from meter_fast.models.attention_layer import SelfAttention
from meter_fast.models.blocks import add_residual
from meter_fast.models.recomputed import RecomputedNorm


class Block(TimmBlock):
    """x + attention(norm(x)), and the same of the feed-forward network."""

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """x [B,V,D] -> [B,V,D]."""
        x = add_residual(self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask, is_causal))), x)
        return add_residual(self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), x)


class Mlp(nn.Module):
    """A linear layer, an activation and another linear layer. Takes what timm's blocks pass to theirs, but for
    `activation` in place of `act_layer`.

    Raises ValueError for a norm in its middle and for dropout.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        activation: Activation,
        bias: bool = True,
        drop: float = 0.0,
        norm_layer: None = None,
        act_layer: object = None,
        device: None = None,
        dtype: None = None,
    ) -> None:
        super().__init__()
        if drop or norm_layer is not None:
            raise ValueError(f"drop={drop}, norm_layer={norm_layer}: this network has no dropout and no norm inside")
        self.fc1 = nn.Linear(in_features, hidden_features, bias)
        self.fc2 = ActivatedLinear(hidden_features, in_features, bias, activation)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.fc2(self.fc1(x))


def parts_of_vit(activation: Activation, norm_eps: float) -> dict[str, Any]:
    """What timm's VisionTransformer is to be made of."""
    return {
        "block_fn": Block,
        "attn_layer": SelfAttention,
        "mlp_layer": partial(Mlp, activation=activation),
        "norm_layer": partial(RecomputedNorm, eps=norm_eps),
    }
