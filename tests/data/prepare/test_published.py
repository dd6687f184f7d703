"""Tables made of miniature downloads hold what the published writers' tables hold, column by column."""

import json

import pyarrow as pa
import pytest
from golden_cases import GOLDEN
from raw import MAKERS, SCHEMA, SHUFFLED, TABLES, golden

from meter_fast.cli import main
from meter_fast.data.prepare.vqa_words import normalize_word, score

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


def test_answers_are_made_alike_as_published():
    assert [normalize_word(answer) for answer, _ in SCORING["normalize_word"]] == [
        alike for _, alike in SCORING["normalize_word"]
    ]
    assert normalize_word(". " * 40) == ". . . . . . . ."  # the 33rd period and those after it stay
    assert [score(count) for count, _ in SCORING["get_score"]] == [soft for _, soft in SCORING["get_score"]]
