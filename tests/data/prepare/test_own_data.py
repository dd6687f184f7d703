"""A user's own pictures and texts become tables that training reads; rows that cannot be used are named by line."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pytest
from making import BAD_PICTURES, picture
from raw_sets import jsonl, put

from meter_fast.cli import main
from meter_fast.data.answers import find_answers, read_answers
from meter_fast.data.question_tables import open_questions
from meter_fast.data.sources import open_sources


def write(path: Path, rows: list[dict]) -> Path:
    """As CSV or JSONL, by the name."""
    if path.suffix == ".jsonl":
        return put(path, jsonl(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def pictures(folder: Path, count: int = 6) -> Path:
    for number in range(count):
        put(folder / f"{number}.png", picture(number))
    return folder


def run(kind: str, source: Path, out: Path, *options: str) -> int:
    return main(["data", "import", kind, str(source), str(out), "--workers", "1", *options])


CAPTIONS = [
    {"image": "0.png", "caption": "first, of 0"},
    {"image": "1.png", "caption": 'a "quoted" one\non two lines'},
    {"image": "0.png", "caption": "  second of 0 "},
    {"image": "sub/2.png", "caption": "é\U0001f600"},
]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_captions_are_read_back_as_a_source(tmp_path, suffix, capsys):
    put(pictures(tmp_path / "own") / "sub" / "2.png", picture(2))
    write(tmp_path / "own" / f"mine{suffix}", CAPTIONS)
    assert run("captions", tmp_path / "own", tmp_path / "out") == 0
    assert "data.sources=arrow:mine" in capsys.readouterr().out
    pairs = open_sources(["arrow:mine"], tmp_path / "out")
    found = [(pairs.read(n).text, bytes(pairs.read(n).image)) for n in range(len(pairs))]
    assert found == [
        ("first, of 0", picture(0)),
        ("second of 0", picture(0)),
        ('a "quoted" one\non two lines', picture(1)),
        ("é\U0001f600", picture(2)),
    ]


def test_columns_and_types_are_the_published_ones(tmp_path):
    write(pictures(tmp_path) / "mine.csv", CAPTIONS[:3])
    assert run("captions", tmp_path / "mine.csv", tmp_path / "out") == 0
    with pa.memory_map(str(tmp_path / "out" / "mine.arrow")) as mapped:
        table = pa.ipc.open_file(mapped).read_all()
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("image", "binary"),
        ("caption", "list<item: string>"),
        ("image_id", "string"),
        ("split", "string"),
    ]
    assert table["image_id"].to_pylist() == ["0.png", "1.png"] and set(table["split"].to_pylist()) == {"train"}


def test_retrieval_has_a_table_for_each_split(tmp_path, capsys):
    rows = [
        {"image": "0.png", "caption": ["one", "two"], "split": "train"},
        {"image": "1.png", "caption": "three", "split": "test"},
        {"image": "1.png", "caption": "four", "split": "test"},
        {"image": "0.png", "caption": "five", "split": "test"},
    ]
    write(pictures(tmp_path / "images").parent / "list.jsonl", rows)
    options = ("--images", str(tmp_path / "images"), "--name", "mine")
    assert run("retrieval", tmp_path / "list.jsonl", tmp_path / "out", *options) == 0
    assert "1 pictures that are in more than one split" in capsys.readouterr().out
    for split, texts in (("train", ["one", "two"]), ("test", ["three", "four", "five"])):
        pairs = open_sources([f"arrow:mine_{split}"], tmp_path / "out")
        assert [pairs.read(n).text for n in range(len(pairs))] == texts
    assert pairs.image_ids(range(3)).tolist() == [0, 0, 1]


QUESTIONS = [
    {"image": "0.png", "question": "what colour?", "answer": "red", "split": "train"},
    {"image": "1.png", "question": "how many?", "answer": "two", "split": "train"},
    {"image": "0.png", "question": "what shape?", "answer": "a circle", "split": "train"},
    {"image": "2.png", "question": "what colour?", "answer": "red", "split": "val"},
    {"image": "3.png", "question": "which?", "answer": "", "split": "test"},
]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_questions_are_read_back_with_their_answers(tmp_path, suffix):
    write(pictures(tmp_path / "own") / f"mine{suffix}", QUESTIONS)
    assert run("vqa", tmp_path / "own", tmp_path / "out") == 0
    train = open_questions(["arrow:mine_train"], tmp_path / "out")
    found = [train.read(n) for n in range(len(train))]
    assert [(one.text, one.question_id, one.answers, one.labels, one.scores) for one in found] == [
        ("what colour?", 0, ("red",), (0,), (1.0,)),
        ("what shape?", 2, ("a circle",), (2,), (1.0,)),
        ("how many?", 1, ("two",), (1,), (1.0,)),
    ]
    test = open_questions(["arrow:mine_test"], tmp_path / "out")
    assert test.read(0).question_id == 4 and test.read(0).answers == ()
    answers = read_answers(tmp_path / "out" / "answers.json")
    assert answers.names == ("red", "two", "a circle")
    assert find_answers(train.tables, str(tmp_path / "out" / "answers.json")) == answers


def test_answers_of_several_people_score_as_in_vqav2_and_rare_ones_have_no_label(tmp_path, capsys):
    given = ["red"] * 5 + ["dark red"] * 3 + ["pink"] * 2
    rows = [
        {"image": "0.png", "question": "ten people", "answers": "|".join(given), "question_id": "17"},
        {"image": "1.png", "question": "two people", "answers": "pink| red", "question_id": "4"},
        {"image": "1.png", "question": "a rare one", "answers": "green", "question_id": "5"},
    ]
    write(pictures(tmp_path) / "mine.csv", rows)
    assert run("vqa", tmp_path, tmp_path / "out", "--min-count", "2") == 0
    assert "1 questions without a label, left out" in capsys.readouterr().out
    mine = open_questions(["arrow:mine"], tmp_path / "out")
    assert [(mine.read(n).question_id, mine.read(n).answers, mine.read(n).scores) for n in range(2)] == [
        (17, ("red", "dark red", "pink"), (1.0, 0.9, 0.6)),
        (4, ("pink", "red"), (1.0, 1.0)),
    ]
    again = ("--answers", str(tmp_path / "out" / "answers.json"), "--name", "more")
    assert run("vqa", tmp_path, tmp_path / "out", *again) == 0
    more = open_questions(["arrow:more"], tmp_path / "out")
    assert [more.read(n).labels for n in range(len(more))] == [(0, 1, 2), (2, 0)]


def test_another_list_of_answers_is_not_written_over(tmp_path, capsys):
    write(pictures(tmp_path / "own") / "mine.csv", QUESTIONS)
    put(tmp_path / "out" / "answers.json", ["yes", "no"])
    assert run("vqa", tmp_path / "own", tmp_path / "out") == 2
    assert "answers.json is there with other content" in capsys.readouterr().err


BAD_ROWS = [
    ({"image": "9.png"}, "mine.jsonl line 2: no such picture, '9.png' in"),
    ({"image": ""}, "line 2: no such picture"),
    ({"caption": " "}, "line 2: empty caption"),
    ({"caption": ["good", "\u200b"]}, "line 2: empty caption"),
    ({"caption": "half \ud83d"}, "line 2: not UTF-8"),
    ({"caption": {"en": "no"}}, 'line 2: wrong field, {"en": "no"} where a text should be'),
    ({"split": "a/b"}, "line 2: wrong field, split 'a/b'"),
    ({"split": None}, "line 2: wrong field, no split"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ROWS)
def test_rows_that_cannot_be_used_are_named_by_line(tmp_path, capsys, change, message):
    rows = [{"image": f"{n}.png", "caption": f"text {n}", "split": "train"} for n in range(4)]
    rows[1] = {**rows[1], **change}
    write(pictures(tmp_path / "own") / "mine.jsonl", rows)
    assert run("retrieval", tmp_path / "own", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and "1 of 4 rows cannot be used" in error
    assert not (tmp_path / "out").exists()
    assert run("retrieval", tmp_path / "own", tmp_path / "out", "--max-bad-share", "0.3") == 0
    assert "left out 1" in capsys.readouterr().out
    assert len(open_sources(["arrow:mine_train"], tmp_path / "out")) == 3


def test_rows_of_questions_that_cannot_be_used_are_named(tmp_path, capsys):
    rows = [{"image": f"{n}.png", "question": "what?", "answer": "x", "question_id": n} for n in range(6)]
    rows[1]["answer"] = ""
    rows[2]["question_id"] = 0
    rows[3]["question_id"] = "three"
    rows[4]["question"] = ["two", "questions"]
    write(pictures(tmp_path / "own") / "mine.jsonl", rows)
    assert run("vqa", tmp_path / "own", tmp_path / "out") == 2
    error = capsys.readouterr().err
    for message in (
        "line 2: no answer, others have one",
        "line 3: wrong field, question_id 0 is there twice",
        "line 4: wrong field, question_id 'three' is no whole number",
        "line 5: wrong field, 2 questions in one row",
    ):
        assert message in error


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mine.csv", "picture,caption\n0.png,x\n", "no column 'image'; captions has the columns image, caption"),
        ("mine.csv", "image,caption\n0.png,x,y\n", "mine.csv line 2: not as many fields as columns"),
        ("mine.csv", "image,caption\n0.png\n", "mine.csv line 2: not as many fields"),
        ("mine.csv", 'image,caption\n0.png,"x\n', "no CSV"),
        ("mine.csv", b"image,caption\n0.png,\xff\n", "not UTF-8"),
        ("mine.csv", "image,caption\n", "has no rows"),
        ("mine.csv", "", "here are none"),
        ("mine.jsonl", '{"image": "0.png", "caption": "x"}\n{"image": "0.png"}\n', "line 2: no column 'caption'"),
        ("mine.jsonl", "[1]\n", "mine.jsonl line 1: [1] is no object"),
        ("mine.jsonl", "{\n", "mine.jsonl line 1: no JSON"),
        ("mine.txt", "", "must hold one .csv or .jsonl file"),
    ],
)
def test_a_file_of_another_form_is_an_error(tmp_path, capsys, name, content, message):
    put(pictures(tmp_path / "own") / name, content)
    assert run("captions", tmp_path / "own", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_broken_pictures_are_told_by_cause(tmp_path, capsys):
    write(pictures(tmp_path / "own") / "mine.csv", [{"image": f"{n}.png", "caption": f"of {n}"} for n in range(6)])
    put(tmp_path / "own" / "2.png", BAD_PICTURES["truncated"])
    assert run("captions", tmp_path / "own", tmp_path / "out") == 2
    assert "(truncated 1; first" in (error := capsys.readouterr().err) and "--max-bad-share 0.01" in error
    assert run("captions", tmp_path / "own", tmp_path / "out", "--max-bad-share", "0.2") == 0
    assert "mine: left out 1 truncated" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "mine.manifest.json").read_text())
    assert manifest["tables"]["mine"]["rows"] == 5


def test_options_of_questions_are_refused_for_captions(tmp_path, capsys):
    write(pictures(tmp_path) / "mine.csv", CAPTIONS[:1])
    assert run("captions", tmp_path, tmp_path / "out", "--min-count", "2") == 2
    assert "go with vqa" in capsys.readouterr().err
    assert run("captions", tmp_path, tmp_path / "out", "--name", "../mine") == 2
    assert "--name '../mine'" in capsys.readouterr().err
    assert run("captions", tmp_path, tmp_path / "mine.csv") == 2
    assert "mine.csv cannot be a folder, as a file is in its way" in capsys.readouterr().err
    assert run("vqa", tmp_path, tmp_path / "out", "--min-count", "0") == 2
    assert "--min-count 0: give 1 or more" in capsys.readouterr().err
