"""What the test of retrieval takes: every picture against every caption, encoders and what pairs share computed once.

Knows models and how pairs are scored; nothing of runs, data or machines' rates.
"""

import math

import torch

from meter_fast.flops import count_flops
from meter_fast.models.config import KernelsConfig, ModelConfig
from meter_fast.models.meter import Meter
from meter_fast.score_retrieval import PICTURES_PER_BLOCK, encode_texts, pairs_at_once, ranked

SPLITS = {"retrieval_f30k": (1000, 5000), "retrieval_coco": (5000, 25010)}  # pictures and captions of Karpathy's tests


def flops_per_pair(
    config: ModelConfig,
    pictures: int,
    captions: int,
    tokens: int,
    kernels: KernelsConfig = KernelsConfig(),  # noqa: B008
) -> float:
    """FLOPs of a pair where `pictures` and `captions` of `tokens` tokens are scored against each other."""
    with torch.device("meta"):
        model = Meter(config, load_weights=False, kernels=kernels).eval()
        pixels = torch.empty(1, 3, *(config.vision.image_size,) * 2)
    ids, at_once = [[5] * tokens], pairs_at_once(model)
    side_by_side = min(pictures, PICTURES_PER_BLOCK), min(captions, max(1, at_once // 2))
    image = model.encode_image(pixels).detach().expand(side_by_side[0], -1, -1)
    (group,) = encode_texts(model, ids * side_by_side[1])
    once = count_flops(lambda: model.encode_image(pixels)) / captions
    once += count_flops(lambda: encode_texts(model, ids)) / pictures
    return once + count_flops(lambda: list(ranked(model, image, group, at_once))) / math.prod(side_by_side)
