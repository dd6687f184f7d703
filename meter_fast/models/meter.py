"""METER assembled: two encoders, fusion, decoder if there is one, heads. Knows no batch, no loss, no optimizer.

Shape letters: B pairs, N distinct pictures, L text tokens, V image tokens, D fusion width, S vocabulary, M masked rows.
Source: Dou et al. 2022, "An Empirical Study of Training End-to-End Vision-and-Language Transformers", section 3.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from meter_fast.kernels.cross_attention.reference import attention_form
from meter_fast.models.activated_linear import ActivatedLinear
from meter_fast.models.co_attention import CoAttention
from meter_fast.models.config import PARTS, KernelsConfig, ModelConfig
from meter_fast.models.decoder import TextDecoder
from meter_fast.models.fusion import Fused, Need, Part, spread_texts
from meter_fast.models.heads import AnswerHead, Decoder, ItmHead, MimInBatchHead, MlmHead, RankHead, init_new_weights
from meter_fast.models.merged_attention import MergedAttention
from meter_fast.models.packing import Packing
from meter_fast.models.recomputed import recomputing
from meter_fast.models.text import build_text, can_pack, encode_packed, encode_padded, set_text_checkpointing
from meter_fast.models.text_families import FAMILIES
from meter_fast.models.vision import build_vision
from meter_fast.models.weights import WeightsReport, load_text_weights, load_vision_weights

__all__ = ["Fused", "Meter", "Need", "Part"]

NLVR2_ANSWERS = 2  # false, true
SNLI_LABELS = 3  # contradiction, neutral, entailment
FUSIONS = {"co_attention": CoAttention, "merged_attention": MergedAttention}


class Meter(nn.Module):
    """The model. Every parameter is used inside the forward of its own module, so that ZeRO-3 may partition it.

    config.vision.weights and config.text.weights are loaded unless `load_weights` is False; what was read, left out or
    resized stands in `weight_reports`. Raises ValueError where a file does not fit. kernels: which implementations to
    take; they share weights and state dicts. What was chosen stands in the attribute `kernels`.
    """

    def __init__(
        self,
        config: ModelConfig,
        load_weights: bool = True,
        kernels: KernelsConfig = KernelsConfig(),  # noqa: B008
    ) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels = settle(kernels, config)
        self.vision = build_vision(config.vision)
        self.text = build_text(config.text)
        no_class_token = config.vision.class_tokens == 0
        self.fusion = FUSIONS[config.fusion.name](
            config.fusion, config.text.width, config.vision.width, kernels, no_class_token, not config.decoder.layers
        )
        words = (config.fusion.width, config.text.vocab_size, kernels.mlm_loss)
        self.mlm_head = MlmHead(*words) if config.mlm_head else None
        self.itm_head = ItmHead(config.cls_width) if config.itm_head else None
        self.decoder = self.lm_head = None
        if config.decoder.layers:
            self.decoder = TextDecoder(config.text.vocab_size, config.decoder, config.fusion, kernels)
            self.lm_head = MlmHead(*words)
        cell_values = 3 * config.vision.patch_size**2
        self.mim_in_batch_head = MimInBatchHead(config.fusion.width, cell_values) if config.mim_in_batch_head else None
        self.mim_codes_head = (
            Decoder(config.fusion.width, config.mim_codes_head, kernels.mlm_loss) if config.mim_codes_head else None
        )
        answers, width = config.vqa_answers, config.fusion.width
        self.vqa_head = AnswerHead(config.cls_width, width, answers) if answers else None
        self.nlvr2_head = AnswerHead(2 * config.cls_width, width, NLVR2_ANSWERS) if config.nlvr2_head else None
        self.snli_head = AnswerHead(config.cls_width, width, SNLI_LABELS) if config.snli_head else None
        self.rank_head = RankHead(config.cls_width) if config.rank_head else None
        heads = (module for name, module in self.named_children() if name.endswith("_head"))
        for module in (self.fusion, self.decoder, *heads):
            if module is not None:
                init_new_weights(module, config.init_std)
        for encoder, given in ((self.vision, config.vision.weights), (self.text, config.text.weights)):
            if given is None:
                init_new_weights(encoder, config.init_std)
        self._recomputed = frozenset(PARTS)
        self.weight_reports: list[WeightsReport] = []
        if load_weights and config.vision.weights is not None:
            self.weight_reports.append(load_vision_weights(self.vision, config.vision))
        if load_weights and config.text.weights is not None:
            self.weight_reports.append(load_text_weights(self.text, config.text))

    def encode_image(self, images: Tensor) -> Tensor:
        """images [N,3,H,W] normalised, in the model's dtype -> [N,V,D_vision], class tokens, if any, first."""
        with recomputing("vision" in self._recomputed):
            return self.vision(images)

    def encode_text(self, ids: Tensor, mask: Tensor, packing: Packing | None = None) -> Tensor:
        """ids [B,L] int64, mask [B,L] bool (True: a token, before all padding) -> [B,L,D_text].

        packing: of `mask`, if known; used where kernels.text is "packed" and the encoder can. Raises ValueError if L
        exceeds the positions.
        """
        if ids.shape[1] > self.config.text.max_length:
            raise ValueError(
                f"a text of {ids.shape[1]} tokens exceeds the {self.config.text.max_length} that text.max_positions="
                f"{self.config.text.max_positions} allows: lower data.max_text_length or raise model.text.max_positions"
            )
        if self.kernels.text == "packed" and can_pack(self.text):
            return encode_packed(self.text, ids, packing or Packing.of(mask))
        return encode_padded(self.text, ids, mask)

    def fuse(
        self,
        text: Tensor,
        image: Tensor,
        text_mask: Tensor,
        image_type: int = 1,
        need: Need = Need.ALL,
        attention: bool = False,
    ) -> Fused:
        """text [B,L,D_text], image [B,V,D_vision], text_mask [B,L] bool -> the rows that `need` names.

        image_type: row of the token types added to the image (2: the second picture of NLVR2). attention: also return
        each layer's weights from text to image [B,H,L,V] float32, for pictures. In a model with a decoder, cls is what
        the decoder makes of the class token.
        """
        if text.shape[0] != image.shape[0]:
            raise ValueError(f"{text.shape[0]} texts and {image.shape[0]} pictures: give one picture for each text")
        parts = (Part(need, text.shape[0], image_type=image_type),)
        if attention:  # the weights are those of padded texts
            fused = self._fuse(text, image, text_mask, parts, with_attention=True)
            return self._classified(fused, text_mask, parts)[0]
        return self.fuse_parts(text, image, text_mask, parts)[0]

    def fuse_parts(
        self,
        text: Tensor,
        image: Tensor,
        text_mask: Tensor,
        parts: tuple[Part, ...],
        packings: tuple[Packing, ...] | None = None,
    ) -> tuple[Fused, ...]:
        """Several `fuse` at once over shared pictures: the same results, with less work.

        text [T,L,D_text] and text_mask [T,L] hold the parts' texts one after the other, or in any order where parts
        tell theirs; image [N,V,D_vision] each picture once. With dropout on, pairs share the mask of what is computed
        once per picture or text. packings: one for each part's pairs, of their rows of `text_mask`, if known;
        co-attention uses them if kernels.text is "packed". Raises ValueError where only some parts tell their texts.
        """
        if len({part.texts is None for part in parts}) > 1:
            raise ValueError("either all parts tell the texts of their pairs or none does")
        masks = spread_texts(text_mask, parts)
        if self.kernels.text == "padded" or not self.fusion.takes_packed:
            packings = None
        elif packings is None:
            packings = tuple(Packing.of(mask) for mask in masks.split([part.pairs for part in parts]))
        fused = self._fuse(text, image, text_mask, parts, packings=packings)
        return self._classified(fused, masks, parts)

    def decode(self, ids: Tensor, text: Tensor, image: Tensor, text_mask: Tensor, lengths: Tensor | None) -> Tensor:
        """What the decoder makes of all tokens at once: see `TextDecoder.forward`."""
        with recomputing("decoder" in self._recomputed):
            return self.decoder(ids, text, image, text_mask, lengths)

    def _fuse(
        self, text: Tensor, image: Tensor, text_mask: Tensor, parts: tuple[Part, ...], **options: Any
    ) -> tuple[Fused, ...]:
        """Without the decoder, whose class token reads all rows of both sides."""
        if self.decoder is not None:
            wide = (Need.CLS, Need.ALL)
            parts = tuple(replace(part, need=Need.BOTH) if part.need in wide else part for part in parts)
        with recomputing("fusion" in self._recomputed):
            return self.fusion(text, image, text_mask, parts, **options)

    def _classified(self, fused: tuple[Fused, ...], text_mask: Tensor, parts: tuple[Part, ...]) -> tuple[Fused, ...]:
        """With the decoder's cls where one is needed; without the rows that only it has read."""
        if self.decoder is None:
            return fused
        found = []
        for one, mask, part in zip(fused, text_mask.split([part.pairs for part in parts]), parts, strict=True):
            if part.need in (Need.CLS, Need.ALL):
                with recomputing("decoder" in self._recomputed):
                    one = replace(one, cls=self.decoder.classify(one.text, one.image, mask))
            found.append(replace(one, text=None, image=None) if part.need is Need.CLS else one)
        return tuple(found)

    def set_activation_checkpointing(self, on: bool, parts: Collection[str] = PARTS) -> None:
        """Trades memory for time: keep only each block's input and compute the block again in backward.

        parts: those of PARTS whose blocks do so; the others, and all where `on` is False, keep what they need but for
        what is `recomputable`."""
        chosen = {part: on and part in parts for part in PARTS}
        self.vision.set_grad_checkpointing(chosen["vision"])
        set_text_checkpointing(self.text, chosen["text"])
        self.fusion.activation_checkpointing = chosen["fusion"]
        if self.decoder is not None:
            self.decoder.activation_checkpointing = chosen["decoder"]
        self._recomputed = frozenset(part for part, again in chosen.items() if not again)

    def keep_activations(self) -> None:
        """Nothing is computed again any more: for blocks that a compiler changes."""
        self._recomputed = frozenset()
        for module in self.modules():
            if isinstance(module, ActivatedLinear):
                module.keep = True

    def attention_backends(self, device_type: str, bf16: bool, text_length: int = 50) -> dict[str, str]:
        """Which form of attention each part trains with on a device ("cpu", "cuda"): "fused" (torch's), "blocked" or
        "plain"; "timm" where it is more than softmax(Q Kᵀ) V and timm's own layer computes it."""
        texts, images = text_length, self.config.vision.tokens
        sizes = {"vision": (images, images), "text": (texts, texts)}
        if self.config.fusion.name == "merged_attention":
            sizes |= {"fusion": (images + texts, images + texts)}
        else:
            sizes |= {"fusion, text to image": (texts, images), "fusion, image to image": (images, images)}
        if self.config.decoder.layers:
            sizes |= {"decoder": (texts, texts), "decoder to image": (texts, images)}
        dropout = {"vision": 0.0, "text": self.config.text.dropout}
        forms = {
            part: attention_form(device_type, *size, bf16, dropout.get(part, self.config.fusion.dropout))
            for part, size in sizes.items()
        }
        if self.config.vision.name in ATTENTION_OF_TIMM:
            forms["vision"] = "timm"
        if FAMILIES[self.config.text.name].attention == "eager":
            forms["text"] = "plain"
        return forms


ATTENTION_OF_TIMM = ("cait", "volo")
TRITON_HEADS = (32, 64, 128)
AMPERE = (8, 0)


def settle(kernels: KernelsConfig, config: ModelConfig) -> KernelsConfig:
    """`kernels` with no "auto" left but for the form. Raises ValueError if the model does not fit what is asked for."""
    size = config.fusion.width // config.fusion.heads
    if config.fusion.name == "merged_attention" and not config.decoder.layers:
        kernels = _without_cross_attention(kernels)
    if kernels.cross_attention == "triton" and size not in TRITON_HEADS:
        raise ValueError(
            f"kernels.cross_attention=triton needs heads of size 32, 64 or 128; model.fusion.width="
            f"{config.fusion.width} with {config.fusion.heads} heads has {size}: change them, or use reference"
        )
    return kernels.settle(suits_triton(size)[0])


def suits_triton(head_size: int) -> tuple[bool, str]:
    """Whether "auto" takes Triton's kernels and packed texts on this machine, and why, or why not."""
    if not torch.cuda.is_available():
        return False, "no GPU"
    capability = torch.cuda.get_device_capability()
    text = f"GPU of compute capability {capability[0]}.{capability[1]}"
    if capability < AMPERE:
        return False, f"{text}, below {AMPERE[0]}.{AMPERE[1]}"
    if head_size not in TRITON_HEADS:
        return False, f"heads of size {head_size}, not of {', '.join(map(str, TRITON_HEADS))}"
    return True, f"{text}, heads of size {head_size}"


def _without_cross_attention(kernels: KernelsConfig) -> KernelsConfig:
    """Merged attention reads text and picture in one self-attention: nothing is left to choose there."""
    for key, choices in (("cross_attention", ("auto", "reference")), ("cross_attention_form", ("auto", "direct"))):
        if getattr(kernels, key) not in choices:
            raise ValueError(
                f"kernels.{key}={getattr(kernels, key)}: model.fusion.name=merged_attention has no cross-attention; "
                f"use {' or '.join(choices)}"
            )
    return replace(kernels, cross_attention="reference", cross_attention_form="direct")
