"""Files of evaluation servers and official scripts: every question once, numbers of pictures, whole or not at all."""

import json
from pathlib import Path

import numpy as np
import pytest
from golden_cases import GOLDEN

from meter_fast.data.question_tables import open_questions
from meter_fast.submission import (
    NO_PICTURE,
    answer_file,
    caption_file,
    check_place,
    check_questions,
    image_id,
    image_ids,
    write_json,
)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("COCO_val2014_000000000004.jpg", 4),
        ("COCO_train2014_000000581929.jpg", 581929),
        ("000000000139.jpg", 139),
        ("1000092795.jpg", 1000092795),
        (2316003, 2316003),
        ("scene_test_0000003.png", None),
        ("a4.jpg", None),
        ("", None),
        (None, None),
    ],
)
def test_numbers_of_pictures(name: str | int | None, number: int | None) -> None:
    assert image_id(name) == number


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["COCO_val2014_000000000009.jpg", "000000000004.jpg"], ([9, 4], True)),
        (["9.jpg", "dog.jpg"], ([0, 1], False)),  # one without a number: all are counted
        (["9.jpg", "COCO_val2014_000000000009.jpg"], ([0, 1], False)),  # two with the same
        ([None, None, None], ([0, 1, 2], False)),
    ],
)
def test_numbers_of_a_split(names: list, expected: tuple) -> None:
    assert image_ids(names) == expected


def test_rows_of_the_files() -> None:
    assert answer_file(np.array([70, 30, 50]), {0: "red", 2: "two"}, "yes") == [
        {"question_id": 70, "answer": "red"},
        {"question_id": 30, "answer": "yes"},
        {"question_id": 50, "answer": "two"},
    ]
    assert caption_file([4, 9], ["a dog", None]) == [
        {"image_id": 4, "caption": "a dog"},
        {"image_id": 9, "caption": NO_PICTURE},
    ]


def test_question_ids_are_those_of_the_published_tables() -> None:
    for split in ("val", "test"):
        sources = open_questions(["vqa"], GOLDEN / "arrow", split)
        expected = [sources.read(n).question_id for n in range(len(sources))]
        assert check_questions(sources).tolist() == expected and len(expected) > 1
    kept = open_questions(["vqa"], GOLDEN / "arrow", "train", answered_only=True)
    assert np.concatenate([table.question_ids() for table in kept.tables]).tolist() == [
        kept.read(n).question_id for n in range(len(kept))
    ]


def test_a_question_that_is_there_twice_is_refused() -> None:
    twice = open_questions(["arrow:vqav2_val", "arrow:vqav2_val"], GOLDEN / "arrow", "val")
    with pytest.raises(ValueError, match=r"more than once, the first with question_id \d+"):
        check_questions(twice)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    write_json(path, [{"question_id": 1, "answer": "café"}])
    with pytest.raises(TypeError):
        write_json(path, [{"question_id": 1, "answer": {1, 2}}])
    assert json.loads(path.read_text(encoding="utf-8")) == [{"question_id": 1, "answer": "café"}]
    assert [one.name for one in tmp_path.iterdir()] == ["answers.json"]


def test_a_place_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    assert check_place(tmp_path / "new.json") == tmp_path / "new.json"
    with pytest.raises(ValueError, match="is a folder"):
        check_place(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        check_place(tmp_path / "absent" / "new.json")
