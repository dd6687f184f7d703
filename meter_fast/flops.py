"""Floating-point operations of a piece of code, counted from its shapes alone: no weights, no time.

torch's FlopCounterMode sees neither the fused attention of a CPU nor what an operator of our own does inside, so
attention is written out as multiplications, and our operators bring a formula. Knows our operators; nothing of models,
runs or machines.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import meter_fast.kernels.cross_attention.absorbed  # noqa: F401 (defines the operators)

T = TypeVar("T")


def _absorbed(text: torch.Size, image: torch.Size, heads: int, folds: int = 2, reads: int = 2) -> int:
    """folds: products of each text token with a D x D matrix; reads: of each image token with the H * T folded rows."""
    (pairs, tokens), (images, width) = text[:2], image[1:]
    return 2 * pairs * tokens * width * (folds * width + reads * images * heads)


def _text_reads_image(query, image, key_value_weight, key_value_bias, lengths, seed, heads, dropout, **_) -> int:
    return _absorbed(query, image, heads)


def _image_reads_text(
    key_value, image, query_weight, query_bias, out_weight, lengths, seed, heads, dropout, **_
) -> int:
    return _absorbed(key_value, image, heads)


def _text_reads_image_backward(gradient, query, image, *others, **_) -> int:
    gathered = others[5]  # [B*T,H,D]
    return _absorbed(query, image, gathered[1], folds=5, reads=4)


def _image_reads_text_backward(gradient, key_value, image, *others, **_) -> int:
    probabilities = others[4]  # [B,V,T,H]
    return _absorbed(key_value, image, probabilities[3], folds=6, reads=4)


FORMULAS = {
    torch.ops.meter_fast.text_reads_image: _text_reads_image,
    torch.ops.meter_fast.text_reads_image_backward: _text_reads_image_backward,
    torch.ops.meter_fast.image_reads_text: _image_reads_text,
    torch.ops.meter_fast.image_reads_text_backward: _image_reads_text_backward,
}


def count_flops(work: Callable[[], object], backward: bool = False) -> int:
    """Operations of `work`, with what it calls of backward passes or without. On tensors of the meta device nothing is
    computed."""
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with torch.inference_mode(not backward), sdpa_kernel(SDPBackend.MATH), counter:
        work()
    return counter.get_total_flops()
