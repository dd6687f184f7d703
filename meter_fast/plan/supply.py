"""What the training data are: how many samples, and how large a picture is. From the tables where they lie, else as
published.

Knows settings and the data room; nothing of models and machines.
"""

from dataclasses import dataclass

from meter_fast.config import RunConfig
from meter_fast.data.sources import Sources
from meter_fast.plan.options import PlanOptions
from meter_fast.training.tasks import task_of

ASSUMED_KB = 150.0  # of a picture: COCO's train2017 has 118,287 in 18 GB (cocodataset.org)

# Samples by name of the source. Captions: COCO with restval and Visual Genome as Kim et al. 2021 (ViLT), table 1, count
# them, SBU and CC3M there, too (pictures that could be loaded); Karpathy's split of Flickr30k has 29,000 pictures in
# train and 1,014 in val with five captions each. Questions: Goyal et al. 2017, VQA v2.0. Statements: Suhr et al. 2019
# (NLVR2) and Xie et al. 2019 (SNLI-VE).
PUBLISHED = {
    "coco": 567_000,
    "vg": 5_410_000,
    "sbu": 867_000,
    "gcc": 3_010_000,
    "f30k": 150_070,
    "f30k_caption_karpathy_train": 145_000,
    "coco_caption_karpathy_train": 414_113,
    "coco_caption_karpathy_restval": 152_634,
    "vqa": 658_111,
    "vqav2_train": 443_757,
    "nlvr2": 86_373,
    "nlvr2_train": 86_373,
    "snli_ve": 529_527,
    "snli_train": 529_527,
}


@dataclass(frozen=True)
class Supply:
    """samples: of the training data, None where nothing tells. picture_bytes: of one encoded picture. answers: of the
    label space, None where the tables do not tell. said: where the numbers come from."""

    samples: int | None
    picture_bytes: float
    answers: int | None
    said: str


def look_at(config: RunConfig, options: PlanOptions) -> Supply:
    """Raises ValueError for tables that are there and cannot be used."""
    task, opened, answers = task_of(config.objectives.names), None, None
    try:
        opened = task.open_sources(config.data)
    except ValueError as error:
        missing = str(error).splitlines()[0]
    if opened is None:
        samples = options.samples or published(config)
        size = options.picture_kb or ASSUMED_KB
        origin = "given" if options.picture_kb else "assumed"
        told = "given" if options.samples else "as published" if samples else "not known: give samples="
        said = f"no tables ({missing}); samples {told}, {size:g} KB a picture {origin}"
        return Supply(samples, 1e3 * size, None, said)
    if "vqa" in config.objectives.names:
        answers = task.fit(config, opened)[0].model.vqa_answers
    size = 1e3 * options.picture_kb or bytes_a_picture(opened)
    said = f"tables in {config.data.root}: {len(opened):,} samples, {size / 1e3:.3g} KB a picture"
    return Supply(options.samples or len(opened), size, answers, said)


def bytes_a_picture(sources: Sources) -> float:
    """Size of the files over their pictures; texts are a small part of it."""
    size = sum(file.stat().st_size for table in sources.tables for file in table.files)
    return size / sum(table.pictures for table in sources.tables)


def published(config: RunConfig) -> int | None:
    """Samples of the published sets that data.sources names, None where one is not among them."""
    names = [name for source in config.data.sources for name in source.removeprefix("arrow:").split(",")]
    if not all(name in PUBLISHED for name in names):
        return None
    return sum(PUBLISHED[name] for name in names)
