"""Pre-training, retrieval and prediction without any saving, as published: whole passes, logits everywhere, full last
layers.

The other side of every comparison, and the oracle of the tests of the exact savings.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from meter_fast.data.batch import PretrainBatch
from meter_fast.models.config import KernelsConfig
from meter_fast.models.meter import Meter

PLAIN = KernelsConfig("reference", "direct", "padded", "reference", "reference", "reference")


def plain_losses(model: Meter, batch: PretrainBatch) -> dict[str, Tensor]:
    """MLM and ITM losses, float32 scalars, each mean over its own count."""
    mask = batch.text_mask
    image, text = model.encode_image(batch.images), model.encode_text(batch.masked_ids, mask)
    logits = model.mlm_head(model.fuse(text, image, mask).text)
    labels = torch.full_like(batch.text_ids, -100).flatten()
    labels[batch.masked_rows] = batch.masked_labels
    mlm = F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=-100)
    pictures = batch.images if batch.false_images is None else torch.cat([batch.images, batch.false_images])
    image, text = model.encode_image(pictures[batch.itm_images]), model.encode_text(batch.text_ids, mask)
    itm = F.cross_entropy(model.itm_head(model.fuse(text, image, mask).cls).float(), batch.itm_labels)
    return {"mlm": mlm, "itm": itm}


def pad_text(batch: PretrainBatch, length: int, pad_id: int) -> PretrainBatch:
    """The same batch with texts padded to `length` tokens, as the published collator does."""
    old = batch.text_ids.shape[1]

    def wider(x: Tensor, value: int | bool) -> Tensor:
        return F.pad(x, (0, length - old), value=value)

    rows = batch.masked_rows // old * length + batch.masked_rows % old
    return replace(
        batch,
        text_ids=wider(batch.text_ids, pad_id),
        text_mask=wider(batch.text_mask, False),
        masked_ids=wider(batch.masked_ids, pad_id),
        masked_rows=rows,
        text_rows=None,
    )


@torch.inference_mode()
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


def plain_caption(model: Meter, images: Tensor, ids: Tensor, mask: Tensor, length: int) -> Tensor:
    """Best token after best token, with nothing kept between steps: images [B,3,H,W], ids and mask [B,L] of what is
    read -> [B,length]; what follows an end means nothing."""
    fused = model.fuse(model.encode_text(ids, mask), model.encode_image(images), mask)
    written = ids[:, :0]
    while written.shape[1] < length:
        rows = model.decoder(model.decoder.inputs(F.pad(written, (0, 1))), fused.text, fused.image, mask)
        written = torch.cat([written, model.lm_head(rows)[:, -1:].argmax(-1)], dim=1)
    return written
