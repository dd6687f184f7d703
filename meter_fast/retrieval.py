"""Retrieval without fine-tuning: every picture of a split against every caption, ranked by the ITM head.

Knows models, sources and where a model's settings lie. Knows nothing of training.
Source: METER, section 4.2 (zero-shot retrieval) and the published recall loop (`modules/objectives.py`). Pictures and
texts are encoded once, the pairs go through the fusion in batches, and of equal captions one is scored: the same scores
as one pass per pair.

Image retrieval (IR) asks of each caption whether its picture is among the k best pictures; text retrieval (TR) asks of
each picture whether any of its captions is among the k best captions. Captions repeat between pictures: in drawn
scenes often, as these can state few things, in photographs rarely. As published, only the caption's own picture counts
as right even if another one has the same words, so that less than 1 can be reached; "equal_captions" counts every
picture that has these words. Other pictures of which a caption is true, in other words, count as wrong in both.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import meter_fast
from meter_fast.config import RunConfig, from_dict, override
from meter_fast.data.image_check import DEFAULT_MAX_PIXELS, BadImage
from meter_fast.data.images import ImageBackend, image_transform, open_backend
from meter_fast.data.sources import open_sources
from meter_fast.data.tokenizer import load_tokenizer
from meter_fast.evaluate import check_vocabulary, held_out_names, parted, tokenizer_of
from meter_fast.models.files import read_json
from meter_fast.models.meter import Meter, Need, Part
from meter_fast.predict import MATCH, pad, place_of
from meter_fast.recipes import resolve
from meter_fast.score import read_captions, read_picture, samples_by_picture
from meter_fast.training.monitor import duration

DEPTHS = (1, 5, 10)
PAIRS_PER_BATCH = 256
PICTURES_PER_BLOCK = 32
SAY_EVERY = 10.0  # seconds between progress lines


# ------------------------------------------------------------------------------------------------------ from scores


def recalls(scores: Tensor, belongs: Tensor, depths: Sequence[int] = DEPTHS) -> dict[str, float]:
    """scores [N,T] float32 of pictures against captions, belongs [N,T] bool -> {"ir_r1", ..., "tr_r10"}, shares of 1.

    Of equal scores the lower index ranks first, so that the result depends on nothing but the two tables.
    """
    return {
        f"{name}_r{k}": share
        for name, (table, right) in (("ir", (scores.T, belongs.T)), ("tr", (scores, belongs)))
        for k, share in zip(depths, _found(table, right, depths), strict=True)
    }


def _found(scores: Tensor, right: Tensor, depths: Sequence[int]) -> list[float]:
    """scores, right [Q,C]: the share of the Q rows that have a right one among the best 1, 5, ... of their columns."""
    hits = torch.zeros(len(depths), dtype=torch.int64)
    for part, truth in zip(scores.split(256), right.split(256), strict=True):
        best = part.sort(dim=1, descending=True, stable=True).indices[:, : max(depths)]
        found = truth.gather(1, best)
        hits += torch.tensor([found[:, :k].any(1).sum() for k in depths])
    return (hits.double() / len(scores)).tolist()


def chance(belongs: Tensor, depths: Sequence[int] = DEPTHS) -> dict[str, float]:
    """What `recalls` gives on average for a random order: belongs [N,T] bool -> the same keys."""
    levels = {}
    for name, right in (("ir", belongs.T), ("tr", belongs)):
        count, total = right.sum(1).double(), right.shape[1]
        for k in depths:
            missed = torch.ones_like(count)
            for drawn in range(min(k, total)):
                missed *= ((total - count - drawn) / (total - drawn)).clamp_min(0)
            levels[f"{name}_r{k}"] = (1 - missed).mean().item()
    return levels


# ------------------------------------------------------------------------------------------------------ from a model


@dataclass(frozen=True)
class EncodedTexts:
    """Some texts of similar length: features [C,L,D], mask [C,L] bool, columns [C] int64: which texts they are."""

    features: Tensor
    mask: Tensor
    columns: Tensor


@torch.inference_mode()
def encode_texts(model: Meter, ids: Sequence[Sequence[int]], batch: int = PAIRS_PER_BATCH) -> list[EncodedTexts]:
    """Token ids of each text, special tokens included -> all texts, each encoded once, sorted by length."""
    device, _ = place_of(model)
    by_length = np.argsort([len(row) for row in ids], kind="stable")
    encoded = []
    for start in range(0, len(ids), batch):
        part = by_length[start : start + batch]
        padded, mask = pad([ids[n] for n in part], model.config.text.pad_id, device)
        encoded.append(EncodedTexts(model.encode_text(padded, mask), mask, torch.from_numpy(part)))
    return encoded


@torch.inference_mode()
def match_scores(model: Meter, image: Tensor, texts: Sequence[EncodedTexts], batch: int = PAIRS_PER_BATCH) -> Tensor:
    """image [P,V,D] encoded pictures -> [P,T] float32 on the host: how well each pair fits.

    It is what the ranking head says, in a model that has one; else the log-odds that the ITM head gives. These rank
    pairs as the probability of a match does, without the ties of probabilities that round to 1. (Without a ranking head
    the published loop ranks by the score of class 1 alone; that of class 0, its mirror image but for how both started,
    is taken off here.)
    """
    scores = torch.empty(len(image), sum(len(part.columns) for part in texts))
    for part in texts:
        count = len(part.columns)
        first = 0
        for some in image.split(max(1, batch // count)):
            pictures = torch.arange(len(some), device=image.device).repeat_interleave(count)
            text, mask = part.features.repeat(len(some), 1, 1), part.mask.repeat(len(some), 1)
            (fused,) = model.fuse_parts(text, some, mask, (Part(Need.CLS, len(pictures), pictures),))
            scores[first : first + len(some), part.columns] = _fit(model, fused.cls).view(len(some), count).cpu()
            first += len(some)
    return scores


def _fit(model: Meter, cls: Tensor) -> Tensor:
    """cls [B,2D] -> [B] float32."""
    if model.rank_head is not None:
        return model.rank_head(cls)[:, 0].float()
    logits = model.itm_head(cls).float()
    return logits[:, MATCH] - logits[:, 1 - MATCH]


@dataclass(frozen=True)
class Retrieval:
    """scores [N,U] float32 of N readable pictures against U different captions; owner [T] int64: the picture of each
    caption of the split; which [T] int64: the one of the U that it is."""

    scores: Tensor
    owner: Tensor
    which: Tensor

    def result(self) -> dict:
        """As published, every caption a column of its own, and counting equal captions as one."""
        pictures, distinct = self.scores.shape
        own = torch.zeros(pictures, len(self.owner), dtype=torch.bool)
        own[self.owner, torch.arange(len(self.owner))] = True
        same = torch.zeros(pictures, distinct, dtype=torch.bool)
        same[self.owner, self.which] = True
        return {
            "retrieval": recalls(self.scores[:, self.which], own),
            "chance": chance(own),
            "equal_captions": {"retrieval": recalls(self.scores, same), "chance": chance(same)},
            "pictures": pictures,
            "captions": len(self.owner),
            "different_captions": distinct,
        }


def score_retrieval(
    model: Meter,
    tokenizer,
    sources,
    backend: ImageBackend,
    max_length: int,
    max_pictures: int | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    skipped: Counter | None = None,
    say: Callable[[str], None] | None = None,
) -> Retrieval:
    """Score all pairs of the pictures (that many, spread evenly) and captions of `sources`, on one process.

    Pictures that cannot be read are left out with their captions and counted in `skipped` by cause, and so are captions
    that are no text. say: gets progress lines. Raises ValueError for a model without ITM head, and for fewer than two
    readable pictures.
    """
    if model.itm_head is None:
        raise ValueError("retrieval ranks by the ITM head, which this model lacks: train with objectives.names=mlm,itm")
    skipped = Counter() if skipped is None else skipped
    groups = [(group, read_captions(sources, group, skipped)) for group in samples_by_picture(sources, max_pictures)]
    groups = [(group, captions) for group, captions in groups if captions]
    different = list(dict.fromkeys(text for _, captions in groups for text in captions))
    if len(groups) < 2:
        raise ValueError(f"retrieval needs two captioned pictures or more; skipped: {dict(skipped)}")
    pictures = [sources.read(int(group[0])).image for group, _ in groups]  # views: nothing is in memory yet
    was_training = model.training
    model.eval()
    try:
        ids = tokenizer(different, truncation=True, max_length=min(max_length, model.config.text.max_length))
        texts = encode_texts(model, ids["input_ids"])
        rows, scores = _score_pictures(
            model, texts, pictures, backend, max_pixels, skipped, _Progress(len(groups), say)
        )
    finally:
        model.train(was_training)
    if len(rows) < 2:
        raise ValueError(f"retrieval needs two readable pictures or more; skipped: {dict(skipped)}")
    return _readable(scores, [groups[row][1] for row in rows], different)


@torch.inference_mode()
def _score_pictures(
    model: Meter, texts: Sequence[EncodedTexts], pictures: Sequence[np.ndarray], backend: ImageBackend,
    max_pixels: int, skipped: Counter, progress: "_Progress",
) -> tuple[list[int], Tensor]:  # fmt: skip
    """Which pictures are readable, and their scores [N,U]. Each is encoded once, a block of them at a time."""
    device, dtype = place_of(model)
    rows: list[int] = []
    scores: list[Tensor] = [torch.empty(0, sum(len(part.columns) for part in texts))]
    for start in range(0, len(pictures), PICTURES_PER_BLOCK):
        pixels = []
        block = range(start, min(start + PICTURES_PER_BLOCK, len(pictures)))
        for row in block:
            try:
                pixels.append(read_picture(pictures[row], backend, max_pixels))
                rows.append(row)
            except BadImage as error:
                skipped[error.cause] += 1
        if pixels:
            image = model.encode_image(torch.stack(pixels).to(device, dtype))
            scores.append(match_scores(model, image, texts))
        progress(block.stop)
    return rows, torch.cat(scores)


def _readable(scores: Tensor, captions: Sequence[Sequence[str]], different: Sequence[str]) -> Retrieval:
    """Without the captions that only pictures had which could not be read."""
    column = {text: number for number, text in enumerate(different)}
    used = sorted({column[text] for texts in captions for text in texts})
    place = {number: i for i, number in enumerate(used)}
    owner = torch.tensor([row for row, texts in enumerate(captions) for _ in texts])
    which = torch.tensor([place[column[text]] for texts in captions for text in texts])
    return Retrieval(scores[:, used], owner, which)


class _Progress:
    """Says from time to time how far the pictures are and how long the rest will take."""

    def __init__(self, total: int, say: Callable[[str], None] | None) -> None:
        self.total, self.say = total, say
        self.began = self.said = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if self.say is None or (now - self.said < SAY_EVERY and done < self.total):
            return
        self.said = now
        rest = (now - self.began) / done * (self.total - done)
        self.say(f"pictures {done:,}/{self.total:,}  ETA {duration(rest)}")


# ------------------------------------------------------------------------------------------------- from the command


def evaluate_retrieval(
    model_path: str | Path,
    settings: Sequence[str] = (),
    pictures: int | None = None,
    device: str | None = None,
    say: Callable[[str], None] | None = None,
) -> dict:
    """Recalls of the model at `model_path` (run directory, export folder or METER .ckpt) on a held-out split.

    settings: "data.root=FOLDER" and the like, over the run's own or, for a model without a run, over the recipe's. What
    is scored: data.val_sources where `settings` name them; else the data sets of data.sources in data.val_split, and
    for those without one (tables, shards) data.val_sources. pictures: at most so many, spread evenly.
    Returns {"retrieval": {"ir_r1", "ir_r5", "ir_r10", "tr_r1", ...}, "chance": {the same keys}, "equal_captions":
    {"retrieval", "chance"}, "pictures", "captions", "different_captions", "split", "skipped"}. Raises ValueError where
    something is missing or does not fit.
    """
    path = Path(model_path)
    model = meter_fast.load_model(path)
    config = override(_settings_of(path), settings)
    data = config.data
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(tokenizer_of(path, data.tokenizer))
    check_vocabulary(model, tokenizer)
    own = () if any(text.startswith("data.val_sources=") for text in settings) else parted(data, data.val_split)
    names, said = (own, data.val_split) if own else held_out_names(data, data.val_split)
    sources = open_sources(names, data.root, data.val_split)
    transform = image_transform(data.transform, model.config.vision.image_size)
    skipped: Counter = Counter()
    backend = open_backend("torchvision", transform, "cpu", torch.float32)
    try:
        found = score_retrieval(
            model.to(device),
            tokenizer,
            sources,
            backend,
            data.max_text_length,
            pictures,
            data.max_image_pixels,
            skipped,
            say,
        )
    finally:
        backend.close()
    return {**found.result(), "split": said, "skipped": dict(skipped)}


def _settings_of(path: Path) -> RunConfig:
    """The resolved recipe of a run directory, which must have trained the head; for anything else that of
    pre-training."""
    if not (path / "run.json").is_file():
        return resolve(["pretrain"])
    config = from_dict(RunConfig, read_json(path / "config.json"))
    if "itm" not in config.objectives.names:
        raise ValueError(
            f"{path} was trained on objectives.names={','.join(config.objectives.names)}: retrieval ranks by the ITM "
            "head, which only itm trains"
        )
    return config


def lines(result: Mapping) -> list[str]:
    """The result as a table for people, in per cent."""
    names = [f"{kind}_r{k}" for kind in ("ir", "tr") for k in DEPTHS]
    heads = "".join(f"{name.replace('_r', '@').upper():>9}" for name in names)
    rows = [
        ("recall", result["retrieval"]),
        ("chance", result["chance"]),
        ("equal captions counted", result["equal_captions"]["retrieval"]),
        ("chance of that", result["equal_captions"]["chance"]),
    ]
    table = [f"{title:<24}" + "".join(f"{100 * row[name]:>9.2f}" for name in names) for title, row in rows]
    return [
        f"{'per cent':<24}{heads}",
        *table,
        f"split {result['split']}: {result['pictures']:,} pictures, {result['captions']:,} captions, "
        f"{result['different_captions']:,} of them different; skipped {result['skipped'] or 'none'}",
    ]
