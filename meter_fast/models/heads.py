"""Heads of pre-training, pooler, and how new weights start. Knows rows of the fusion, nothing of losses or labels.

Shape letters: B pairs, D fusion width, S vocabulary, M masked rows. Source: METER, section 3.3 and `modules/heads.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meter_fast.kernels.mlm_loss.op import linear_cross_entropy
from meter_fast.kernels.mlm_loss.reference import mlm_loss

LAYER_NORM_EPS = 1e-12


class Decoder(nn.Linear):
    """Scores of the whole vocabulary, or the loss on them. kernel: "reference" or "triton"."""

    def __init__(self, width: int, vocab_size: int, kernel: str = "reference") -> None:
        super().__init__(width, vocab_size)
        self.kernel = kernel

    def forward(self, rows: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """rows [M,D] -> logits [M,S], or with labels [M] int64 what `mlm_loss` returns."""
        if labels is None:
            return super().forward(rows)
        if self.kernel == "triton":
            return linear_cross_entropy(rows, self.weight, self.bias, labels)
        return mlm_loss(super().forward(rows), labels)


class MlmHead(nn.Module):
    """Rows [M,D] -> logits [M,S]: dense, GELU, LayerNorm, decoder with its own matrix (not the embedding table)."""

    def __init__(self, width: int, vocab_size: int, kernel: str = "reference") -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.decoder = Decoder(width, vocab_size, kernel)

    def forward(self, rows: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """With labels [M] int64: (summed loss float32 scalar, rows whose label is on top int64 scalar) in place of
        logits."""
        return self.decoder(self.norm(F.gelu(self.dense(rows))), labels)


class ItmHead(nn.Linear):
    """cls [B,width] -> logits [B,2]; class 1 says that text and picture belong together."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 2)


class Pooler(nn.Module):
    """First token, or mean of the tokens, [B,D] -> [B,D]: dense, tanh."""

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
