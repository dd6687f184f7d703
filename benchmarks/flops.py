"""Floating-point operations of a piece of code, counted from its shapes alone: no weights, no time.

torch's FlopCounterMode sees neither the fused attention of a CPU nor what an operator of our own does inside, so
attention is written out as multiplications, and our operators bring a formula.
"""

from collections.abc import Callable
from typing import TypeVar

import meter_fast.kernels.cross_attention.absorbed  # noqa: F401 (defines the operators)
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")


def _absorbed(text: torch.Size, image: torch.Size, tokens_width: int, heads: int) -> int:
    """Two folded products of each text token, D x D, and two of each image token with the H * T folded rows."""
    pairs, tokens = text[:2]
    width = image[2]
    return 4 * pairs * tokens * tokens_width * width + 4 * pairs * image[1] * tokens * heads * width


def _text_reads_image(query, image, key_value_weight, key_value_bias, lengths, seed, heads, dropout, **_) -> int:
    return _absorbed(query, image, query[2], heads)


def _image_reads_text(
    key_value, image, query_weight, query_bias, out_weight, lengths, seed, heads, dropout, **_
) -> int:
    return _absorbed(key_value, image, image[2], heads)


FORMULAS = {
    torch.ops.meter_fast.text_reads_image: _text_reads_image,
    torch.ops.meter_fast.image_reads_text: _image_reads_text,
}


def count_flops(work: Callable[[], object]) -> int:
    """Operations of `work`, forward only. On tensors of the meta device nothing is computed."""
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:
        work()
    return counter.get_total_flops()
