"""Small tables, shards, pictures and loaders for the tests of reading and loading. Helpers only, no tests."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from meter_fast.data.images import image_transform, open_backend
from meter_fast.data.loader import PretrainLoader
from meter_fast.data.order import SampleOrder
from meter_fast.data.sources import Sources, open_sources
from meter_fast.data.text import TextPipeline

SIDE = 8  # pictures of the tests, in pixels
WORDS = "a red blue green small large circle square left right of above below two three one on white ground".split()  # noqa: SIM905 (shorter so)


def picture(number: int, kind: str = "PNG", side: int = SIDE) -> bytes:
    """An encoded picture that no other number gives."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def caption(number: int) -> str:
    """A caption of 5 to 14 words, different for each number."""
    chance = np.random.default_rng(number)
    return " ".join(chance.choice(WORDS, chance.integers(5, 14))) + f" {number}"


def table_of(images: list, captions: list) -> pa.Table:
    """A caption table with the published columns."""
    return pa.table(
        {
            "image": pa.array(images, pa.binary()),
            "caption": pa.array(captions, pa.list_(pa.string())),
            "image_id": [f"{n}.jpg" for n in range(len(images))],
            "split": ["train"] * len(images),
        }
    )


def write_table(path: Path, table: pa.Table, rows_per_batch: int | None = None, **options) -> Path:
    """Write as the published writers do (Arrow IPC file)."""
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer,
    ):
        writer.write_table(table, max_chunksize=rows_per_batch)
    return path


def write_pairs(path: Path, pictures: int, captions_each: int = 1, first: int = 0) -> Path:
    """A table of sound pictures first..first+pictures-1, captions numbered on."""
    images = [picture(first + n) for n in range(pictures)]
    texts = [[caption((first + n) * captions_each + k) for k in range(captions_each)] for n in range(pictures)]
    return write_table(path, table_of(images, texts))


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A shard with these members, in this order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pair_members(number: int) -> list[tuple[str, bytes]]:
    """The three members of one pair as img2dataset writes them."""
    key = f"{number:09d}"
    text = caption(number)
    return [
        (f"{key}.jpg", picture(number)),
        (f"{key}.txt", text.encode()),
        (f"{key}.json", f'{{"caption": "{text}", "key": "{key}"}}'.encode()),
    ]


def sources_of(folder: Path, images: list[bytes], captions: list[list[str]]) -> Sources:
    """Sources over one table of these rows."""
    write_table(folder / "own.arrow", table_of(images, captions))
    return open_sources(["arrow:own"], folder)


def backend():
    """The CPU image back end at the size of the test pictures, so that pixels come through unchanged."""
    return open_backend("torchvision", image_transform("clip", SIDE), "cpu", torch.float32)


def loader_of(sources: Sources, tokenizer, *, global_batch: int, seed: int = 3, **options) -> PretrainLoader:
    """A loader with small defaults; `options` as PretrainLoader's."""
    negatives = options.get("negatives", "batch")
    order = SampleOrder(
        sources.sizes,
        seed,
        global_batch,
        weights=sources.weights,
        image_ids=sources.image_ids if negatives == "batch" else None,
    )
    options = {"micro_batch": global_batch, "workers": 0, "max_bad_share": 0.9} | options
    return PretrainLoader(sources, order, TextPipeline(tokenizer, max_length=16), backend(), seed=seed, **options)


# Each is found by another check; "undecodable" only by decoding (sound header and end, no pixels between).
BAD_PICTURES = {
    "zero bytes": b"",
    "not an image": b"<html>404 not found</html>" * 20,
    "truncated": picture(1000)[:150],
    "undecodable": picture(1001)[:43] + b"\x00" * 80 + picture(1001)[-12:],
}


def rows_of(batches):
    """What each pair of some micro-batches amounts to, free of padding and numbering: comparable between divisions."""
    rows = []
    for batch in batches:
        length = batch.text_ids.shape[1]
        images = torch.cat([batch.images] + ([] if batch.false_images is None else [batch.false_images]))
        for pair in range(len(batch)):
            real = batch.text_mask[pair]
            here = (batch.masked_rows // length) == pair
            rows.append(
                (
                    int(batch.sample_ids[pair]),
                    batch.text_ids[pair][real].tolist(),
                    batch.masked_ids[pair][real].tolist(),
                    (batch.masked_rows[here] % length).tolist(),
                    batch.masked_labels[here].tolist(),
                    int(batch.itm_labels[pair]),
                    batch.images[pair].numpy().tobytes(),
                    images[batch.itm_images[pair]].numpy().tobytes(),
                )
            )
    return rows


def global_batches(sources, tokenizer, steps, *, world=1, **options):
    """The global batches of a range of steps, put together from all ranks in the order of their positions."""
    loaders = [loader_of(sources, tokenizer, rank=rank, world=world, **options) for rank in range(world)]
    together = []
    for parts in zip(*(loader.steps(*steps) for loader in loaders), strict=True):
        micro = [batch for several in zip(*parts, strict=True) for batch in several]  # a * W + r
        together.append(rows_of(micro))
    return together, loaders
