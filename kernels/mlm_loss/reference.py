"""Cross-entropy over the masked rows, plain form. Knows tensors only, no modules.

Shape letters: M masked rows, D width, S vocabulary, Sp row stride of the logits. Source: BERT, section 3.1 (task 1);
METER, section 3.3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def mlm_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the rows of -log softmax(logits)[label], in float32 or wider, and how many rows have their label on top.

    logits [M,S] floating, labels [M] int64 in 0..S-1. Returns (loss, a scalar; correct, int64 scalar, no gradient);
    no rows give (0, 0), still connected to the graph. The sum, not the mean: the caller knows over how many rows of the
    whole step the mean goes.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_probabilities = torch.log_softmax(logits, dim=-1, dtype=wide)
    loss = -log_probabilities.gather(1, labels[:, None]).sum()
    correct = (logits.detach().argmax(dim=-1) == labels).sum()
    return loss, correct


def linear_cross_entropy(rows: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`mlm_loss` of the logits rows @ weightᵀ + bias. rows [M,D], weight [S,D], bias [S], labels int64 [M]."""
    return mlm_loss(F.linear(rows, weight, bias), labels)


def cross_entropy_(
    logits: Tensor, bias: Tensor, labels: Tensor, vocabulary: int, gradient: bool
) -> tuple[Tensor, Tensor]:
    """What the kernel does to a buffer of logits [M,Sp] without their bias [Sp]: losses float32 [M] and hits bool [M];
    with `gradient`, d losses / d logits overwrites the logits, and the columns from S on become 0."""
    scores = logits[:, :vocabulary].float() + bias[:vocabulary]
    log_probabilities = torch.log_softmax(scores, dim=-1)
    losses = -log_probabilities.gather(1, labels[:, None]).squeeze(1)
    if gradient:
        logits[:, :vocabulary] = log_probabilities.exp() - F.one_hot(labels, vocabulary)
        logits[:, vocabulary:] = 0
    return losses, scores.argmax(dim=-1) == labels
