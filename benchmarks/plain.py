"""Training, retrieval and prediction without any saving, as published: whole passes, logits everywhere, full last
layers.

The other side of every comparison, and the oracle of the tests of the exact savings. In training nothing is shared
either: every objective encodes its pictures and texts anew, NLVR2 the statement for each picture, retrieval each
picture for each of its texts; attention writes its scores out; autograd keeps every activation. Optimizer and engine
are those of every run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from meter_fast.data.batch import Batch, PretrainBatch, RankedTexts, StatementBatch, VqaBatch
from meter_fast.models.activated_linear import QUICK_GELU, ActivatedLinear
from meter_fast.models.blocks import ResidualNorm
from meter_fast.models.config import PLAIN_KERNELS
from meter_fast.models.meter import Meter
from meter_fast.models.vision_block import Block
from meter_fast.objectives.joint import counts_of
from meter_fast.objectives.losses import Losses
from meter_fast.objectives.vqa import answer_scores

PLAIN = PLAIN_KERNELS

Texts = TypeVar("Texts", PretrainBatch, VqaBatch, StatementBatch, RankedTexts)
Told = tuple[Tensor, Tensor]  # mean loss, float32 scalar; how many were right


class PlainLoss(nn.Module):
    """What `JointLoss` gives, in whole passes: losses, parts and metrics of a batch, for the engine."""

    def __init__(self, model: Meter, objectives: Sequence[str]) -> None:
        super().__init__()
        self.model = without_savings(model)
        self.objectives = tuple(objectives)

    def forward(self, batch: Batch, totals: Mapping[str, float] | None = None) -> Losses:
        """totals: what summed losses are divided by, by objective; without them, means are over the batch itself."""
        counts = counts_of(self.objectives, [batch])
        totals = counts if totals is None else totals
        told = plain_steps(self.model, batch, self.objectives)
        losses = {name: mean * (counts[name] / totals[name]) for name, (mean, _) in told.items()}
        metrics = {name: (right, right.new_full((), counts[name])) for name, (_, right) in told.items()}
        parts = {name: value.detach() for name, value in losses.items()}
        return Losses(torch.stack(list(losses.values())).sum(), parts, metrics)


def without_savings(model: Meter) -> Meter:
    """The same model, changed: its modules compute as the published ones do, in torch's operators, and keep what those
    keep for backward."""
    for module in model.modules():
        if isinstance(module, ResidualNorm):
            module.forward = partial(_residual_norm, module)
        elif isinstance(module, Block):
            module.forward = partial(TimmBlock.forward, module)
        elif isinstance(module, ActivatedLinear) and module.activation is QUICK_GELU:
            module.activation = _quick_gelu
    model.keep_activations()
    return model


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _residual_norm(norm: ResidualNorm, x: Tensor, bias: None, residual: Tensor) -> Tensor:
    """With torch's own dropout."""
    assert bias is None  # of PLAIN kernels
    return nn.LayerNorm.forward(norm, residual + F.dropout(x, norm.dropout, norm.training))


def plain_losses(model: Meter, batch: Batch, objectives: Sequence[str] = ("mlm", "itm")) -> dict[str, Tensor]:
    """The objectives' losses, float32 scalars, each mean over its own count."""
    return {name: loss for name, (loss, _) in plain_steps(model, batch, objectives).items()}


def plain_steps(model: Meter, batch: Batch, objectives: Sequence[str]) -> dict[str, Told]:
    """The objectives' mean losses and how many were right, one whole pass after the other."""
    return {name: STEPS[name](model, batch) for name in objectives}


def _mlm(model: Meter, batch: PretrainBatch) -> Told:
    logits = plain_scores(model, "mlm_head", (batch.images,), batch.masked_ids, batch.text_mask).flatten(0, 1)
    labels = torch.full_like(batch.text_ids, -100).flatten()
    labels[batch.masked_rows] = batch.masked_labels
    return F.cross_entropy(logits.float(), labels, ignore_index=-100), (logits.argmax(-1) == labels).sum()


def _itm(model: Meter, batch: PretrainBatch) -> Told:
    pictures = batch.images if batch.false_images is None else torch.cat([batch.images, batch.false_images])
    shown = (pictures[batch.itm_images],)
    logits = plain_scores(model, "itm_head", shown, batch.text_ids, batch.text_mask)
    return _classes(logits.float(), batch.itm_labels)


def _vqa(model: Meter, batch: VqaBatch) -> Told:
    shown = (batch.images[batch.image_rows],)
    logits = plain_scores(model, "vqa_head", shown, batch.text_ids, batch.text_mask).float()
    loss = F.binary_cross_entropy_with_logits(logits, batch.targets) * batch.targets.shape[1]
    return loss, answer_scores(logits, batch.targets).sum()


def _nlvr2(model: Meter, batch: StatementBatch) -> Told:
    return _statements(model, "nlvr2_head", batch)


def _snli_ve(model: Meter, batch: StatementBatch) -> Told:
    return _statements(model, "snli_head", batch)


def _statements(model: Meter, head: str, batch: StatementBatch) -> Told:
    shown = tuple(batch.images[rows] for rows in batch.image_rows.unbind(1))
    return _classes(plain_scores(model, head, shown, batch.text_ids, batch.text_mask).float(), batch.labels)


def _retrieval(model: Meter, batch: PretrainBatch) -> Told:
    texts, pairs = batch.ranked, len(batch)
    false = len(texts.ids) // pairs - 1
    shown = torch.cat([batch.images, batch.images.repeat_interleave(false, 0)])  # before the vision encoder
    scores = plain_scores(model, "rank_head", (shown,), texts.ids, texts.mask)[:, 0]
    table = torch.cat([scores[:pairs, None], scores[pairs:].view(pairs, false)], dim=1)
    return _classes(table, torch.zeros_like(batch.itm_labels))


def _classes(logits: Tensor, labels: Tensor) -> Told:
    return F.cross_entropy(logits, labels), (logits.argmax(-1) == labels).sum()


STEPS = {"mlm": _mlm, "itm": _itm, "vqa": _vqa, "nlvr2": _nlvr2, "snli_ve": _snli_ve, "retrieval": _retrieval}


def as_published(batch: Batch, length: int, pad_id: int) -> Batch:
    """The same batch as the published loader brings it: texts padded to `length` tokens, a picture for each text that
    asks about one, and a false picture for each pair, whether it is looked at or not."""
    if isinstance(batch, PretrainBatch):
        pictures = batch.images if batch.false_images is None else torch.cat([batch.images, batch.false_images])
        own = torch.arange(len(batch), device=batch.images.device)
        batch = replace(
            batch,
            false_images=pictures[batch.itm_images],
            itm_images=torch.where(batch.itm_labels == 1, own, len(batch) + own),
            ranked=batch.ranked and pad_text(batch.ranked, length, pad_id),
        )
    else:
        rows = batch.image_rows.view(len(batch), -1).t()  # all left pictures, then all right ones
        places = torch.arange(rows.numel(), device=rows.device).view_as(rows).t().reshape(batch.image_rows.shape)
        batch = replace(batch, images=batch.images[rows.flatten()], image_rows=places)
    return pad_text(batch, length, pad_id)


def pad_text(batch: Texts, length: int, pad_id: int) -> Texts:
    """The same batch with texts padded to `length` tokens, as the published collator does."""
    prefix = "" if isinstance(batch, RankedTexts) else "text_"
    old = getattr(batch, f"{prefix}ids").shape[1]
    changed = {
        name: F.pad(getattr(batch, name), (0, length - old), value=value)
        for name, value in ((f"{prefix}ids", pad_id), (f"{prefix}mask", False), ("masked_ids", pad_id))
        if hasattr(batch, name)
    }
    if isinstance(batch, PretrainBatch):
        changed["masked_rows"] = batch.masked_rows // old * length + batch.masked_rows % old
    return replace(batch, text_rows=None, **changed)


@torch.inference_mode()
@sdpa_kernel(SDPBackend.MATH)
def plain_match_scores(model: Meter, images: Tensor, ids: list[list[int]], length: int) -> Tensor:
    """Rank scores [N,T] float32 of images [N,3,H,W] against texts of token ids, as in the published loop: for each
    picture all texts, padded to `length`, each with a picture of its own and through every row of every layer."""
    texts = torch.tensor([row + [model.config.text.pad_id] * (length - len(row)) for row in ids], device=images.device)
    mask = torch.arange(length, device=images.device) < torch.tensor([[len(row)] for row in ids], device=images.device)
    rows = []
    for picture in images:
        image = model.encode_image(picture.expand(len(ids), *picture.shape))
        cls = model.fuse(model.encode_text(texts, mask), image, mask).cls
        rows.append(model.rank_head(cls)[:, 0].float())
    return torch.stack(rows)


@sdpa_kernel(SDPBackend.MATH)
def plain_scores(model: Meter, head: str, pictures: tuple[Tensor, ...], ids: Tensor, mask: Tensor) -> Tensor:
    """What a head says of B requests, as the published code asks it: every picture encoded as often as it is asked
    about, the text once for each picture of a request, and the head of masked words read everywhere.

    pictures: one or two of [B,3,H,W]; ids and mask [B,L], padded -> logits [B,C], of "mlm_head" [B,L,S].
    """
    fused = [
        model.fuse(model.encode_text(ids, mask), model.encode_image(images), mask, image_type)
        for image_type, images in enumerate(pictures, 1)
    ]
    if head == "mlm_head":
        return model.mlm_head(fused[0].text)
    return getattr(model, head)(torch.cat([one.cls for one in fused], dim=-1))


@sdpa_kernel(SDPBackend.MATH)
def plain_caption(model: Meter, images: Tensor, ids: Tensor, mask: Tensor, length: int) -> Tensor:
    """Best token after best token, with nothing kept between steps: images [B,3,H,W], ids and mask [B,L] of what is
    read -> [B,length]; what follows an end means nothing."""
    fused = model.fuse(model.encode_text(ids, mask), model.encode_image(images), mask)
    written = ids[:, :0]
    while written.shape[1] < length:
        rows = model.decoder(model.decoder.inputs(F.pad(written, (0, 1))), fused.text, fused.image, mask)
        written = torch.cat([written, model.lm_head(rows)[:, -1:].argmax(-1)], dim=1)
    return written
