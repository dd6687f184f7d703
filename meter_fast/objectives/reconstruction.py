"""Training an image tokenizer: pictures through its codes and back. Knows pictures and a VQ-VAE, no text.

Source: van den Oord et al. 2017, equation 3 (its second term is the codebook's moving average, see `vq_vae`).
Shape letters: B pictures, S pixels of a side, K codes.
"""

import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from meter_fast.data.batch import PictureBatch
from meter_fast.data.images import ImageTransform, pixel_values
from meter_fast.models.vq_vae import SCALE, VqVae
from meter_fast.objectives.losses import Losses

NAME = "reconstruction"
NEAR = 8 / 255  # a value of a pixel that is so near to the picture's counts as right


def count(batch: PictureBatch) -> int:
    """Pictures B."""
    return len(batch)


class ReconstructionLoss(nn.Module):
    """The module that the engine trains."""

    def __init__(self, model: VqVae, transform: ImageTransform) -> None:
        super().__init__()
        self.model, self.transform = model, transform

    def forward(self, batch: PictureBatch, totals: Mapping[str, float] | None = None) -> Losses:
        """Losses of a micro-batch on the model's device and dtype.

        The loss of a picture is the mean squared error of its values, as the convolutions see them, and the commitment.
        totals: as for `JointLoss`. metrics: "reconstruction", values that are right (see NEAR) of how many; "error",
        the summed squared error of values in 0..1 and how many; "codes", how often each is used [K], and how many.
        """
        pictures = pixel_values(batch.images, self.transform)
        rebuilt, codes, commitment = self.model(pictures)
        error = F.mse_loss(rebuilt, pictures) / SCALE**2
        loss = (error + self.model.config.commitment * commitment) * (len(batch) / (totals or {NAME: len(batch)})[NAME])
        shown = rebuilt.detach().clamp(0, 1)
        values = codes.new_full((), pictures.numel())
        metrics = {
            NAME: (((shown - pictures).abs() <= NEAR).sum(), values),
            "error": ((shown - pictures).square().sum(dtype=torch.float64), values),
            "codes": (codes.flatten().bincount(minlength=self.model.codes), codes.new_full((), codes.numel())),
        }
        return Losses(loss, {NAME: loss.detach()}, metrics)


@torch.inference_mode()
def score_reconstructions(
    model: nn.Module, batches: Iterable[PictureBatch], device: torch.device | str, dtype: torch.dtype | None = None
) -> dict[str, dict[str, float]]:
    """{"reconstruction": {"loss", "accuracy", "psnr", "codes_used", "count"}} over a split, the same on all ranks.

    model: a `ReconstructionLoss`, put in eval mode meanwhile. loss: mean over pictures. accuracy: share of values that
    are near the picture's. psnr: in dB, of the mean squared error of all values. codes_used: share of the codebook.
    Raises ValueError for no batch.
    """
    was_training = model.training
    model.eval()
    numbers: Tensor | None = None
    try:
        for batch in batches:
            losses = model(batch.to(device, dtype))
            right, values = losses.metrics[NAME]
            row = torch.stack([losses.parts[NAME].double() * len(batch), right, losses.metrics["error"][0], values])
            row = torch.cat([row, row.new_full((1,), len(batch)), losses.metrics["codes"][0].double()])
            numbers = row if numbers is None else numbers + row
    finally:
        model.train(was_training)
    if numbers is None:
        raise ValueError("evaluation: the held-out split gave no batch")
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(numbers)
    (loss, right, error, values, pictures), uses = numbers[:5].tolist(), numbers[5:]
    return {
        NAME: {
            "loss": loss / pictures,
            "accuracy": right / values,
            "psnr": -10 * math.log10(max(error / values, 1e-12)),
            "codes_used": (uses > 0).double().mean().item(),
            "count": int(pictures),
        }
    }
