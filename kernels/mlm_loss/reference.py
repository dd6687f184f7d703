"""Cross-entropy over the masked rows, plain form. Knows tensors only, no modules.

Shape letters: M masked rows, S vocabulary. Source: BERT, section 3.1 (task 1); METER, section 3.3.
"""

import torch
from torch import Tensor


def mlm_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the rows of -log softmax(logits)[label], computed in float32, and how many rows have their label on top.

    logits [M,S] floating, labels [M] int64 in 0..S-1. Returns (loss float32 scalar, correct int64 scalar, no gradient);
    no rows give (0, 0), still connected to the graph. The sum, not the mean: the caller knows over how many rows of the
    whole step the mean goes.
    """
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    loss = -log_probabilities.gather(1, labels[:, None]).sum()
    correct = (logits.detach().argmax(dim=-1) == labels).sum()
    return loss, correct
