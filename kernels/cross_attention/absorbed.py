"""Cross-attention between an image and a text, with the image's projections folded into the text.

Where the image reads the text, `x Wq_hᵀ · k = x · (k Wq_h)` and `W_o p v = p · (v Wo_hᵀ)`: the H * T folded rows of the
text stand in for the query and the output projection of V image tokens. Where the text reads the image,
`q · (y Wk_hᵀ) = (q Wk_h) · y` and `Σ p (y Wv_hᵀ + bv) = (Σ p y) Wv_hᵀ + bv Σ p`: the image is key and value itself. The
numbers are those of the plain layer; the cost falls from V D² to V D H T, and no projection of the image is stored.
The key's bias adds one number to all scores of a query, so its gradient is exactly zero.

Folded rows lie as [B,T,H,D], heads inside tokens: then the products per head and the products per pair both find one
stride for their rows, and nothing is copied between them. All products are batched matrix multiplications of torch.

Shape letters: B pairs, T text tokens, V image tokens, H heads, K head size, D width.
Source: the weight absorption of DeepSeek-V2 (2024), section 2.1.2, applied to cross-attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dropout import draw_seed, threshold
from ..launch import Arch
from ..segmented_softmax import op as softmax
from ..segmented_softmax.reference import accumulation_dtype

# Text tokens on a GPU are a multiple of this: whole words of the dropout mask, and for 12 or 16 heads rows of scores
# that are aligned for wide accesses.
TEXT_MULTIPLE = 4

# Text tokens up to which it pays, by compute capability: from the times that the bytes and operations of each product
# take at best, forward and backward of both directions, against cuBLAS and an ideal fused attention (B=64, V=325).
LONGEST_TEXT = {80: 32, 90: 16}
# Share of the operations below which it pays, from this width on. Measured with one thread with AVX-512 (torch 2.14),
# forward and backward: at D=768, V=325 it took 0.39 to 0.49 times as long for 13 tokens, 0.68 to 0.82 for 26, and as
# long for 50; at D=256, V=50 0.62 to 0.79 for 8 and up to 1.4 for 20; at D=128 it hardly ever won.
CPU_SHARE, CPU_NARROWEST = 0.5, 256


def absorbed_cross_attention(
    x: Tensor,
    other: Tensor,
    text_lengths: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_value_weight: Tensor,
    key_value_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    heads: int,
    text_is: str,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """W_o attention(x, other) + b_o [B,x's tokens,D]: what the layer computes before dropout, residual and norm.

    x reads other, both [B,tokens,D]; text_is tells which one is the text: "query" x, "key" other. text_lengths int32
    [B]: so many of a text's tokens exist; the others are not read, and where they would read they get `out_bias`. The
    image's tokens all exist. Weights [D,D] as in nn.Linear, key_value_weight [2D,D] with the key's rows first; biases
    [D], [2D]; out_bias None: left to what follows. dropout: share of the attention weights that are dropped, by the
    counters of `kernels.dropout`; seed int64 [1] on the same device, None: drawn. Under autocast everything is computed
    in its dtype.

    Raises ValueError for arguments that do not fit each other.
    """
    _check(x, other, text_lengths, query_weight, key_value_weight, out_weight, heads, text_is, dropout)
    if dropout and seed is None:
        seed = draw_seed(x.device)
    text = x if text_is == "query" else other
    tokens = text.shape[1]
    if text.is_cuda:
        text = F.pad(text, (0, 0, 0, -tokens % TEXT_MULTIPLE))
    if text_is == "query":
        query = F.linear(text, query_weight, query_bias)
        folded = (other, key_value_weight, key_value_bias)
        read, *_ = _text_reads_image(query, *_like(query, *folded), text_lengths, seed, heads, float(dropout))
        return F.linear(read[:, :tokens], out_weight, out_bias)
    key_value = F.linear(text, key_value_weight, key_value_bias)
    folded = (x, query_weight, query_bias, out_weight)
    out, _ = _image_reads_text(key_value, *_like(key_value, *folded), text_lengths, seed, heads, float(dropout))
    return out if out_bias is None else out + out_bias.to(out.dtype)


def absorbed_pays(text_longest: int, image_tokens: int, heads: int, width: int, arch: Arch | None) -> bool:
    """Whether this form is faster than projecting the image. arch None: a CPU.

    It has to need fewer operations: folding both matrices and using them, T D² + V T H D, against two projections of
    the image and the attention, V D² + V T D. On a GPU it also moves more bytes an operation than a projection does,
    so that the balance tips at shorter texts than the count says, the sooner the faster the GPU computes:
    LONGEST_TEXT. On a CPU its products are the slower ones, being narrow: CPU_SHARE, CPU_NARROWEST.
    """
    share = text_longest * (width + image_tokens * (heads - 1)) / (image_tokens * width)
    if arch is None:
        return share < CPU_SHARE and width >= CPU_NARROWEST
    return share < 1 and text_longest <= LONGEST_TEXT.get(arch.capability, LONGEST_TEXT[90])


def _check(
    x: Tensor,
    other: Tensor,
    text_lengths: Tensor,
    query_weight: Tensor,
    key_value_weight: Tensor,
    out_weight: Tensor,
    heads: int,
    text_is: str,
    dropout: float,
) -> None:
    for name, side in (("x", x), ("other", other)):
        if side.dim() != 3 or side.shape[::2] != x.shape[::2]:
            raise ValueError(f"{name}: shape {tuple(side.shape)}, but x {tuple(x.shape)} needs both to be [B,tokens,D]")
    pairs, _, width = x.shape
    if width % heads:
        raise ValueError(f"heads={heads}: must divide the width {width}")
    weights = {"query_weight": query_weight, "key_value_weight": key_value_weight, "out_weight": out_weight}
    for name, weight in weights.items():
        expected = (2 * width if name == "key_value_weight" else width, width)
        if weight.shape != expected:
            raise ValueError(f"{name}: shape {tuple(weight.shape)}, but {expected} goes with x {tuple(x.shape)}")
    softmax.check_lengths(text_lengths, pairs)
    softmax.check_direction(text_is)
    threshold(dropout)


def _like(own: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype that the text's projection has: autocast chose it."""
    return [tensor.to(own.dtype) for tensor in tensors]


def _per_head(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x [N,H,A] times weight [H,A,C] -> [N,H,C]."""
    if out is None:
        out = x.new_empty(x.shape[0], x.shape[1], weight.shape[2])
    torch.bmm(x.transpose(0, 1), weight, out=out.transpose(0, 1))
    return out


def _per_pair(image: Tensor, folded: Tensor) -> Tensor:
    """image [B,V,D] times folded rows [B*T,H,D] -> scores [B,V,T,H]."""
    pairs, tokens, width = image.shape
    heads = folded.shape[1]
    scores = torch.bmm(image, folded.view(pairs, -1, width).transpose(1, 2))
    return scores.view(pairs, tokens, -1, heads)


def _gather(weights: Tensor, image: Tensor) -> Tensor:
    """weights [B,V,T,H] of image rows [B,V,D] -> their sums [B*T,H,D]."""
    return torch.bmm(weights.flatten(2).transpose(1, 2), image).view(-1, weights.shape[3], image.shape[2])


def _spread(weights: Tensor, folded: Tensor) -> Tensor:
    """weights [B,V,T,H] of folded rows [B*T,H,D] -> their sums [B,V,D]."""
    return torch.bmm(weights.flatten(2), folded.view(weights.shape[0], -1, folded.shape[2]))


def _rows(weight: Tensor, heads: int) -> Tensor:
    """Weight of a projection into heads [H*K,D] -> [H,K,D]."""
    return weight.view(heads, -1, weight.shape[1])


def _columns(weight: Tensor, heads: int) -> Tensor:
    """Weight of a projection out of heads [D,H*K] -> [H,D,K]."""
    return weight.view(weight.shape[0], heads, -1).transpose(0, 1)


def _weight_gradient(gradient: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """gradient [N,H,A] and x [N,H,C] -> Σ over N [H,A,C]."""
    return torch.bmm(gradient.permute(1, 2, 0), x.transpose(0, 1), out=out)


@torch.library.custom_op("meter_fast::text_reads_image", mutates_args=())
def _text_reads_image(
    query: Tensor,
    image: Tensor,
    key_value_weight: Tensor,
    key_value_bias: Tensor,
    text_lengths: Tensor,
    seed: Tensor | None,
    heads: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query [B,T,D] -> what it reads [B,T,D]; then, for the backward, the probabilities [B,V,T,H], the weighted image
    rows [B*T,H,D] and the sums of the weights [B*T,H]."""
    pairs, tokens, width = query.shape
    query = query.reshape(-1, heads, width // heads)
    key_weight, value_weight = _rows(key_value_weight[:width], heads), _rows(key_value_weight[width:], heads)
    scores = _per_pair(image, _per_head(query, key_weight))
    probabilities, dropped = softmax.forward(
        scores, text_lengths, "query", query.shape[2] ** -0.5, None, dropout, seed, scores
    )
    dtype = accumulation_dtype(query.dtype)
    if dropout:
        sums = dropped.sum(1, dtype=dtype)
    else:
        positions = torch.arange(tokens, device=query.device)
        sums = (positions < text_lengths[:, None]).to(dtype)[..., None].repeat(1, 1, heads)
    sums = sums.view(-1, heads)
    gathered = _gather(dropped, image)
    read = _per_head(gathered, value_weight.transpose(1, 2))
    read += sums[..., None] * key_value_bias[width:].view(heads, -1)
    return read.view(pairs, tokens, width), probabilities, gathered, sums


@_text_reads_image.register_fake
def _(query, image, key_value_weight, key_value_bias, text_lengths, seed, heads, dropout):
    pairs, tokens, width = query.shape
    return (
        query.new_empty(query.shape),
        query.new_empty(pairs, image.shape[1], tokens, heads),
        query.new_empty(pairs * tokens, heads, width),
        query.new_empty(pairs * tokens, heads, dtype=accumulation_dtype(query.dtype)),
    )


@torch.library.custom_op("meter_fast::text_reads_image_backward", mutates_args=())
def _text_reads_image_backward(
    gradient: Tensor,
    query: Tensor,
    image: Tensor,
    key_value_weight: Tensor,
    key_value_bias: Tensor,
    seed: Tensor | None,
    read: Tensor,
    probabilities: Tensor,
    gathered: Tensor,
    sums: Tensor,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, image, key_value_weight, key_value_bias."""
    pairs, tokens, width = query.shape
    heads, dtype = gathered.shape[1], sums.dtype
    query, gradient, read = (x.reshape(-1, heads, width // heads) for x in (query, gradient, read))
    key_weight, value_weight = _rows(key_value_weight[:width], heads), _rows(key_value_weight[width:], heads)
    exact = gradient.to(dtype)
    # Σ over v of probability times gradient, and the sums' share of the gradient, need no pass over the scores.
    delta = (exact * read).sum(2).view(pairs, tokens, heads)
    shift = (exact * key_value_bias[width:].view(heads, -1)).sum(2).view(pairs, tokens, heads)
    gathered_gradient = _per_head(gradient, value_weight)
    scores_gradient = _per_pair(image, gathered_gradient)
    scores_gradient, dropped = softmax.backward(
        probabilities,
        scores_gradient,
        "query",
        query.shape[2] ** -0.5,
        delta,
        shift,
        dropout,
        seed,
        scores_gradient,
    )
    image_gradient = _spread(dropped, gathered_gradient)
    folded = _per_head(query, key_weight).view(pairs, -1, width)
    image_gradient.baddbmm_(scores_gradient.flatten(2), folded)
    folded_gradient = _gather(scores_gradient, image)
    query_gradient = _per_head(folded_gradient, key_weight.transpose(1, 2))
    weight_gradient = torch.empty_like(key_value_weight)
    _weight_gradient(query, folded_gradient, _rows(weight_gradient[:width], heads))
    _weight_gradient(gradient, gathered, _rows(weight_gradient[width:], heads))
    bias_gradient = torch.zeros_like(key_value_bias)
    bias_gradient[width:] = (exact * sums[..., None]).sum(0).flatten()
    return query_gradient.view(pairs, tokens, width), image_gradient, weight_gradient, bias_gradient


@_text_reads_image_backward.register_fake
def _(gradient, query, image, key_value_weight, key_value_bias, seed, read, probabilities, gathered, sums, dropout):
    return tuple(x.new_empty(x.shape) for x in (query, image, key_value_weight, key_value_bias))


def _text_reads_image_context(ctx, inputs, output):
    query, image, key_value_weight, key_value_bias, _, seed, _, ctx.dropout = inputs
    ctx.save_for_backward(query, image, key_value_weight, key_value_bias, seed, *output)
    ctx.set_materialize_grads(False)


def _text_reads_image_autograd(ctx, gradient, *_):
    gradients = _text_reads_image_backward(gradient, *ctx.saved_tensors, ctx.dropout)
    return *gradients, None, None, None, None


_text_reads_image.register_autograd(_text_reads_image_autograd, setup_context=_text_reads_image_context)


@torch.library.custom_op("meter_fast::image_reads_text", mutates_args=())
def _image_reads_text(
    key_value: Tensor,
    image: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    out_weight: Tensor,
    text_lengths: Tensor,
    seed: Tensor | None,
    heads: int,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """key_value [B,T,2D] -> what the image reads, projected [B,V,D]; then the probabilities [B,V,T,H]."""
    key, value = _key_and_value(key_value, heads)
    dtype = accumulation_dtype(key.dtype)
    bias = (key.to(dtype) * query_bias.view(heads, -1)).sum(2).view(*key_value.shape[:2], heads)
    scores = _per_pair(image, _per_head(key, _rows(query_weight, heads)))
    probabilities, dropped = softmax.forward(
        scores, text_lengths, "key", key.shape[2] ** -0.5, bias, dropout, seed, scores
    )
    out = _spread(dropped, _per_head(value, _columns(out_weight, heads).transpose(1, 2)))
    return out, probabilities


@_image_reads_text.register_fake
def _(key_value, image, query_weight, query_bias, out_weight, text_lengths, seed, heads, dropout):
    probabilities = image.new_empty(*image.shape[:2], key_value.shape[1], heads)
    return image.new_empty(image.shape), probabilities


@torch.library.custom_op("meter_fast::image_reads_text_backward", mutates_args=())
def _image_reads_text_backward(
    gradient: Tensor,
    key_value: Tensor,
    image: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    out_weight: Tensor,
    seed: Tensor | None,
    probabilities: Tensor,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of key_value, image, query_weight, query_bias, out_weight."""
    heads = probabilities.shape[3]
    key, value = _key_and_value(key_value, heads)
    dtype = accumulation_dtype(key.dtype)
    query_rows, out_columns = _rows(query_weight, heads), _columns(out_weight, heads)
    scores_gradient = _per_pair(gradient, _per_head(value, out_columns.transpose(1, 2)))
    scores_gradient, dropped = softmax.backward(
        probabilities,
        scores_gradient,
        "key",
        key.shape[2] ** -0.5,
        None,
        None,
        dropout,
        seed,
        scores_gradient,
    )
    image_gradient = _spread(scores_gradient, _per_head(key, query_rows))
    score_bias_gradient = scores_gradient.sum(1, dtype=dtype).view(-1, heads, 1)
    folded_key_gradient, folded_value_gradient = _gather(scores_gradient, image), _gather(dropped, gradient)
    key_value_gradient = torch.empty(key_value.shape, dtype=key_value.dtype, device=key_value.device)
    key_gradient, value_gradient = _key_and_value(key_value_gradient, heads)
    _per_head(folded_key_gradient, query_rows.transpose(1, 2), key_gradient)
    key_gradient += score_bias_gradient * query_bias.view(heads, -1)
    _per_head(folded_value_gradient, out_columns, value_gradient)
    query_weight_gradient = _weight_gradient(key, folded_key_gradient).view(query_weight.shape)
    query_bias_gradient = (key * score_bias_gradient).sum(0).flatten().to(query_bias.dtype)
    out_weight_gradient = torch.empty(out_weight.shape, dtype=out_weight.dtype, device=out_weight.device)
    _weight_gradient(folded_value_gradient, value, _columns(out_weight_gradient, heads))
    return key_value_gradient, image_gradient, query_weight_gradient, query_bias_gradient, out_weight_gradient


@_image_reads_text_backward.register_fake
def _(gradient, key_value, image, query_weight, query_bias, out_weight, seed, probabilities, dropout):
    return tuple(x.new_empty(x.shape) for x in (key_value, image, query_weight, query_bias, out_weight))


def _image_reads_text_context(ctx, inputs, output):
    *tensors, _, seed, _, ctx.dropout = inputs
    ctx.save_for_backward(*tensors, seed, output[1])
    ctx.set_materialize_grads(False)


def _image_reads_text_autograd(ctx, gradient, _):
    gradients = _image_reads_text_backward(gradient, *ctx.saved_tensors, ctx.dropout)
    return *gradients, None, None, None, None


_image_reads_text.register_autograd(_image_reads_text_autograd, setup_context=_image_reads_text_context)


def _key_and_value(key_value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """[B,T,2D] -> key and value [B*T,H,K]: views."""
    return key_value.view(-1, 2, heads, key_value.shape[2] // (2 * heads)).unbind(1)
