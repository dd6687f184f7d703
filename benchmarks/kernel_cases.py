"""What the benchmark of the operators compares: inputs of a base model, and the forms that compute the same from them.

The first variant of a case is what the others are measured against; one that cannot run here gives the reason. Knows
nothing of timing.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from meter_fast.kernels.cross_attention.absorbed import absorbed_cross_attention
from meter_fast.kernels.cross_attention.op import cross_attention as direct_cross_attention
from meter_fast.kernels.gelu.op import bias_gelu
from meter_fast.kernels.mlm_loss.op import linear_cross_entropy
from meter_fast.kernels.residual_norm.op import residual_norm
from meter_fast.kernels.segments import Segments
from torch import Tensor

HEADS, HEAD, VOCABULARY = 12, 64, 50265
WIDTH, EPS = HEADS * HEAD, 1e-12
PADDED = 50  # tokens, max_text_len of the published pre-training
MASKED = 2  # masked tokens of an average caption: 15 % of 13
PIXELS = (224, 288, 384, 576)  # patches of 16: 197, 325, 577, 1297 tokens
TEXTS = (8, 13, 26, 50)


@dataclass(frozen=True)
class Variant:
    """A function without arguments, and the leaves that it is differentiated for."""

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]


Case = tuple[str, dict[str, "Variant | str"]]  # name, variants; a string is the reason why one is skipped


def leaf(*shape: int, device: str, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device=device)).bfloat16().requires_grad_()


def skipped(device: str, package: str = "") -> str:
    """Why a variant that needs a GPU (and a package) cannot run here, or nothing."""
    if device == "cpu":
        return "needs a GPU"
    return f"{package} is not installed" if package and find_spec(package) is None else ""


# --- attention ------------------------------------------------------------------------------------------------------


def eager_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """As METER's layers compute it: [B,T,H,K] each, mask added to the scores or None."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    weights = torch.softmax(scores if mask is None else scores + mask, -1)
    return (F.dropout(weights, dropout, dropout > 0) @ value).transpose(1, 2)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, mask, dropout).transpose(1, 2)


def segments_attention(
    query: Tensor, key: Tensor, value: Tensor, sides: tuple[Segments, Segments], short: str, dropout: float
) -> Tensor:
    flat = (x.flatten(0, 1) for x in (query, key, value))
    return direct_cross_attention(*flat, *sides, short, dropout).view_as(query)


def flash_attention(query: Tensor, key: Tensor, value: Tensor, sides: tuple[Segments, Segments], dropout: float):
    from flash_attn import flash_attn_varlen_func

    bounds = [F.pad(side.lengths.cumsum(0, dtype=torch.int32), (1, 0)) for side in sides]
    longest = [side.longest for side in sides]
    return flash_attn_varlen_func(query, key, value, *bounds, *longest, dropout_p=dropout, deterministic=True)


class Attention:
    """Inputs of one direction: the text reads ("query") or is read ("key"). Lengths are drawn from half the longest up
    to the longest; the published form gets the same texts padded to 50."""

    def __init__(self, text_is: str, image: int, text: int, batch: int, dropout: float, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(text // 2 + 1, text + 1, (batch,), generator=generator)
        lengths[0] = text
        self.text_is, self.batch, self.dropout, self.device = text_is, batch, dropout, device
        self.image, self.text, self.lengths = image, text, lengths.to(device, torch.int32)

    def sizes(self, text: int) -> tuple[int, int]:
        """Query and key tokens."""
        return (self.image, text) if self.text_is == "key" else (text, self.image)

    def mask(self, text: int) -> Tensor | None:
        """Added to the scores [B,1,1,text]; the image has no padding."""
        if self.text_is == "query":
            return None
        padding = torch.arange(text, device=self.device) >= self.lengths[:, None]
        return (padding[:, None, None] * -10000.0).bfloat16()

    def segments(self) -> tuple[Segments, Segments]:
        text = Segments.padded(self.batch, self.text, self.device, self.lengths)
        image = Segments.padded(self.batch, self.image, self.device)
        return (image, text) if self.text_is == "key" else (text, image)

    def core(self) -> dict[str, Variant | str]:
        def variant(function: Callable[..., Tensor], text: int, *rest: object) -> Variant:
            queries, keys = self.sizes(text)
            query = leaf(self.batch, queries, HEADS, HEAD, device=self.device)
            key_value = leaf(self.batch, keys, 2, HEADS, HEAD, device=self.device)
            return Variant(lambda: function(query, *key_value.unbind(2), *rest), (query, key_value))

        def flash() -> Variant:
            sides = [Segments.padded(self.batch, side.longest, self.device, side.lengths) for side in self.segments()]
            rows = [int(side.lengths.sum()) for side in sides]
            query = leaf(rows[0], HEADS, HEAD, device=self.device)
            key_value = leaf(rows[1], 2, HEADS, HEAD, device=self.device)
            return Variant(
                lambda: flash_attention(query, *key_value.unbind(1), sides, self.dropout), (query, key_value)
            )

        mask = self.mask(self.text)
        return {
            "published": variant(eager_attention, PADDED, self.mask(PADDED), self.dropout),
            "eager": variant(eager_attention, self.text, mask, self.dropout),
            "torch.compile": skipped(self.device)
            or variant(torch.compile(eager_attention), self.text, mask, self.dropout),
            "torch SDPA": variant(fused_attention, self.text, mask, self.dropout),
            "flash-attn varlen": skipped(self.device, "flash_attn") or flash(),
            "direct": variant(segments_attention, self.text, self.segments(), self.text_is, self.dropout),
        }

    def layer(self) -> dict[str, Variant | str]:
        """With the projections of queries, keys, values and output; without residual and norm."""
        scale = WIDTH**-0.5
        weights = [leaf(n * WIDTH, WIDTH, device=self.device, scale=scale) for n in (1, 2, 1)]
        biases = [leaf(n * WIDTH, device=self.device) for n in (1, 2, 1)]

        def inputs(text: int) -> tuple[Tensor, ...]:
            return tuple(leaf(self.batch, tokens, WIDTH, device=self.device) for tokens in self.sizes(text))

        def around(core: Callable[..., Tensor], x: Tensor, other: Tensor, *rest: object) -> Tensor:
            query = F.linear(x, weights[0], biases[0]).unflatten(-1, (HEADS, HEAD))
            key, value = F.linear(other, weights[1], biases[1]).unflatten(-1, (2, HEADS, HEAD)).unbind(2)
            return F.linear(core(query, key, value, *rest).flatten(2), weights[2], biases[2])

        def variant(function: Callable[..., Tensor], text: int, *rest: object) -> Variant:
            x, other = inputs(text)
            return Variant(lambda: around(function, x, other, *rest), (x, other, *weights, *biases))

        def absorbed() -> Variant:
            x, other = inputs(self.text)
            parameters = [p for pair in zip(weights, biases) for p in pair]
            return Variant(
                lambda: absorbed_cross_attention(
                    x, other, self.lengths, *parameters, HEADS, self.text_is, self.dropout
                ),
                (x, other, *parameters),
            )

        mask = self.mask(self.text)
        return {
            "published": variant(eager_attention, PADDED, self.mask(PADDED), self.dropout),
            "eager": variant(eager_attention, self.text, mask, self.dropout),
            "torch SDPA": variant(fused_attention, self.text, mask, self.dropout),
            "direct": variant(segments_attention, self.text, self.segments(), self.text_is, self.dropout),
            "absorbed": absorbed(),
        }


def attention_cases(batch: int, dropout: float, device: str, part: str) -> Iterator[Case]:
    shapes = [(pixels, 13) for pixels in PIXELS] + [(288, text) for text in TEXTS if text != 13]
    if device == "cpu":
        shapes = [(224, 13), (288, 13), (288, 50)]
    for text_is, name in (("key", "image->text"), ("query", "text->image")):
        for pixels, text in shapes:
            inputs = Attention(text_is, (pixels // 16) ** 2 + 1, text, batch, dropout, device)
            yield f"{name} B={batch} {pixels}px text {text} dropout {dropout}", getattr(inputs, part)()


# --- loss -----------------------------------------------------------------------------------------------------------


def published_loss(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """Logits of all positions; labels -100 where nothing was masked."""
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, ignore_index=-100)


def gathered_loss(hidden: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden[rows], weight, bias).float(), labels)


def operator_loss(hidden: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden[rows], weight, bias, labels)[0] / len(rows)


def liger_loss(hidden: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden[rows], labels, bias)


def cce_loss(hidden: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

    takes_bias = "bias" in inspect.signature(cut_cross_entropy).parameters  # not in every version
    return cut_cross_entropy(hidden[rows], weight, labels, **({"bias": bias} if takes_bias else {}))


def loss_cases(batch: int, device: str) -> Iterator[Case]:
    for masked in (MASKED * batch,) if device == "cpu" or batch < 16 else (64, 128, 256, 512):
        weight = leaf(VOCABULARY, WIDTH, device=device, scale=WIDTH**-0.5)
        hidden, bias = leaf(batch * PADDED, WIDTH, device=device), leaf(VOCABULARY, device=device)
        rows = torch.arange(masked, device=device) * (len(hidden) // masked)
        labels = torch.randint(VOCABULARY, (masked,), device=device)
        everywhere = torch.full((len(hidden),), -100, device=device).index_copy(0, rows, labels)
        leaves = (hidden, weight, bias)

        def variant(function: Callable[..., Tensor], *rest: Tensor, leaves: tuple[Tensor, ...] = leaves) -> Variant:
            return Variant(partial(function, *leaves, *rest), leaves)

        yield (
            f"B={batch}, {masked} masked of {len(hidden)} positions",
            {
                "published": variant(published_loss, everywhere),
                "eager": variant(gathered_loss, rows, labels),
                "torch.compile": skipped(device) or variant(torch.compile(gathered_loss), rows, labels),
                "Liger": skipped(device, "liger_kernel") or variant(liger_loss, rows, labels),
                "cut-cross-entropy": skipped(device, "cut_cross_entropy") or variant(cce_loss, rows, labels),
                "linear_cross_entropy": variant(operator_loss, rows, labels),
            },
        )


# --- element-wise ----------------------------------------------------------------------------------------------


def eager_norm(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, dropout: float) -> Tensor:
    return F.layer_norm(residual + F.dropout(x + bias, dropout, dropout > 0), (WIDTH,), weight, shift, EPS)


def operator_norm(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, dropout: float) -> Tensor:
    return residual_norm(x, bias, residual, weight, shift, EPS, dropout)


def norm_cases(batch: int, dropout: float, device: str) -> Iterator[Case]:
    for pixels in PIXELS[:2] if device == "cpu" else PIXELS:
        rows = batch * ((pixels // 16) ** 2 + 1)
        x, residual = leaf(rows, WIDTH, device=device), leaf(rows, WIDTH, device=device)
        bias, weight, shift = (leaf(WIDTH, device=device) for _ in range(3))
        leaves = (x, bias, residual, weight, shift)

        def variant(function: Callable[..., Tensor], leaves: tuple[Tensor, ...] = leaves) -> Variant:
            return Variant(partial(function, *leaves, dropout), leaves)

        yield (
            f"{rows} rows ({pixels}px, B={batch}) dropout {dropout}",
            {
                "eager": variant(eager_norm),
                "torch.compile": skipped(device) or variant(torch.compile(eager_norm)),
                "residual_norm": variant(operator_norm),
            },
        )


def eager_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def gelu_cases(batch: int, device: str) -> Iterator[Case]:
    rows = batch * 325
    leaves = (leaf(rows, 4 * WIDTH, device=device), leaf(4 * WIDTH, device=device))
    yield (
        f"{rows} rows of {4 * WIDTH} (288px, B={batch})",
        {
            "eager": Variant(partial(eager_gelu, *leaves), leaves),
            "torch.compile": skipped(device) or Variant(partial(torch.compile(eager_gelu), *leaves), leaves),
            "bias_gelu": Variant(partial(bias_gelu, *leaves), leaves),
        },
    )
