"""Captions of a split on the command line: the official file, scores, what is refused; and the recipe."""

import json
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from fine_tuned import damaged_table, write_caption_run

import meter_fast
from meter_fast.cli import main
from meter_fast.config import DataConfig
from meter_fast.data.images import image_transform, open_backend
from meter_fast.data.sources import open_sources
from meter_fast.data.tokenizer import load_tokenizer
from meter_fast.evaluate_caption import captioned_names, good_captions
from meter_fast.predict import caption
from meter_fast.recipes import resolve
from meter_fast.submission import NO_PICTURE

HAS_PACKAGE = find_spec("pycocoevalcap") is not None


@pytest.fixture
def run(tmp_path: Path, scenes: Path) -> Path:
    return write_caption_run(tmp_path / "run", scenes)


def captions_one_by_one(run: Path, root: Path, table: str, beams: int) -> list[str]:
    """Of every picture of a table, each by itself."""
    model, tokenizer = meter_fast.load_model(run), load_tokenizer(run / "tokenizer")
    backend = open_backend("torchvision", image_transform("clip", 64), "cpu", torch.float32)
    pictures = pa.ipc.open_file(str(root / f"{table}.arrow")).read_all().column("image").to_pylist()
    texts = []
    for data in pictures:
        with torch.inference_mode():
            image = model.encode_image(backend.decode([np.frombuffer(data, np.uint8)]))
        texts += caption(model, tokenizer, image, beams, 40)
    return texts


@pytest.mark.parametrize("beams", [1, 3])
def test_command_line(run: Path, scenes: Path, tmp_path: Path, capsys, beams: int) -> None:
    """Every picture has the caption that it gets alone; the held-out table of the recipe without a name."""
    scores = tmp_path / "scores.json"
    more = [] if beams == 1 else ["--beams", str(beams)]
    assert main(["evaluate", str(run), "caption", *more, "--json", str(scores)]) == 0
    said, told = capsys.readouterr().out, json.loads(scores.read_text())
    file = run / "captions-coco_caption_karpathy_val.json"
    rows = json.loads(file.read_text(encoding="utf-8"))
    expected = captions_one_by_one(run, scenes, "coco_caption_karpathy_val", beams)
    assert rows == [{"image_id": n, "caption": text} for n, text in enumerate(expected)]
    assert len(set(expected)) > 3 and len(expected) == 20
    assert told["captions"] == {"file": str(file), "pictures": 20, "filled": 0, "numbered": True}
    assert (told["task"], told["beams"], told["world_size"], told["pictures"]) == ("caption", beams, 1, 20)
    assert told["tables"] == ["coco_caption_karpathy_val.arrow"] and told["model"] == str(run)
    assert f"{file}: 20 captions; no COCO names: image_id counts" in said
    assert ("caption" in told) == HAS_PACKAGE
    assert ("CIDEr" in said and "METEOR and SPICE take Java" in said) if HAS_PACKAGE else ("[caption]" in said)


def test_without_the_package_the_file_is_written(run: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    assert main(["evaluate", str(run), "caption", "--captions", str(tmp_path / "c.json"), "--pictures", "4"]) == 0
    assert "not scored: pycocoevalcap is not installed: pip install 'meter-fast[caption]'" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "c.json").read_text())) == 4


@pytest.fixture
def named(scenes: Path, tmp_path: Path) -> Path:
    """The test table with COCO's names, a caption twice and one of no text, and one picture cut off."""
    root = tmp_path / "named"
    root.mkdir()
    path = damaged_table(scenes / "coco_caption_karpathy_test.arrow", root / "coco_caption_karpathy_test.arrow", (1,))
    table = pa.ipc.open_file(str(path)).read_all().slice(0, 6)
    captions = table.column("caption").to_pylist()
    captions[0] = [captions[0][0], captions[0][0], "  "]
    names = [f"COCO_val2014_{900 - n:012d}.jpg" for n in range(6)]
    for column, values in (("caption", pa.array(captions, pa.list_(pa.string()))), ("image_id", pa.array(names))):
        table = table.set_column(table.schema.get_field_index(column), column, values)
    path.unlink()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return root


def test_numbers_are_those_of_the_names(run: Path, named: Path, tmp_path: Path, capsys) -> None:
    settings = ["data.val_split=test", f"data.root={named}", "data.max_bad_share=1"]
    command = ["evaluate", str(run), "caption", *settings, "--captions", str(tmp_path / "c.json")]
    assert main([*command, "--json", str(tmp_path / "scores.json")]) == 0
    rows = json.loads((tmp_path / "c.json").read_text())
    assert [row["image_id"] for row in rows] == [900, 899, 898, 897, 896, 895]
    assert [row["caption"] == NO_PICTURE for row in rows] == [n == 1 for n in range(6)]
    told = json.loads((tmp_path / "scores.json").read_text())
    assert told["captions"]["filled"] == 1 and not told["captions"]["numbered"] and told["split"] == "test"
    assert told["skipped"]["empty caption"] == 1 and sum(told["skipped"].values()) == 2
    said = capsys.readouterr().out
    assert "split test (coco_caption_karpathy_test.arrow), 6 pictures" in said
    assert "6 captions, 1 of them unreadable" in said and "no COCO names" not in said


def test_all_captions_of_a_picture_are_its_references(named: Path) -> None:
    """Repeated ones too, as the official script has them, though training leaves them out."""
    sources = open_sources(["arrow:coco_caption_karpathy_test"], named)
    assert sources.tables[0].duplicates == 1
    for index in range(len(sources)):
        name, texts = sources.picture(index)
        picture = int(sources.image_ids(np.array([index]))[0])
        assert name == f"COCO_val2014_{900 - picture:012d}.jpg" and sources.read(index).text in texts
    _, texts = sources.picture(0)
    assert len(texts) == 3 and texts[0] == texts[1]
    skipped: Counter = Counter()
    assert good_captions(texts, skipped) == texts[:2] and skipped == {"empty caption": 1}


@pytest.mark.parametrize(
    ("data", "settings", "expected"),
    [
        ({"sources": ("coco",), "val_sources": ("arrow:v",)}, [], (("arrow:v",), "arrow:v")),
        ({"sources": ("coco",), "val_sources": ("arrow:v",), "val_split": "test"}, [], (("coco",), "test")),
        (
            {"sources": ("coco",), "val_sources": ("arrow:v",), "val_split": "test"},
            ["data.val_sources=arrow:v"],
            (("arrow:v",), "arrow:v"),
        ),
        ({"sources": ("arrow:t",), "val_sources": ("arrow:v",), "val_split": "test"}, [], (("arrow:v",), "arrow:v")),
    ],
)
def test_which_pictures(data: dict, settings: list[str], expected: tuple) -> None:
    assert captioned_names(DataConfig(**data), settings) == expected


def test_recipe() -> None:
    base, tiny = resolve(["caption"]), resolve(["caption", "size=tiny"])
    for config in (base, tiny):
        assert config.objectives.names == ("caption",) and config.data.tokenizer == "init"
        assert config.data.sources == ("coco",) and config.data.val_sources == ("arrow:coco_caption_karpathy_val",)
        assert config.model.decoder.layers and not config.model.mlm_head and not config.model.itm_head
    assert base.model.vision.image_size == 384 and base.model.text.weights is None
    before = resolve(["pretrain", "fusion=encoder_decoder", "vision=clip_l14_224"]).model
    changed = resolve(["caption", "vision=clip_l14_224"]).model
    assert changed.vision.image_size == 378 and changed.vision.width == before.vision.width
    assert changed.fusion == before.fusion and changed.decoder == before.decoder
