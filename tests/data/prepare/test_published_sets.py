"""Tables made of miniature downloads hold what the published writers' tables hold, column by column."""

import json

import pyarrow as pa
import pytest
from golden_cases import GOLDEN
from raw_sets import MAKERS, SCHEMA, SHUFFLED, TABLES, golden

from meter_fast import cli_data
from meter_fast.cli import main
from meter_fast.data.answers import find_answers
from meter_fast.data.prepare import SETS, carry_out, plan_set
from meter_fast.data.prepare.own import COLUMNS
from meter_fast.data.prepare.progress import Progress, duration
from meter_fast.data.prepare.vqa_words import normalize_word, score
from meter_fast.data.question_tables import open_questions
from meter_fast.data.sources import open_sources

SCORING = json.loads((GOLDEN / "vqa_scoring.json").read_text())


def table(path) -> pa.Table:
    with pa.memory_map(str(path)) as mapped:
        return pa.ipc.open_file(mapped).read_all()


@pytest.mark.parametrize("name", MAKERS)
def test_every_table_is_as_published(name, tmp_path, capsys):
    MAKERS[name](tmp_path / "raw")
    assert main(["data", "prepare", name, str(tmp_path / "raw"), str(tmp_path / "out"), "--workers", "1"]) == 0
    written = {file.stem for file in (tmp_path / "out").glob("*.arrow")}
    assert written == set(TABLES[name])
    for stem in TABLES[name]:
        ours, theirs = table(tmp_path / "out" / f"{stem}.arrow"), golden(stem)
        assert ours.column_names == theirs.column_names
        if theirs.num_rows == 0:  # no rows, so no types: ours keep theirs
            assert ours.num_rows == 0
            continue
        assert [[field.name, str(field.type)] for field in ours.schema] == SCHEMA[f"{stem}.arrow"]["columns"]
        if name in SHUFFLED:
            numbers = [int(str(one)) if str(one).isdigit() else one for one in ours[SHUFFLED[name]].to_pylist()]
            assert numbers == sorted(numbers)
            ours, theirs = (one.sort_by(SHUFFLED[name]) for one in (ours, theirs))
        for column in theirs.column_names:
            assert ours[column].to_pylist() == theirs[column].to_pylist(), (stem, column)


@pytest.mark.parametrize("name", ["coco", "vg", "sbu", "gcc", "f30k", "vqav2"])
def test_training_reads_the_tables_by_the_name_of_the_set(name, tmp_path):
    MAKERS[name](tmp_path / "raw")
    carry_out(plan_set(name, tmp_path / "raw"), tmp_path, say=print)
    opened = open_questions(["vqa"], tmp_path) if name == "vqav2" else open_sources([name], tmp_path)
    assert len(opened) > 1 and opened.coverage()[0]["pictures"] > 1
    if name == "vqav2":
        answers = find_answers(opened.tables, str(tmp_path / "vqav2_answers.json"))
        assert answers.names == ("no", "2", "black and white", "yes")


def test_the_commands_know_the_same_names():
    assert cli_data.SETS == tuple(SETS) == tuple(MAKERS)
    assert set(cli_data.KINDS) == set(COLUMNS)


def test_progress_tells_rate_and_time_left():
    said = []
    progress = Progress(1000, "rows", said.append)
    for _ in range(100):
        progress.step("vg", 1, 20_000)
    assert said == []  # nothing in the first seconds
    assert progress.line(10.0) == "100 of 1,000 rows, 10 a second, 0.2 MB/s, 1 min 30 s left"
    assert [duration(seconds) for seconds in (4.4, 60, 3600 * 5 + 61)] == ["4 s", "1 min 00 s", "5 h 01 min"]


def test_answers_are_made_alike_as_published():
    assert [normalize_word(answer) for answer, _ in SCORING["normalize_word"]] == [
        alike for _, alike in SCORING["normalize_word"]
    ]
    assert normalize_word(". " * 40) == ". . . . . . . ."  # the 33rd period and those after it stay
    assert [score(count) for count, _ in SCORING["get_score"]] == [soft for _, soft in SCORING["get_score"]]
