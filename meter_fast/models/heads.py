"""Heads of pre-training, pooler, and how new weights start. Knows rows of the fusion, nothing of losses or labels.

Shape letters: B pairs, D fusion width, S vocabulary, M masked rows. Source: METER, section 3.3 and `modules/heads.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-12


class MlmHead(nn.Module):
    """Rows [M,D] -> logits [M,S]: dense, GELU, LayerNorm, decoder with its own matrix (not the embedding table)."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.decoder = nn.Linear(width, vocab_size)

    def forward(self, rows: Tensor) -> Tensor:
        return self.decoder(self.norm(F.gelu(self.dense(rows))))


class ItmHead(nn.Linear):
    """cls [B,2D] -> logits [B,2]; class 1 says that text and picture belong together."""

    def __init__(self, width: int) -> None:
        super().__init__(2 * width, 2)


class Pooler(nn.Module):
    """First token [B,D] -> [B,D]: dense, tanh."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, first: Tensor) -> Tensor:
        return torch.tanh(self.dense(first))


def init_new_weights(module: nn.Module, std: float) -> None:
    """Starts what no encoder file brings, in place: Linear and Embedding N(0, std), biases 0, LayerNorm 1 and 0."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=std)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
        if isinstance(part, (nn.Linear, nn.LayerNorm)) and part.bias is not None:
            nn.init.zeros_(part.bias)
