"""What a model is made of: frozen dataclasses of plain values. Knows no tensors, no files and no training.

Numbers of `base()` are those of the published METER-CLIP16-RoBERTa (paper, section 4.1; METER `config.py`).
"""

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

FUSIONS = ("co_attention", "merged_attention")
BlocksOf = Literal["vision", "text", "fusion", "decoder"]
PARTS: tuple[BlocksOf, ...] = get_args(BlocksOf)  # of the model that are stacks of blocks


def _check_heads(what: str, width: int, heads: int) -> None:
    if heads < 1 or width % heads:
        raise ValueError(
            f"{what}.width={width} is not a multiple of {what}.heads={heads}: choose heads that divide the width"
        )


CLASS_TOKENS = {"clip_vit": 1, "vit": 1, "deit_distilled": 2, "cait": 1, "volo": 1, "beit": 1, "swin": 0}
"""The kinds of vision encoder, and how many tokens each has besides those of the picture."""


@dataclass(frozen=True)
class VisionConfig:
    """Vision encoder; `vision_presets` has those of the paper ready by name.

    name: the kind, one of CLASS_TOKENS. layers: the blocks built; published models use those of a CLIP file less the
    last. A Swin has `layers` blocks in stages of (2, 2, layers - 6, 2), a VOLO in stages of (2, 2, 4, 1) ninths; their
    width, heads and patch_size (pixels of the side of a token) are those of the last stage, 768, 24 and 32 for Swin-T.
    weights: None (random), a local file (OpenAI CLIP archive, state dict or safetensors), or the name of a timm model.
    position_std: of the position table if it starts at random. 0.02 is timm's; large patches drown that out (their
    embeddings start near 1), and where things are is then learned late. drop_path: share of the samples that skip the
    last block in training, growing from 0 at the first (CaiT: at every block); published Swin models use 0.1.
    """

    name: str = "clip_vit"
    width: int = 768
    layers: int = 11
    heads: int = 12
    patch_size: int = 16
    image_size: int = 288
    weights: str | None = None
    position_std: float = 0.02
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in CLASS_TOKENS:
            raise ValueError(f"vision.name={self.name!r} is unknown: use one of {', '.join(CLASS_TOKENS)}")
        _check_heads("vision", self.width, self.heads)
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"vision.drop_path={self.drop_path}: a share of 0 or more and below 1")
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            below = max(1, self.image_size // self.patch_size) * self.patch_size
            raise ValueError(
                f"vision.image_size={self.image_size} is not a multiple of vision.patch_size={self.patch_size}: "
                f"use {below} or {below + self.patch_size}"
            )
        if self.name == "swin":
            self._refuse(self.layers < 7, "layers", "7 or more: stages of 2, 2, layers - 6 and 2 blocks")
            for key in ("width", "heads", "patch_size"):
                self._refuse(getattr(self, key) % 8, key, "a multiple of 8, which the first stage has an eighth of")
        if self.name == "volo":
            self._refuse(self.layers % 9, "layers", "a multiple of 9: stages of 2, 2, 4 and 1 ninths")
            self._refuse(self.width % 64, "width", "a multiple of 64: the first stage is half as wide, in heads of 32")
            self._refuse(self.patch_size not in (8, 16, 32), "patch_size", "8, 16 or 32")

    def _refuse(self, wrong: object, key: str, remedy: str) -> None:
        if wrong:
            raise ValueError(f"vision.{key}={getattr(self, key)} does not suit vision.name={self.name}: use {remedy}")

    @property
    def grid(self) -> int:
        """Tokens along one side of the picture; also the side of Swin's windows."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """V: those of the picture and the class tokens."""
        return self.grid**2 + self.class_tokens

    @property
    def class_tokens(self) -> int:
        """Tokens before those of the picture; without any, the picture's cls is the mean of its tokens."""
        return CLASS_TOKENS[self.name]


TEXT_NAMES = ("roberta", "bert", "electra", "albert", "deberta", "deberta_v3", "clip", "embeddings")
LAYERS_OPTIONAL = ("roberta", "bert", "embeddings")


@dataclass(frozen=True)
class TextConfig:
    """Text encoder: one of TEXT_NAMES; published sizes are in `text_presets`. "embeddings" is RoBERTa without layers.

    dropout: on hidden states and on attention probabilities (CLIP has it on the latter alone).
    max_positions: rows of the position table, RoBERTa uses those from pad_id + 1 on; DeBERTa's reach of relative ones.
    weights: None (random), a local folder or file as Hugging Face writes them, or the name of a hub model.
    embedding_width: of the tables, where they are narrower than the layers (ALBERT, small ELECTRA); None: as wide.
    added_tokens: how many of the vocabulary, the last ones, the weights have no row for: sentinels of span denoising.
    """

    name: str = "roberta"
    width: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    vocab_size: int = 50265
    max_positions: int = 514
    token_types: int = 1
    eps: float = 1e-5
    dropout: float = 0.1
    pad_id: int = 1
    weights: str | None = None
    embedding_width: int | None = None
    added_tokens: int = 0
    activation: Literal["gelu", "gelu_new", "quick_gelu"] = "gelu"

    def __post_init__(self) -> None:
        if self.name not in TEXT_NAMES:
            raise ValueError(f"text.name={self.name!r} is unknown: use one of {', '.join(TEXT_NAMES)}")
        _check_heads("text", self.width, self.heads)
        if self.name == "embeddings" and self.layers:
            raise ValueError(f"text.layers={self.layers}: text.name=embeddings has no layers: use 0, or another name")
        if self.layers < (0 if self.name in LAYERS_OPTIONAL else 1):
            raise ValueError(f"text.layers={self.layers}: text.name={self.name} needs at least one layer")
        if self.embedding_width not in (None, self.width) and self.name not in ("electra", "albert"):
            raise ValueError(
                f"text.embedding_width={self.embedding_width}: only electra and albert have tables of another width "
                f"than text.width={self.width}: use none"
            )
        if self.activation not in ("gelu", "gelu_new", "quick_gelu"):
            raise ValueError(f"text.activation={self.activation!r}: use gelu, gelu_new or quick_gelu")
        if not 0 <= self.pad_id < self.vocab_size:
            raise ValueError(f"text.pad_id={self.pad_id} is outside the vocabulary of {self.vocab_size} tokens")
        if self.max_length < 1:
            raise ValueError(f"text.max_positions={self.max_positions} leaves no position for a token: use 64 or more")

    @property
    def counts_from_padding(self) -> bool:
        """Whether positions are counted over tokens that are not padding, from pad_id + 1 on, as RoBERTa does."""
        return self.name in ("roberta", "embeddings")

    @property
    def max_length(self) -> int:
        """The most tokens that a text may have."""
        return self.max_positions - (self.pad_id + 1 if self.counts_from_padding else 0)


@dataclass(frozen=True)
class FusionConfig:
    """Fusion of text and image, "co_attention" or "merged_attention". Feed-forward 4 x width, LayerNorm eps 1e-12.

    layers: pairs of layers, one for each side, of co-attention (6 in the paper), or layers of merged attention (12).
    token_types: rows of the table added before the first layer: text, image (and a second image for NLVR2).
    """

    name: str = "co_attention"
    width: int = 768
    layers: int = 6
    heads: int = 12
    dropout: float = 0.1
    token_types: int = 2

    def __post_init__(self) -> None:
        if self.name not in FUSIONS:
            raise ValueError(f"fusion.name={self.name!r} is unknown: use one of {', '.join(FUSIONS)}")
        _check_heads("fusion", self.width, self.heads)
        if self.layers < 1:
            raise ValueError(f"fusion.layers={self.layers}: at least one fusion layer is needed")
        if self.token_types < 2:
            raise ValueError(f"fusion.token_types={self.token_types}: at least 2 are needed, text and image")


@dataclass(frozen=True)
class DecoderConfig:
    """Layers behind the fusion that write text (paper: 3, behind 3 fusion layers); 0: an encoder alone.

    Width, heads and dropout are the fusion's. max_positions: the most tokens of a text that is written.
    """

    layers: int = 0
    max_positions: int = 64

    def __post_init__(self) -> None:
        if self.layers < 0:
            raise ValueError(f"decoder.layers={self.layers}: 0 (no decoder) or more")
        if self.max_positions < 2:
            raise ValueError(f"decoder.max_positions={self.max_positions}: at least 2, a token and the end")


@dataclass(frozen=True)
class ModelConfig:
    """A whole model; `mlm_head`, `itm_head`, ... say which pre-training heads it has. mim_codes_head: number of codes
    of the image tokenizer, 0 for no head. One with a decoder also has a head over the vocabulary behind that.

    vqa_answers: answers that the head of visual question answering chooses from (3129 in VQAv2); 0: no such head.
    nlvr2_head, snli_head, rank_head: those of the other tasks; nlvr2_head needs fusion.token_types=3.
    init_std: of the matrices and embeddings that start at random; 0.02 as published, which suits a width of 768. Narrow
    models learn sooner with more: signals then keep their size through the layers.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    mlm_head: bool = True
    itm_head: bool = True
    mim_in_batch_head: bool = False
    mim_codes_head: int = 0
    vqa_answers: int = 0
    nlvr2_head: bool = False
    snli_head: bool = False
    rank_head: bool = False
    init_std: float = 0.02
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    @property
    def cls_width(self) -> int:
        """Of `Fused.cls`, which classifying heads read: both sides' pooled rows, or the decoder's one row."""
        return self.fusion.width if self.decoder.layers else 2 * self.fusion.width

    def __post_init__(self) -> None:
        if self.vqa_answers < 0:
            raise ValueError(f"model.vqa_answers={self.vqa_answers}: 0 (no head) or the number of answers")
        if self.nlvr2_head and self.fusion.token_types < 3:
            raise ValueError(
                f"model.fusion.token_types={self.fusion.token_types}: model.nlvr2_head=true tells two pictures apart, "
                "which takes 3"
            )


@dataclass(frozen=True)
class KernelsConfig:
    """Which implementation each operator takes. "auto" is settled when a model is built: see `settle`.

    cross_attention: "reference" (torch's operators) or "triton". cross_attention_form: "direct", or "absorbed" (the
    image side's projections folded into the text side: the same numbers with less work where texts are short); "auto"
    decides for each batch. text: "padded" to the batch's longest, or "packed" without padding (the fusion's texts; the
    encoder's where its attention allows it, which DeBERTa's and CLIP's do not). mlm_loss, residual_norm, gelu (of the
    fusion layers): "reference" or "triton".
    """

    cross_attention: Literal["auto", "reference", "triton"] = "auto"
    cross_attention_form: Literal["auto", "direct", "absorbed"] = "auto"
    text: Literal["auto", "padded", "packed"] = "auto"
    mlm_loss: Literal["auto", "reference", "triton"] = "auto"
    residual_norm: Literal["auto", "reference", "triton"] = "auto"
    gelu: Literal["auto", "reference", "triton"] = "auto"

    def settle(self, gpu: bool) -> "KernelsConfig":
        """With no "auto" left, but for the form: on a GPU Triton and packed texts, elsewhere the other ones."""
        found = "triton" if gpu else "reference"
        chosen = {name: found for name in ("cross_attention", "mlm_loss", "residual_norm", "gelu")}
        chosen["text"] = "packed" if gpu else "padded"
        return replace(self, **{name: value for name, value in chosen.items() if getattr(self, name) == "auto"})


PLAIN_KERNELS = KernelsConfig("reference", "direct", "padded", "reference", "reference", "reference")
"""Torch's operators in the form of the published model."""


def base() -> ModelConfig:
    """CLIP ViT-B/16 at 288 px, roberta-base, 6 fusion layers: the published model, 358 M parameters."""
    return ModelConfig()


def tiny(vocab_size: int = 1024) -> ModelConfig:
    """2 M parameters, which a CPU trains in minutes on scenes of 96 px: one patch for each cell of their grid."""
    return ModelConfig(
        vision=VisionConfig(width=128, layers=3, heads=2, patch_size=32, image_size=96, position_std=2.0),
        text=TextConfig(
            name="bert", width=128, layers=1, heads=4, ffn=512, vocab_size=vocab_size, max_positions=64, token_types=2,
            eps=1e-12, dropout=0.0, pad_id=0,
        ),
        fusion=FusionConfig(width=128, layers=2, heads=4, dropout=0.0),
        init_std=0.05,
    )  # fmt: skip
