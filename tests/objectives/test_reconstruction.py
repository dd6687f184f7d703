"""The loss of an image tokenizer and its held-out scores, against plain computations."""

import math

import pytest
import torch
import torch.nn.functional as F

from meter_fast.data.batch import PictureBatch
from meter_fast.data.images import image_transform, normalise
from meter_fast.models.image_tokenizer_config import ImageTokenizerConfig
from meter_fast.models.vq_vae import VqVae
from meter_fast.objectives.joint import counts_of
from meter_fast.objectives.reconstruction import ReconstructionLoss, score_reconstructions

SMALL = ImageTokenizerConfig(image_size=16, downsamplings=2, codes=12, code_width=4, width=8, blocks=1)
CLIP = image_transform("clip", 16)


def module() -> ReconstructionLoss:
    torch.manual_seed(0)
    model = VqVae(SMALL)
    model(torch.rand(8, 3, 16, 16))  # gives the codebook values
    return ReconstructionLoss(model, CLIP).eval()


def batch(count: int = 6, seed: int = 0) -> tuple[PictureBatch, torch.Tensor]:
    """Pictures as a loader gives them, and their values in 0..1."""
    pixels = torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(seed)).byte()
    return PictureBatch(normalise(pixels, CLIP, torch.float32), torch.arange(count)), pixels / 255


def test_loss() -> None:
    own, (given, pictures) = module(), batch()
    losses = own(given)
    rebuilt, codes, commitment = own.model(pictures)
    expected = F.mse_loss(4 * rebuilt, 4 * pictures) + 0.25 * commitment
    assert losses.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    right, values = losses.metrics["reconstruction"]
    assert (
        right.item() == ((rebuilt.clamp(0, 1) - pictures).abs() <= 8 / 255).sum() and values.item() == 6 * 3 * 16 * 16
    )
    assert torch.equal(losses.metrics["codes"][0], torch.bincount(codes.flatten(), minlength=12))


def test_a_split_step_is_the_whole() -> None:
    own, (given, _) = module(), batch()
    own(given).loss.backward()
    whole = {name: p.grad.clone() for name, p in own.named_parameters()}
    own.zero_grad()
    counts = counts_of(("reconstruction",), [given])
    assert counts == {"reconstruction": 6}
    for begin, end in ((0, 2), (2, 6)):
        part = PictureBatch(given.images[begin:end], given.sample_ids[begin:end])
        (own(part, {"reconstruction": 6 / 2}).loss / 2).backward()
    for name, parameter in own.named_parameters():
        assert torch.allclose(parameter.grad, whole[name], rtol=1e-4, atol=1e-6), name


def test_scores_over_a_split() -> None:
    own = module().train()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    parts = [batch(4, 1), batch(6, 2)]
    scores = score_reconstructions(own, [given for given, _ in parts], "cpu")["reconstruction"]
    assert own.training and all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    own.eval()
    pictures = torch.cat([values for _, values in parts])
    rebuilt, codes, _ = own.model(pictures)
    error = F.mse_loss(rebuilt.clamp(0, 1), pictures).item()
    assert scores["psnr"] == pytest.approx(10 * math.log10(1 / error), rel=1e-5)
    assert scores["codes_used"] == pytest.approx(len(codes.unique()) / 12)
    assert scores["count"] == 10 and 0 < scores["accuracy"] < 1
    whole = PictureBatch(torch.cat([given.images for given, _ in parts]), torch.arange(10))
    assert scores["loss"] == pytest.approx(own(whole).loss.item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"gave no batch"):
        score_reconstructions(own, [], "cpu")
