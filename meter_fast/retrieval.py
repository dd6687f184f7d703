"""Retrieval over a split: every picture against every caption, on any number of processes, and the recalls.

Knows models, sources, where a model's settings lie, and processes. Knows nothing of training. How pairs are scored is
in score_retrieval.py, what is kept on disk in score_table.py, what recall means in recall.py.

    meter-fast evaluate runs/f30k retrieval data.val_sources=f30k data.val_split=test
    deepspeed --module meter_fast.evaluate runs/f30k retrieval ... --scores runs/f30k/scores

Processes share the pictures in blocks; what is done stands in the folder of --scores, and the same command, on any
number of processes, goes on with the rest.
"""

import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch

import meter_fast
from meter_fast.config import DataConfig, RunConfig, from_dict, override
from meter_fast.data.image_check import DEFAULT_MAX_PIXELS
from meter_fast.data.images import ImageBackend, image_transform, open_backend
from meter_fast.data.sources import Sources, open_sources
from meter_fast.data.text import TextPipeline
from meter_fast.data.tokenizer import load_tokenizer
from meter_fast.evaluate import check_vocabulary, facts, held_out_names, here, parted, tokenizer_of
from meter_fast.models.files import read_json
from meter_fast.models.meter import Meter
from meter_fast.predict import place_of
from meter_fast.recall import DEPTHS, Retrieval
from meter_fast.recipes import resolve
from meter_fast.score_retrieval import (
    PICTURES_PER_BLOCK,
    Split,
    check_head,
    encode_texts,
    readable,
    score_pictures,
)
from meter_fast.score_table import ScoreTable
from meter_fast.training.monitor import duration
from meter_fast.training.world import World, alone

SAY_EVERY = 10.0  # seconds between progress lines
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Say = Callable[[str], None]


def score_retrieval(
    model: Meter,
    text: TextPipeline,
    sources: Sources,
    backend: ImageBackend,
    max_pictures: int | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    skipped: Counter | None = None,
    say: Say | None = None,
    folder: Path | None = None,
    world: World | None = None,
) -> Retrieval | None:
    """Score all pairs of the pictures (that many, spread evenly) and captions of `sources`. Collective; the result is
    the main process's, None elsewhere.

    Pictures that cannot be read are left out with their captions and counted in `skipped` by cause, and so are captions
    that are no text. say: gets progress lines. folder: where scores are kept, and taken up again; a temporary one by
    default. world: the processes that share the work. Raises ValueError for a model without a head to rank by, for
    fewer than two readable pictures, and for a folder with scores of something else, or one that is not shared.
    """
    check_head(model)
    world = world or alone(place_of(model)[0])
    skipped = Counter() if skipped is None else skipped
    split = Split.of(sources, max_pictures, skipped)
    with ExitStack() as stack:
        table, ids = _open_table(model, text, split, backend, folder, world, stack), text.encode(split.different)
        left = world.together(table.left)
        own = left[world.rank :: world.size]

        def score_own() -> None:
            texts = encode_texts(model, ids) if own else []
            total = sum(len(table.rows(block)) for block in own)
            progress = _Progress(total, len(split.different), world.size, say if world.is_main else None)
            for block in own:
                table.write(
                    block, *score_pictures(model, split, table.rows(block), texts, backend, max_pixels, progress)
                )

        was_training = model.training
        model.eval()
        try:
            world.each(score_own)
        finally:
            model.train(was_training)
        return _finished(table, split, skipped, world)


def _open_table(
    model: Meter,
    text: TextPipeline,
    split: Split,
    backend: ImageBackend,
    folder: Path | None,
    world: World,
    stack: ExitStack,
) -> ScoreTable:
    """The table in `folder`, or in a temporary one which `stack` removes. Collective."""
    if folder is None:
        made = world.together(lambda: stack.enter_context(tempfile.TemporaryDirectory(prefix="meter-fast-")))
        folder, whose = Path(made), {}
    else:
        whose = _whose(model, text, split, backend) if world.is_main else {}
    sizes = len(split), len(split.different)
    world.together(lambda: ScoreTable.prepare(folder, *sizes, {"block": PICTURES_PER_BLOCK, **whose}))

    def opened() -> ScoreTable:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not there: give --scores a folder that all machines share")
        return ScoreTable(folder, *sizes, PICTURES_PER_BLOCK)

    return world.each(opened)


def _finished(table: ScoreTable, split: Split, skipped: Counter, world: World) -> Retrieval | None:
    """The result on the main process, when all processes have done their share. Collective."""
    found: list[Retrieval] = []

    def read() -> None:
        if table.left():
            raise ValueError(f"blocks {table.left()[:4]} of {table.folder} are missing: let --scores be one that all "
                             "machines share")  # fmt: skip
        skipped.update(table.skipped())
        scores = table.scores()
        found.append(Retrieval.of(scores, readable(scores), split.captions))

    world.together(read)
    return found[0] if found else None


def _whose(model: Meter, text: TextPipeline, split: Split, backend: ImageBackend) -> dict[str, str]:
    """What scores depend on: weights and their dtype, pictures by name, captions, tokens."""
    weights = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        weights.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        weights.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    names = [split.sources.read(sample).name for sample in split.samples]
    return {
        "model": weights.hexdigest(),
        "names": _hash(names),
        "captions": _hash(split.different),
        "tokens": _hash(map(str, text.encode(split.different))),
        "dtype": str(place_of(model)[1]),
        "transform": f"{backend.transform.name} {backend.transform.size}",
    }


def _hash(texts: Iterable[str]) -> str:
    found = hashlib.sha256()
    for line in texts:
        found.update(line.encode("utf-8", "surrogateescape") + b"\0")
    return found.hexdigest()


class _Progress:
    """Says from time to time how far the pictures are and how long the rest will take; told of pairs."""

    def __init__(self, pictures: int, texts: int, processes: int, say: Say | None) -> None:
        self.pictures, self.texts, self.say = pictures, texts, say
        self.who = f" on each of {processes} processes" if processes > 1 else ""
        self.began = self.said = time.monotonic()
        self.pairs = 0

    def __call__(self, pairs: int) -> None:
        self.pairs += pairs
        done, total = self.pairs // self.texts, self.pictures
        now = time.monotonic()
        if self.say is None or (now - self.said < SAY_EVERY and self.pairs < total * self.texts):
            return
        self.said = now
        rest = (now - self.began) / self.pairs * (total * self.texts - self.pairs)
        self.say(f"pictures {done:,}/{total:,}{self.who}  ETA {duration(rest)}")


# ------------------------------------------------------------------------------------------------- from the command


def evaluate_retrieval(
    model_path: str | Path,
    settings: Sequence[str] = (),
    pictures: int | None = None,
    device: str | None = None,
    say: Say | None = None,
    scores: str | Path | None = None,
    dtype: Literal["fp32", "bf16"] = "fp32",
    world: World | None = None,
) -> dict:
    """Recalls of the model at `model_path` (run directory, export folder or METER .ckpt) on a held-out split.

    settings: "data.root=FOLDER" and the like, over the run's own or, for a model without a run, over the recipe's. What
    is scored: data.val_sources where `settings` name them; else the data sets of data.sources in data.val_split, and
    for those without one (tables, shards) data.val_sources. pictures: at most so many, spread evenly. scores: folder to
    keep scores in and to go on from. dtype: of the model; heads and scores are fp32. world: the processes that do it
    together; all of them call this and get the same.
    Returns {"retrieval": {"ir_r1", "ir_r5", "ir_r10", "tr_r1", ...}, "chance": {the same keys}, "equal_captions":
    {"retrieval", "chance"}, "pictures", "captions", "different_captions", "head", "split", "skipped"} and
    `evaluate.facts`. Raises ValueError where something is missing or does not fit.
    """
    path, world = Path(model_path), world or alone(device or here())
    model, data, text, sources, said = world.each(lambda: _open(path, settings))
    model = model.to(world.device, DTYPES[dtype])
    if model.itm_head is not None:
        model.itm_head.float()  # scores rounded to bfloat16 would tie
    skipped: Counter = Counter()
    transform = image_transform(data.transform, model.config.vision.image_size)
    backend = open_backend("torchvision", transform, "cpu", torch.float32)
    try:
        found = score_retrieval(
            model, text, sources, backend, pictures, data.max_image_pixels, skipped, say,
            None if scores is None else Path(scores), world,
        )  # fmt: skip
    finally:
        backend.close()
    head = "itm_head" if model.rank_head is None else "rank_head"
    result = world.together(lambda: {**found.result(), "head": head, "split": said, "skipped": dict(skipped)})
    return {**result, **facts(path, "retrieval", world)}


def _open(path: Path, settings: Sequence[str]) -> tuple[Meter, DataConfig, TextPipeline, Sources, str]:
    """The model, what it reads, and how to call the split."""
    model = meter_fast.load_model(path)
    data = override(_settings_of(path, model), settings).data
    tokenizer = load_tokenizer(tokenizer_of(path, data.tokenizer))
    check_vocabulary(model, tokenizer)
    names, said = _what(data, settings)
    sources = open_sources(names, data.root, data.val_split)
    text = TextPipeline(tokenizer, min(data.max_text_length, model.config.text.max_length))
    return model, data, text, sources, said


def _what(data: DataConfig, settings: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """The sources to score on, and how to call them."""
    own = () if any(text.startswith("data.val_sources=") for text in settings) else parted(data, data.val_split)
    return (own, data.val_split) if own else held_out_names(data, data.val_split)


def _settings_of(path: Path, model: Meter) -> RunConfig:
    """The resolved recipe of a run directory, which must have trained a head to rank by; for anything else that of
    fine-tuning on retrieval or of pre-training."""
    if not (path / "run.json").is_file():
        return resolve(["pretrain" if model.rank_head is None else "retrieval_f30k"])
    config = from_dict(RunConfig, read_json(path / "config.json"))
    if not {"itm", "retrieval"} & set(config.objectives.names):
        raise ValueError(
            f"{path} was trained on objectives.names={','.join(config.objectives.names)}: retrieval ranks by the ITM "
            "head, which only itm trains, or by the rank head, which only retrieval trains"
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
        f"ranked by {result['head']}; split {result['split']}: {result['pictures']:,} pictures, "
        f"{result['captions']:,} captions, {result['different_captions']:,} of them different; skipped "
        f"{result['skipped'] or 'none'}",
    ]
