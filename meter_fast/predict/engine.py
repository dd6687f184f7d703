"""Requests to scores: each picture encoded once, texts of like length together, padded to the batch's longest.

Knows a Meter, pixels and token ids. Knows no files, no tokenizer and no words.
Shape letters: R requests, B pairs of a batch, N pictures, L text tokens, V image tokens, C classes, S vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meter_fast.models.meter import Meter
from meter_fast.predict.encoded import caption, cls_of, hidden_logits, pad, place_of

Pixels = Callable[[int], Tensor]  # number of a picture -> float32 [3,S,S], normalised
SECOND_PICTURE = 2  # row of the token types that NLVR2 adds to its second picture


@dataclass(frozen=True)
class Request:
    """ids: of a text, special tokens included. pictures: numbers of the one or two that it is about. places: which of
    the ids are asked for; of a text with masks."""

    ids: list[int]
    pictures: tuple[int, ...]
    places: tuple[int, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Requests ready for the fusion. numbers: which they are; text [B,L,E] and image [N,V,D]: encoded; mask [B,L] bool;
    images: for each picture of a request, [B] int64: which of the N."""

    numbers: list[int]
    text: Tensor
    mask: Tensor
    image: Tensor
    images: tuple[Tensor, ...]


@torch.inference_mode()
def encode_pictures(model: Meter, pixels: Pixels, numbers: Sequence[int], batch: int) -> Tensor:
    """Pictures by their numbers -> [N,V,D], at most `batch` at a time."""
    device, dtype = place_of(model)
    parts = [numbers[start : start + batch] for start in range(0, len(numbers), batch)]
    return torch.cat([model.encode_image(torch.stack([pixels(n) for n in part]).to(device, dtype)) for part in parts])


@torch.inference_mode()
def batches(model: Meter, pixels: Pixels, requests: Sequence[Request], batch: int) -> Iterator[Batch]:
    """Every request once. Those about one picture are kept together; of those about two, all pictures are held."""
    device, _ = place_of(model)
    for block in _blocks(requests, batch):
        pictures = list(dict.fromkeys(n for row in block for n in requests[row].pictures))
        encoded = dict(zip(pictures, encode_pictures(model, pixels, pictures, batch), strict=True))
        block = sorted(block, key=lambda row: len(requests[row].ids))
        for start in range(0, len(block), batch):
            numbers = block[start : start + batch]
            part = [requests[row] for row in numbers]
            ids, mask = pad([request.ids for request in part], model.config.text.pad_id, device)
            used = list(dict.fromkeys(n for request in part for n in request.pictures))
            place = {number: i for i, number in enumerate(used)}
            columns = zip(*([place[n] for n in request.pictures] for request in part))
            images = tuple(torch.tensor(column, device=device) for column in columns)
            image = torch.stack([encoded[n] for n in used])
            yield Batch(numbers, model.encode_text(ids, mask), mask, image, images)


def _blocks(requests: Sequence[Request], pictures: int) -> Iterator[list[int]]:
    """Requests in blocks of at most so many pictures, all that are about one picture in the same block."""
    if any(len(request.pictures) > 1 for request in requests):
        yield list(range(len(requests)))
        return
    of_picture: dict[tuple[int, ...], list[int]] = {}
    for row, request in enumerate(requests):
        of_picture.setdefault(request.pictures, []).append(row)
    groups = list(of_picture.values())
    for start in range(0, len(groups), pictures):
        yield [row for group in groups[start : start + pictures] for row in group]


@torch.inference_mode()
def class_logits(model: Meter, head: str, pixels: Pixels, requests: Sequence[Request], batch: int) -> list[Tensor]:
    """What a classifying head ("vqa_head", "itm_head", "snli_head", "nlvr2_head") says: R logits [C] float32 on the
    host.

    The head of NLVR2 reads the cls of the text with the first picture and with the second, [B,4D].
    """
    found: list[Tensor] = [torch.empty(0)] * len(requests)
    for part in batches(model, pixels, requests, batch):
        cls = [
            cls_of(model, part.text, part.image, part.mask, images, image_type)
            for image_type, images in zip((1, SECOND_PICTURE), part.images)
        ]
        logits = getattr(model, head)(torch.cat(cls, dim=-1)).float().cpu()
        for number, row in zip(part.numbers, logits, strict=True):
            found[number] = row
    return found


@torch.inference_mode()
def mask_logits(model: Meter, pixels: Pixels, requests: Sequence[Request], batch: int) -> Iterator[tuple[int, Tensor]]:
    """(number of a request, logits [M,S] float32 of its M places), in any order."""
    for part in batches(model, pixels, requests, batch):
        places = [requests[number].places for number in part.numbers]
        rows = [row for row, columns in enumerate(places) for _ in columns]
        columns = [column for some in places for column in some]
        device = part.mask.device
        at = (torch.tensor(rows, device=device), torch.tensor(columns, device=device))
        logits = hidden_logits(model, part.text, part.image, part.mask, *at, images=part.images[0]).float()
        yield from zip(part.numbers, logits.split([len(some) for some in places]), strict=True)


@torch.inference_mode()
def captions(model: Meter, tokenizer, pixels: Pixels, pictures: int, batch: int, beams: int, length: int) -> list[str]:
    """A caption of each of so many pictures. Errors: those of `encoded.caption`."""
    said = []
    for start in range(0, pictures, batch):
        image = encode_pictures(model, pixels, range(start, min(start + batch, pictures)), batch)
        said += caption(model, tokenizer, image, beams, length)
    return said
