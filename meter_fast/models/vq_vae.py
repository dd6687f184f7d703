"""A VQ-VAE: pictures to a grid of discrete codes, and back. Knows pictures, no text, no files, no optimizer.

Source: van den Oord et al. 2017, "Neural Discrete Representation Learning", sections 3 and 4.1 and appendix A.1 (the
codebook as moving averages). What only looks random is not: codes that are hardly used are put where the pictures are
told worst (as in Dhariwal et al. 2020, "Jukebox", section 3, which takes any place).
Shape letters: B pictures, G codes along one side, S = factor * G pixels, N = B*G*G vectors, K codes, C their width.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from meter_fast.models.image_tokenizer_config import ImageTokenizerConfig

DEAD = 0.1  # a code used less than this share of the mean use is moved
MEAN, SCALE = 0.5, 0.25  # of pixel values in 0..1: what the convolutions see is near 0 and of size 1


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(width, width, 3, padding=1)
        self.narrow = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.relu(self.wide(F.relu(x))))


class Codebook(nn.Module):
    """K vectors, each the moving average of the encoder's outputs that are nearest to it: buffers, not parameters, in
    float32 whatever the model's precision. Training with several processes averages over all of them.
    """

    def __init__(self, codes: int, width: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("vectors", torch.zeros(codes, width))
        self.register_buffer("uses", torch.zeros(codes))
        self.register_buffer("sums", torch.zeros(codes, width))

    def forward(self, x: Tensor) -> Tensor:
        """x [N,C] -> codes [N] int64 of the nearest vectors. In training the vectors then move."""
        x = x.detach().to(self.vectors.dtype)
        distances = self._distances(x)
        nearest, codes = distances.min(1)
        if self.training:
            self._move(x, codes, nearest)
        return codes

    def _distances(self, x: Tensor) -> Tensor:
        """[N,K], squared, float32."""
        products = torch.addmm(self.vectors.square().sum(1), x, self.vectors.t(), alpha=-2)
        return (products + x.square().sum(1, keepdim=True)).clamp_min_(0)

    @torch.no_grad()
    def _move(self, x: Tensor, codes: Tensor, distances: Tensor) -> None:
        """One update of the averages; codes that are hardly used are put on outputs that are far from any."""
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        found = x.new_zeros(len(self.uses), x.shape[1] + 1)
        found.index_add_(0, codes, F.pad(x, (1, 0), value=1.0))
        spare = x[torch.multinomial(distances + 1e-12, min(len(x), -(-len(self.uses) // ranks)))]
        if ranks > 1:
            dist.all_reduce(found)
            everyones = [torch.empty_like(spare) for _ in range(ranks)]
            dist.all_gather(everyones, spare)
            spare = torch.stack(everyones, 1).flatten(0, 1)  # in turn from each, the same on all
        self.uses.lerp_(found[:, 0], 1 - self.decay)
        self.sums.lerp_(found[:, 1:], 1 - self.decay)
        usual = self.uses.mean()
        dead = self.uses < DEAD * usual
        place = dead.cumsum(0) - 1
        dead &= place < len(spare)
        spare = spare[place.clamp(0, len(spare) - 1)]
        self.uses.copy_(torch.where(dead, usual, self.uses))
        self.sums.copy_(torch.where(dead[:, None], spare * usual, self.sums))
        self.vectors.copy_(self.sums / self.uses[:, None])


class VqVae(nn.Module):
    """Encoder, codebook, decoder, all convolutions: any picture whose sides are multiples of `factor`."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.config, self.codes, self.factor = config, config.codes, config.factor
        width = config.width
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = [nn.Conv2d(config.code_width, width, 3, padding=1)]
        for level in range(config.downsamplings):
            encoder += [nn.Conv2d(width if level else 3, width, 4, stride=2, padding=1)]
            encoder += [ResidualBlock(width) for _ in range(config.blocks)]
            decoder += [ResidualBlock(width) for _ in range(config.blocks)]
            last = level == config.downsamplings - 1
            decoder += [nn.ReLU(), nn.ConvTranspose2d(width, 3 if last else width, 4, stride=2, padding=1)]
        self.encoder = nn.Sequential(*encoder, nn.ReLU(), nn.Conv2d(width, config.code_width, 1))
        self.codebook = Codebook(config.codes, config.code_width, config.decay)
        self.decoder = nn.Sequential(*decoder)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """pictures [B,3,S,S], values in 0..1 -> (the same, rebuilt from codes, [B,3,S,S] float32; codes [B,G,G] int64;
        commitment, float32 scalar: mean squared distance of encoder outputs from their codes' vectors).

        Gradients pass the codes as if they were not there (straight through); in training the codebook moves.
        """
        told = self._encode(pictures)
        codes = self.codebook(told.flatten(0, 2)).view(told.shape[:3])
        kept = F.embedding(codes, self.codebook.vectors)
        commitment = F.mse_loss(told.to(kept.dtype), kept)
        passed = told + (kept - told.to(kept.dtype)).detach().to(told.dtype)
        return self._decode(passed), codes, commitment

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """pictures [B,3,S,S], values in 0..1 -> codes [B,G,G] int64."""
        told = self._encode(pictures)
        return self.codebook(told.flatten(0, 2)).view(told.shape[:3])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes [B,G,G] -> pictures [B,3,S,S] float32, values in 0..1."""
        kept = F.embedding(codes, self.codebook.vectors)
        return self._decode(kept.to(next(self.decoder.parameters()).dtype)).clamp(0, 1)

    def _encode(self, pictures: Tensor) -> Tensor:
        dtype = next(self.encoder.parameters()).dtype
        return self.encoder(((pictures.float() - MEAN) / SCALE).to(dtype)).permute(0, 2, 3, 1)

    def _decode(self, vectors: Tensor) -> Tensor:
        return self.decoder(vectors.permute(0, 3, 1, 2)).float() * SCALE + MEAN
