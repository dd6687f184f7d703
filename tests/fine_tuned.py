"""Run directories of small untrained models that answer questions or write captions. Helpers only, no tests."""

import copy
import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import torch
from scene_run import small

from meter_fast.config import override, to_dict
from meter_fast.data.about_pictures import split_loader
from meter_fast.data.answers import Answers, find_answers
from meter_fast.data.batch import VqaBatch
from meter_fast.data.images import image_transform, open_backend
from meter_fast.data.question_tables import open_questions
from meter_fast.data.questions import QuestionAssembler
from meter_fast.data.spans import add_sentinels
from meter_fast.data.text import TextPipeline
from meter_fast.data.tokenizer import load_tokenizer
from meter_fast.models.config import DecoderConfig
from meter_fast.models.export import save_export
from meter_fast.models.heads import AnswerHead
from meter_fast.models.meter import Meter
from meter_fast.recipes import resolve


def answers_of_scenes(scenes: Path) -> Answers:
    """The label space of the drawn questions."""
    return find_answers(open_questions(["vqa"], scenes, "train").tables)


def batches(scenes: Path, tokenizer, answers, size: int, limit: int | None = None, split: str = "val"):
    """The questions of a split."""
    sources = open_questions(["vqa"], scenes, split)
    backend = open_backend("torchvision", image_transform("clip", 64), "cpu", torch.float32)
    assembler = QuestionAssembler(sources, TextPipeline(tokenizer, 40), backend, 0, len(answers), replace=False)
    return list(split_loader(assembler, batch_size=size, limit=limit))


def answering(scenes: Path, tokenizer, model: Meter, answers: Answers) -> Meter:
    """`model` with a head for answers, its biases such that it chooses now this, now that one."""
    model = copy.deepcopy(model)
    torch.manual_seed(4)
    model.mlm_head = model.itm_head = None
    model.vqa_head = AnswerHead(model.config.cls_width, model.config.fusion.width, len(answers))
    model.config = dataclasses.replace(model.config, mlm_head=False, itm_head=False, vqa_answers=len(answers))
    batch: VqaBatch
    (batch,) = batches(scenes, tokenizer, answers, 100)
    with torch.no_grad():
        image, text = model.encode_image(batch.images), model.encode_text(batch.text_ids, batch.text_mask)
        cls = model.fuse(text, image[batch.image_rows], batch.text_mask).cls
        model.vqa_head.out.bias -= model.vqa_head(cls).mean(0)
    assert len(model.vqa_head(cls).argmax(1).unique()) > 5
    return model


def write_vqa_run(folder: Path, scenes: Path, model: Meter, answers: Answers) -> Path:
    """A run directory as fine-tuning on questions leaves it."""
    save_export(model, folder / "export", scenes / "tokenizer", answers=answers.text())
    return _describe(folder, ["vqa", "size=tiny"], scenes, model)


def write_caption_run(folder: Path, scenes: Path) -> Path:
    """A run directory as fine-tuning on captions leaves it; the captions depend on the pictures."""
    tokenizer = load_tokenizer(scenes / "tokenizer")
    add_sentinels(tokenizer, 1)
    torch.manual_seed(0)
    config = dataclasses.replace(small(len(tokenizer)), decoder=DecoderConfig(1, 16), mlm_head=False, itm_head=False)
    model = Meter(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    tokenizer.save_pretrained(folder / "tokenizer")
    save_export(model, folder / "export", folder / "tokenizer")
    return _describe(folder, ["caption", "size=tiny"], scenes, model)


def _describe(folder: Path, recipe: list[str], scenes: Path, model: Meter) -> Path:
    settings = [f"data.root={scenes}", "data.workers=0"]
    config = dataclasses.replace(override(resolve(recipe), settings), model=model.config)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "run.json").write_text(json.dumps({"world_size": 1}))
    return folder


def damaged_table(source: Path, target: Path, rows: tuple[int, ...], column: str = "image") -> Path:
    """The table with the pictures of some rows cut off."""
    table = pa.ipc.open_file(str(source)).read_all()
    pictures = [data[:100] if row in rows else data for row, data in enumerate(table.column(column).to_pylist())]
    place = table.schema.get_field_index(column)
    table = table.set_column(place, column, pa.array(pictures, pa.binary()))
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return target
