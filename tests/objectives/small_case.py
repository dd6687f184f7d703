"""A small random model and batch for the tests of the objectives. Helpers only, no tests."""

import torch

from meter_fast.data.batch import PretrainBatch
from meter_fast.models.config import FusionConfig, ModelConfig, TextConfig, VisionConfig
from meter_fast.models.meter import Meter


def small_model(
    text: str = "bert", fusion_layers: int = 2, dropout: float = 0.0, fusion: str = "co_attention"
) -> Meter:
    """A random model whose weights are large enough for every path to matter."""
    torch.manual_seed(1)
    roberta = text == "roberta"
    model = Meter(
        ModelConfig(
            VisionConfig(width=32, layers=2, heads=2, patch_size=8, image_size=24),
            TextConfig(
                name=text,
                width=24,
                layers=2,
                heads=2,
                ffn=48,
                vocab_size=60,
                max_positions=20,
                token_types=1 if roberta else 2,
                eps=1e-5,
                dropout=dropout,
                pad_id=1 if roberta else 0,
            ),
            FusionConfig(fusion, width=16, layers=fusion_layers, heads=2, dropout=dropout),
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def small_batch(negatives: str = "batch", pairs: int = 6, length: int = 9, pad_id: int = 0) -> PretrainBatch:
    """Random pairs of unequal length; negatives="batch": partner's picture, "dataset": pictures of their own."""
    torch.manual_seed(2)
    lengths = torch.tensor([length, 3, 5, length - 1, 4, 6])[:pairs]
    mask = torch.arange(length)[None] < lengths[:, None]
    ids = torch.where(mask, torch.randint(5, 60, (pairs, length)), pad_id)
    rows = torch.tensor([1, length + 2, 2 * length + 1, 2 * length + 3, 4 * length + 2])
    masked = ids.clone().flatten()
    masked[rows] = 4
    labels = (torch.arange(pairs) // 2 + torch.arange(pairs)) % 2
    places = torch.arange(pairs)
    false_images = None
    if negatives == "batch":
        places = torch.where(labels == 1, places, places ^ 1)
    else:
        false_images = torch.randn(int((labels == 0).sum()), 3, 24, 24)
        places[labels == 0] = pairs + torch.arange(len(false_images))
    return PretrainBatch(
        images=torch.randn(pairs, 3, 24, 24),
        text_ids=ids,
        text_mask=mask,
        masked_ids=masked.view(pairs, length),
        masked_rows=rows,
        masked_labels=ids.flatten()[rows],
        itm_labels=labels,
        itm_images=places,
        false_images=false_images,
        sample_ids=torch.arange(pairs),
    )
