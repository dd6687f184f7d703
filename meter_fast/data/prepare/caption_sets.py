"""Pictures with captions from the downloads of COCO, Flickr30k, Visual Genome, Conceptual Captions and SBU.

Knows where these downloads keep files (the folders that ViLT's DATA.md describes) and which columns METER and ViLT make
of them. Each function gives a plan and reads annotations only. Rows are in the order of the pictures' names: the
published writers shuffle them.
"""

import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa

from meter_fast.data.prepare.json_stream import elements
from meter_fast.data.prepare.plan import (
    CAPTION_COLUMNS,
    DUPLICATE,
    MISSING,
    Folders,
    LeftOut,
    Plan,
    PrepareError,
    Row,
    Table,
    field_of,
    first_of,
)

PICTURES_A_FILE = 100_000  # of the sets from the web, as published
GENOME_COLUMNS = pa.schema(
    [
        ("image", pa.binary()),
        ("caption", pa.list_(pa.string())),
        *((name, pa.list_(pa.int64())) for name in ("width", "height", "x", "y")),
        ("image_id", pa.string()),
    ]
)


def coco(raw: Path, splits: Sequence[str]) -> Plan:
    """karpathy/dataset_coco.json with train2014/ and val2014/ -> coco_caption_karpathy_{split}."""
    annotations = first_of(raw, "karpathy/dataset_coco.json", "dataset_coco.json")
    return _karpathy("coco", annotations, [raw / "train2014", raw / "val2014"], splits)


def f30k(raw: Path, splits: Sequence[str]) -> Plan:
    """karpathy/dataset_flickr30k.json with flickr30k-images/ -> f30k_caption_karpathy_{split}."""
    annotations = first_of(raw, "karpathy/dataset_flickr30k.json", "dataset_flickr30k.json")
    return _karpathy("f30k", annotations, [first_of(raw, "flickr30k-images", "flickr30k_images")], splits)


def _karpathy(name: str, annotations: Path, folders: Sequence[Path], splits: Sequence[str]) -> Plan:
    """Captions are the "raw" ones, in the file's order."""
    captions: dict[str, list[str]] = {}
    split_of: dict[str, str] = {}
    for number, (image, _, _) in enumerate(elements(annotations, "images")):
        place = f"picture {number}"
        file = str(field_of(image, "filename", annotations, place))
        split_of[file] = str(field_of(image, "split", annotations, place))
        sentences = field_of(image, "sentences", annotations, place)
        captions.setdefault(file, []).extend(field_of(one, "raw", annotations, place) for one in sentences)
    plan, where = Plan(name, annotations=[annotations]), Folders()
    for split in splits:
        rows, lost = [], []
        for file in sorted(file for file, its in split_of.items() if its == split):
            path = where.find(folders, file, lost)
            if path is not None:
                rows.append(Row((path,), {"caption": captions[file], "image_id": file, "split": split}))
        plan.add_rows(f"{name}_caption_karpathy_{split}", split, CAPTION_COLUMNS, rows, lost)
    return plan


def visual_genome(raw: Path, splits: Sequence[str]) -> Plan:
    """annotations/region_descriptions.json with images/VG_100K/ and images/VG_100K_2/ -> vg: each region's phrase is a
    caption, with its box in pixels. The regions stay in the file until they are written."""
    annotations = first_of(raw, "annotations/region_descriptions.json", "region_descriptions.json")
    folders = [first_of(raw, f"images/{name}", name) for name in ("VG_100K", "VG_100K_2")]
    spans: dict[int, list[tuple[int, int]]] = {}
    for number, (entry, begin, end) in enumerate(elements(annotations)):
        regions = field_of(entry, "regions", annotations, f"entry {number}")
        for image in {field_of(region, "image_id", annotations, f"entry {number}") for region in regions}:
            spans.setdefault(image, []).append((begin, end))
    where, lost, found = Folders(), [], []
    for image in sorted(spans):
        path = where.find(folders, f"{image}.jpg", lost)
        if path is not None:
            found.append((image, path))

    def rows() -> Iterator[Row]:
        with open(annotations, "rb") as file:
            for image, path in found:
                yield Row((path,), {**_regions(file, annotations, image, spans[image]), "image_id": str(image)})

    plan = Plan("vg", annotations=[annotations])
    plan.add(Table("vg", splits[0], GENOME_COLUMNS, [path for _, path in found], rows), lost)
    return plan


def _regions(file: object, path: Path, image: int, spans: Sequence[tuple[int, int]]) -> dict[str, list]:
    """The columns of a picture's regions, in the file's order."""
    regions = []
    for begin, end in spans:
        file.seek(begin)
        regions += [one for one in json.loads(file.read(end - begin))["regions"] if one["image_id"] == image]
    columns = (("caption", "phrase"), ("width", "width"), ("height", "height"), ("x", "x"), ("y", "y"))
    return {name: [field_of(one, key, path, f"picture {image}") for one in regions] for name, key in columns}


def conceptual_captions(raw: Path, splits: Sequence[str]) -> Plan:
    """{split}_annot.json with images_{split}/*/ -> conceptual_caption_{split}_{n}, 100,000 pictures each."""
    plan = Plan("gcc")
    for split in splits:
        _add_web(plan, f"conceptual_caption_{split}", split, first_of(raw, f"{split}_annot.json"), raw)
    return plan


def sbu(raw: Path, splits: Sequence[str]) -> Plan:
    """annot.json with images_train/*/ -> sbu_{n}, 100,000 pictures each."""
    plan = Plan("sbu")
    _add_web(plan, "sbu", splits[0], first_of(raw, "annot.json"), raw)
    return plan


def _add_web(plan: Plan, name: str, split: str, annotations: Path, raw: Path) -> None:
    """A list of [path, caption], matched to files by their names alone. Rows by folder, then name."""
    captions: dict[str, str] = {}
    for number, (pair, _, _) in enumerate(elements(annotations)):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, str) for one in pair)):
            raise PrepareError(f"{annotations}, entry {number}: {str(pair)[:80]} is no [path, caption]")
        captions[pair[0].rpartition("/")[2]] = pair[1]
    folder = first_of(raw, f"images_{split}")
    waiting, lost, found = set(captions), [], []
    for inner in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()):
        for file in sorted(os.listdir(folder / inner)):
            if file in waiting:
                waiting.remove(file)
                found.append(f"{inner}/{file}")
            elif file in captions:
                lost.append(LeftOut(f"{folder}/{inner}/{file}", DUPLICATE, "another folder has it, too"))
    lost += [LeftOut(file, MISSING) for file in sorted(waiting)]
    plan.annotations.append(annotations)
    plan.wanted[split] = len(captions)
    plan.left_out[split] = lost

    def rows(files: Sequence[str]) -> Iterator[Row]:
        for file in files:
            own = file.rpartition("/")[2]
            yield Row((f"{folder}/{file}",), {"caption": [captions[own]], "image_id": own, "split": split})

    for number, begin in enumerate(range(0, len(found), PICTURES_A_FILE)):
        files = found[begin : begin + PICTURES_A_FILE]
        plan.tables.append(Table(f"{name}_{number}", split, CAPTION_COLUMNS, files, partial(rows, files)))
