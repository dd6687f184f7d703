"""Heads, pooler, and how new weights start. Knows rows of the fusion, nothing of losses or labels.

Shape letters: B pairs, D fusion width, S vocabulary, M masked rows, A answers. Source: METER, section 3.3 and
`modules/heads.py`.
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


class MimInBatchHead(nn.Module):
    """h and c of the paper's equation 2: what the model says stands in a cell of the picture, and what a cell holds.

    h is dense, GELU, LayerNorm, as in the MLM head; c is one linear layer over the cell's own pixels, and LayerNorm.
    Scores are h·c / sqrt(D): products of two normed vectors grow with D, and softmax would begin saturated. all_ranks:
    whether the cells of all processes are candidates.
    """

    def __init__(self, width: int, cell_values: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.cell = nn.Linear(cell_values, width)
        # No bias: what all candidates share, softmax does not see. This eps bears cells whose vector is 0.
        self.cell_norm = nn.LayerNorm(width, bias=False)
        self.all_ranks = False

    def forward(self, rows: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """rows [M,D], pixels of cells [N,3*P*P] -> (h / sqrt(D) [M,D], c [N,D])."""
        said = self.norm(F.gelu(self.dense(rows))) * rows.shape[1] ** -0.5
        return said, self.cell_norm(self.cell(cells))


class AnswerHead(nn.Module):
    """cls [B,2D] ([B,D] of a decoder) -> logits [B,A] of the answers: dense 2D, LayerNorm eps 1e-5, GELU, dense A."""

    def __init__(self, inputs: int, width: int, answers: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, 2 * width)
        self.norm = nn.LayerNorm(2 * width)
        self.out = nn.Linear(2 * width, answers)

    def forward(self, cls: Tensor) -> Tensor:
        return self.out(F.gelu(self.norm(self.dense(cls))))


class RankHead(nn.Linear):
    """cls [B,width] -> scores [B,1], which rank texts of a picture or pictures of a text; float32 or wider, as scores
    rounded to bfloat16 would tie."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1)

    def forward(self, cls: Tensor) -> Tensor:
        dtype = torch.promote_types(cls.dtype, torch.float32)
        return F.linear(cls.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


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
