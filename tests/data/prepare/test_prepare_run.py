"""Tables from raw files: what is missing or broken is told, what others wrote is left alone, memory stays flat."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pytest
from making import BAD_PICTURES, picture
from raw_sets import MAKERS, put

from meter_fast.cli import main
from meter_fast.data.prepare import PrepareError, caption_sets, carry_out, plan_set
from meter_fast.data.tables import ArrowCaptions

TRAIN = "coco_caption_karpathy_train.arrow"


def name_of(number: int) -> str:
    return f"COCO_train2014_{number:012d}.jpg"


def big_coco(raw: Path, pictures: int = 40) -> Path:
    """COCO with these training pictures, two captions each."""
    images = []
    for number in range(pictures):
        texts = [{"raw": f"picture {number}"}, {"raw": f"again picture {number}, café"}]
        images.append({"filename": name_of(number), "split": "train", "sentences": texts})
        put(raw / "train2014" / name_of(number), picture(number))
    put(raw / "karpathy" / "dataset_coco.json", {"images": images, "dataset": "coco"})
    return raw


def prepare(name: str, raw: Path, out: Path, *options: str) -> int:
    return main(["data", "prepare", name, str(raw), str(out), "--workers", "1", *options])


def ids(path: Path) -> list[str]:
    with pa.memory_map(str(path)) as mapped:
        return pa.ipc.open_file(mapped).read_all()["image_id"].to_pylist()


def manifest_of(out: Path, name: str = "coco") -> dict:
    return json.loads((out / f"{name}.manifest.json").read_text())


def leftovers(out: Path) -> list[str]:
    return [path.name for path in out.iterdir() if path.name.startswith(".") or path.name.endswith(".arrow")]


def test_missing_broken_and_double_pictures_are_left_out_and_told_by_cause(tmp_path, capsys):
    raw = big_coco(tmp_path / "raw")
    (raw / "train2014" / name_of(3)).unlink()
    found_by_header = {cause: content for cause, content in BAD_PICTURES.items() if cause != "undecodable"}
    for number, content in enumerate(found_by_header.values(), 10):
        put(raw / "train2014" / name_of(number), content)
    (raw / "train2014" / name_of(20)).unlink()
    (raw / "train2014" / name_of(20)).mkdir()  # a folder where a picture should be
    put(raw / "val2014" / name_of(30), picture(1))
    assert prepare("coco", raw, tmp_path / "out", "--splits", "train", "--max-missing", "0.2") == 0
    printed = capsys.readouterr().out
    table = TRAIN.removesuffix(".arrow")
    assert f"train: left out 1 missing, first {raw}/train2014/{name_of(3)}" in printed
    assert f"train: left out 1 duplicate name, first {raw}/val2014/{name_of(30)}" in printed
    for number, cause in enumerate(found_by_header, 10):
        assert f"{table}: left out 1 {cause}, first {raw}/train2014/{name_of(number)}" in printed
    assert f"{table}: left out 1 unreadable" in printed
    gone = {3, 10, 11, 12, 20}
    assert ids(tmp_path / "out" / TRAIN) == [name_of(n) for n in range(40) if n not in gone]
    listed = (tmp_path / "out" / "coco.train.missing.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["missing", "duplicate name", *found_by_header, "unreadable"]
    assert manifest_of(tmp_path / "out")["tables"][table]["rows"] == 35


@pytest.mark.parametrize(("gone", "share", "passes"), [(4, "0.1", True), (5, "0.1", False), (40, "1", False)])
def test_too_many_missing_pictures_are_an_error_before_anything_is_written(tmp_path, capsys, gone, share, passes):
    raw = big_coco(tmp_path / "raw")
    for number in range(gone):
        (raw / "train2014" / name_of(number)).unlink()
    code = prepare("coco", raw, tmp_path / "out", "--splits", "train", "--max-missing", share)
    assert code == (0 if passes else 2)
    if not passes:
        error = capsys.readouterr().err
        assert f"{gone} of 40 pictures cannot be used (missing {gone}; first {raw}/train2014/{name_of(0)}" in error
        assert not (tmp_path / "out").exists()


def test_too_many_broken_pictures_end_the_table_and_leave_nothing_of_it(tmp_path, capsys):
    raw = big_coco(tmp_path / "raw")
    for number in (5, 6, 7):
        put(raw / "train2014" / name_of(number), b"")
    assert prepare("coco", raw, tmp_path / "out", "--splits", "train", "--max-missing", "0.05") == 2
    assert "3 of 40 pictures cannot be used (zero bytes 3; first" in capsys.readouterr().err
    assert leftovers(tmp_path / "out") == []


def test_several_processes_write_the_same_files_as_one(tmp_path):
    raw = big_coco(tmp_path / "raw", 100)
    put(raw / "train2014" / name_of(50), b"no picture")
    plan = plan_set("coco", raw, ["train"])
    for workers in (1, 3):
        carry_out(plan, tmp_path / str(workers), workers=workers, max_missing=0.1, batch_bytes=3000, say=print)
    one, three = ((tmp_path / str(workers) / TRAIN).read_bytes() for workers in (1, 3))
    assert one == three
    assert (tmp_path / "1" / "coco.train.missing.txt").read_text() == (
        tmp_path / "3" / "coco.train.missing.txt"
    ).read_text()


def test_record_batches_are_bounded_so_that_memory_stays_flat(tmp_path):
    raw = big_coco(tmp_path / "raw")
    carry_out(plan_set("coco", raw, ["train"]), tmp_path / "out", batch_bytes=2000, say=print)
    with pa.memory_map(str(tmp_path / "out" / TRAIN)) as mapped:
        opened = pa.ipc.open_file(mapped)
        batches = [opened.get_batch(number) for number in range(opened.num_record_batches)]
        largest = max(len(picture(n)) for n in range(40))
        for batch in batches:
            assert sum(len(one) for one in batch["image"].to_pylist()) < 2000 + largest
        assert len(batches) > 3 and sum(batch.num_rows for batch in batches) == 40
    pairs = ArrowCaptions([tmp_path / "out" / TRAIN])
    assert pairs.read(79).text == "again picture 39, café" and bytes(pairs.read(79).image) == picture(39)


def test_the_manifest_has_counts_hashes_and_versions(tmp_path):
    raw, out = big_coco(tmp_path / "raw"), tmp_path / "out"
    assert prepare("coco", raw, out, "--splits", "train") == 0
    manifest = manifest_of(out)
    entry = manifest["tables"][TRAIN.removesuffix(".arrow")]
    content = (out / TRAIN).read_bytes()
    assert entry["sha256"] == hashlib.sha256(content).hexdigest() and entry["size"] == len(content)
    annotations = hashlib.sha256((raw / "karpathy" / "dataset_coco.json").read_bytes()).hexdigest()
    assert manifest["annotations"] == {"dataset_coco.json": annotations}
    assert manifest["complete"] and manifest["wanted"] == {"train": 40}
    assert manifest["versions"]["pyarrow"] == pa.__version__


def test_tables_of_others_and_of_other_raw_files_are_never_written_over(tmp_path, capsys):
    raw, out = big_coco(tmp_path / "raw"), tmp_path / "out"
    put(out / TRAIN, b"a table of someone else")
    assert prepare("coco", raw, out, "--splits", "train") == 2
    assert "was not written by this command" in capsys.readouterr().err
    assert (out / TRAIN).read_bytes() == b"a table of someone else"
    (out / TRAIN).unlink()
    assert prepare("coco", raw, out, "--splits", "train") == 0
    written = (out / TRAIN).read_bytes()
    (raw / "train2014" / name_of(0)).rename(tmp_path / "away")
    capsys.readouterr()
    assert prepare("coco", raw, out, "--splits", "train", "--max-missing", "0.1") == 2
    assert "other pictures were there" in capsys.readouterr().err
    (tmp_path / "away").rename(raw / "train2014" / name_of(0))
    assert prepare("coco", raw, out, "--splits", "train") == 0
    big_coco(raw, 41)
    capsys.readouterr()
    assert prepare("coco", raw, out, "--splits", "train") == 2
    assert "written from another dataset_coco.json" in capsys.readouterr().err
    assert (out / TRAIN).read_bytes() == written
    (out / TRAIN).unlink()
    assert prepare("coco", raw, out, "--splits", "train") == 0
    assert len(ids(out / TRAIN)) == 41


def test_splits_can_be_written_one_after_another(tmp_path):
    MAKERS["coco"](tmp_path / "raw")
    for splits in ("val", "test,train"):
        assert prepare("coco", tmp_path / "raw", tmp_path / "out", "--splits", splits) == 0
    manifest = manifest_of(tmp_path / "out")
    assert {name.split("_")[-1] for name in manifest["tables"]} == {"val", "test", "train"} == set(manifest["wanted"])


def test_the_sets_from_the_web_are_cut_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(caption_sets, "PICTURES_A_FILE", 2)
    pairs = []
    for number in range(5):
        inner = f"images_train/{number:04d}/{number:04d}000"
        pairs.append([inner, f"caption {number}"])
        put(tmp_path / "raw" / inner, picture(number))
    put(tmp_path / "raw" / "images_train" / "0009" / "0001000", picture(99))
    put(tmp_path / "raw" / "annot.json", [*pairs, ["http://dead.link/0007000", "nobody has it"], ["x", "half \ud83d"]])
    put(tmp_path / "raw" / "images_train" / "0009" / "x", picture(7))
    assert prepare("sbu", tmp_path / "raw", tmp_path / "out") == 0
    tables = [tmp_path / "out" / f"sbu_{number}.arrow" for number in range(3)]
    assert [ids(table) for table in tables] == [["0000000", "0001000"], ["0002000", "0003000"], ["0004000", "x"]]
    assert ArrowCaptions(tables).read(5).text == "half ?"
    listed = (tmp_path / "out" / "sbu.train.missing.txt").read_text()
    assert "missing\t0007000\t" in listed and "duplicate name" in listed and "0009/0001000" in listed


def test_vqa_labels_are_those_given_nine_times_whatever_split_is_written(tmp_path):
    MAKERS["vqav2"](tmp_path / "raw")
    assert prepare("vqav2", tmp_path / "raw", tmp_path / "out", "--splits", "val,test") == 0
    answers = json.loads((tmp_path / "out" / "vqav2_answers.json").read_text())
    assert answers == ["no", "2", "black and white", "yes"]
    notes = manifest_of(tmp_path / "out", "vqav2")["notes"]
    assert notes == {"answers": 4, "questions of val without a label, left out": 1}
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.arrow")) == [
        "vqav2_rest_val",
        "vqav2_test",
        "vqav2_trainable_val",
        "vqav2_val",
    ]


def test_the_last_thousand_pictures_of_val_are_apart(tmp_path, monkeypatch):
    from meter_fast.data.prepare import question_sets

    monkeypatch.setattr(question_sets, "REST_VAL", 1)
    MAKERS["vqav2"](tmp_path / "raw")
    carry_out(plan_set("vqav2", tmp_path / "raw", ["val"]), tmp_path, batch_bytes=1, say=print)
    assert [ids(tmp_path / f"vqav2_{name}.arrow") for name in ("val", "trainable_val", "rest_val")] == [
        [4, 5],
        [4],
        [5],
    ]
    (tmp_path / "vqav2_val.arrow").unlink()  # what was cut from it would not fit a new one
    with pytest.raises(PrepareError, match=r"vqav2_trainable_val\.arrow was written when other pictures"):
        carry_out(plan_set("vqav2", tmp_path / "raw", ["val"]), tmp_path, say=print)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, "no karpathy/dataset_coco.json or dataset_coco"),
        (lambda path: put(path, '{"images": [{"filename": '), "download it again"),
        (lambda path: put(path, {"pictures": []}), "no 'images' in it, but 'pictures'"),
        (lambda path: put(path, {"images": [{"file": 1}]}), "no 'filename' in"),
        (lambda path: put(path, {"images": []}), "not one picture is named"),
        (lambda path: put(path, {"images": [1]}), "no 'filename' in 1"),
        (lambda path: put(path, {"images": [{"filename": "a", "split": "train", "sentences": 3}]}), "expected form"),
    ],
)
def test_wrong_annotations_are_named(tmp_path, capsys, change, message):
    MAKERS["coco"](tmp_path / "raw")
    change(tmp_path / "raw" / "karpathy" / "dataset_coco.json")
    assert prepare("coco", tmp_path / "raw", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_statement_that_is_there_twice_is_named(tmp_path, capsys):
    MAKERS["nlvr2"](tmp_path / "raw")
    path = tmp_path / "raw" / "nlvr2" / "data" / "dev.json"
    path.write_bytes(2 * path.read_bytes())
    assert prepare("nlvr2", tmp_path / "raw", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "data/dev.json, line 5: dev-0-0-0 is there before" in error and error.count("\n") == 1


def test_wrong_arguments_are_named(tmp_path, capsys):
    for options, message in (
        (["--splits", "train,testing"], "coco has no split 'testing': choose train, val, restval, test"),
        (["--max-missing", "2"], "--max-missing 2: give a share from 0 to 1"),
        (["--workers", "-1"], "--workers -1: give 0 or more"),
    ):
        assert prepare("coco", tmp_path, tmp_path / "out", *options) == 2
        assert message in capsys.readouterr().err


def test_questions_without_annotations_are_an_error(tmp_path):
    MAKERS["vqav2"](tmp_path)
    path = tmp_path / "v2_mscoco_val2014_annotations.json"
    content = json.loads(path.read_text())
    content["annotations"].pop()
    put(path, content)
    with pytest.raises(PrepareError, match="question 78 has no annotation"):
        plan_set("vqav2", tmp_path)
