"""What an image tokenizer is made of: a frozen dataclass of plain values. Knows no tensors and no files."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageTokenizerConfig:
    """A VQ-VAE (see `vq_vae`).

    image_size: pixels of a side; one code stands for 2**downsamplings pixels, so that codes and the cells of a vision
    encoder are equally many where image_size = 2**downsamplings * grid. codes: size of the codebook; code_width: of its
    vectors. width: channels of the convolutions; blocks: residual blocks at each resolution.
    decay: of the moving averages that the codebook is made of. commitment: weight of the loss that keeps the encoder
    near its codes (van den Oord et al. 2017: 0.25).
    """

    image_size: int = 144
    downsamplings: int = 3
    codes: int = 8192
    code_width: int = 32
    width: int = 128
    blocks: int = 2
    decay: float = 0.99
    commitment: float = 0.25

    def __post_init__(self) -> None:
        for key, least in (("downsamplings", 1), ("codes", 2), ("code_width", 1), ("width", 1), ("blocks", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"image_tokenizer.{key}={getattr(self, key)}: {least} or more")
        if self.image_size < self.factor or self.image_size % self.factor:
            below = max(1, self.image_size // self.factor) * self.factor
            raise ValueError(
                f"image_tokenizer.image_size={self.image_size} is not a multiple of {self.factor} = 2**"
                f"image_tokenizer.downsamplings: use {below} or {below + self.factor}"
            )
        if not 0 < self.decay < 1:
            raise ValueError(f"image_tokenizer.decay={self.decay}: between 0 and 1")
        if self.commitment < 0:
            raise ValueError(f"image_tokenizer.commitment={self.commitment}: 0 or more")

    @property
    def factor(self) -> int:
        """Pixels along one side of what a code stands for."""
        return 2**self.downsamplings

    @property
    def grid(self) -> int:
        """Codes along one side of a picture."""
        return self.image_size // self.factor
