"""`data check` finds what is broken in tables and shards, by cause and name, and says so by its exit code."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from golden_cases import GOLDEN
from making import BAD_PICTURES, caption, pair_members, picture, table_of, write_pairs, write_table, write_tar

from meter_fast.cli import main


def check(root: Path, *options: str, workers: int = 1) -> tuple[int, dict]:
    """Exit code and what was found, by table."""
    file = root.parent / "report.json"
    code = main(["data", "check", str(root), "--json", str(file), "--workers", str(workers), *options])
    return code, {one["name"]: one for one in json.loads(file.read_text())["tables"]}


@pytest.fixture
def broken(tmp_path) -> Path:
    """Six bad pictures of 60, each cause, and three bad captions; one picture without any."""
    images = [picture(n) for n in range(60)]
    images[4], images[5], images[6], images[7] = BAD_PICTURES.values()
    images[8] = images[9] = b""
    captions = [[caption(2 * n), caption(2 * n + 1)] for n in range(60)]
    captions[10], captions[11], captions[12] = [], ["", caption(1)], [caption(2), " \u200b"]
    (tmp_path / "data").mkdir()
    write_table(tmp_path / "data" / "own.arrow", table_of(images, captions), rows_per_batch=25)
    return tmp_path / "data"


def test_sound_tables_of_all_kinds(capsys, tmp_path):
    names = [file.stem for file in (GOLDEN / "arrow").glob("*.arrow") if file.stem != "vqav2_trainable_val"]
    file = tmp_path / "report.json"
    assert main(["data", "check", str(GOLDEN / "arrow"), "--decode", "--workers", "1", "--json", str(file), "--names",
                 *names]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.count("sound") == len(names) == 26 and "BROKEN" not in printed
    assert "nlvr2_dev.arrow  statements about two pictures  4 pictures  4 texts  sound" in printed
    assert "captions that repeat another of their picture: 1" in printed
    assert not json.loads(file.read_text())["broken"]


def test_what_is_broken_is_counted_by_cause_with_first_names(broken, capsys):
    code, found = check(broken)
    assert code == 2
    own = found["own.arrow"]["found"]
    counts = {cause: entry["count"] for cause, entry in own["bad_pictures"].items()}
    assert counts == {"zero bytes": 3, "not an image": 1, "truncated": 1}
    assert own["bad_pictures"]["zero bytes"]["first"][1].startswith("own.arrow row 8 (")
    assert own["bad_texts"]["empty caption"]["count"] == 2
    assert [name.split(" (")[0] for name in own["bad_texts"]["empty caption"]["first"]] == [
        "own.arrow row 11",
        "own.arrow row 12",
    ]
    assert own["pictures"] == 60 and own["texts"] == 118 and own["without_text"] == 1
    assert found["own.arrow"]["share"] == pytest.approx(5 / 60)
    printed = capsys.readouterr().out
    assert "own.arrow  captions  60 pictures  118 texts  BROKEN" in printed
    assert "truncated: 1, first own.arrow row 6" in printed and "pictures without a text: 1" in printed


def test_a_larger_share_is_allowed_on_request(broken, capsys):
    assert check(broken, "--max-bad-share", "0.1")[0] == 0
    assert "usable" in capsys.readouterr().out


def test_decoding_finds_what_headers_do_not_tell(broken):
    found = check(broken, "--decode")[1]["own.arrow"]["found"]
    assert found["bad_pictures"]["undecodable"]["first"][0].startswith("own.arrow row 7 (")


def test_several_processes_find_the_same(broken, monkeypatch):
    write_pairs(broken / "more.arrow", 30, captions_each=3)
    assert check(broken, workers=2) == check(broken, workers=1)


def test_tables_that_cannot_be_opened_are_named_and_the_others_checked(broken, capsys):
    write_pairs(broken / "sound.arrow", 5)
    whole = (broken / "sound.arrow").read_bytes()
    (broken / "cut.arrow").write_bytes(whole[:-100])
    write_table(broken / "odd.arrow", pa.table({"image": [b"x"], "title": ["y"]}))
    write_table(broken / "packed.arrow", table_of([picture(1)], [["x"]]), compression="zstd")
    write_table(broken / "empty.arrow", table_of([], []))
    code, found = check(broken)
    assert code == 2
    for name, error in (
        ("cut", "not a complete Arrow IPC file"),
        ("odd", "no table of pictures with texts"),
        ("packed", "compressed"),
        ("empty", "the table is empty"),
        ("sound", ""),
    ):
        assert error in found[f"{name}.arrow"]["error"] and bool(error) == bool(found[f"{name}.arrow"]["error"])
    assert found["sound.arrow"]["found"]["pictures"] == 5 and check(broken, "--names", "sound")[0] == 0


def test_shards_are_checked_with_their_members(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    members = [member for number in range(6) for member in pair_members(number)]
    members[3] = (members[3][0], BAD_PICTURES["truncated"])
    members[7] = (members[7][0], b"  ")
    write_tar(tmp_path / "data" / "00000.tar", [*members, ("000000099.jpg", picture(9))])
    write_tar(tmp_path / "data" / "00001.tar", pair_members(7))
    code, found = check(tmp_path / "data", "--names", "shards:{00000..00001}.tar")
    shards = found["shards:{00000..00001}.tar"]
    assert code == 2 and shards["found"]["pictures"] == 7
    assert shards["found"]["bad_pictures"]["truncated"]["first"][0].startswith("00000.tar byte ")
    assert shards["found"]["bad_texts"]["empty caption"]["count"] == 1
    assert shards["notes"] == {"members: image without caption": 1}
    assert list(check(tmp_path / "data")[1]) == ["*.tar"]
    write_tar(tmp_path / "data" / "00001.tar", [])
    write_tar(tmp_path / "data" / "00000.tar", [])
    assert "no (picture, caption) pair" in check(tmp_path / "data")[1]["*.tar"]["error"]


def test_labels_of_statements_and_hypotheses_are_checked(tmp_path):
    (tmp_path / "data").mkdir()
    image = pa.array([picture(1), picture(2)], pa.binary())
    texts = [["a", "b"], ["c"]]
    pairs = {"image_0": image, "image_1": image, "questions": texts, "answers": [["True", "maybe"], ["True"]]}
    write_table(tmp_path / "data" / "nlvr2.arrow", pa.table(pairs))
    sentences = [[["p", "h"], ["p", " "]], [["p", "h"]]]
    snli = {"image": image, "sentences": sentences, "labels": [[0, 3], [1, 2]]}
    write_table(tmp_path / "data" / "snli.arrow", pa.table(snli))
    code, found = check(tmp_path / "data")
    assert code == 2
    bad = {name: one["found"]["bad_texts"] for name, one in found.items()}
    assert bad["nlvr2.arrow"] == {"unknown label": {"count": 1, "first": ["nlvr2.arrow row 0 ('maybe')"]}}
    assert {cause: entry["count"] for cause, entry in bad["snli.arrow"].items()} == {
        "empty caption": 1,
        "unknown label": 1,
        "not as many labels as texts": 1,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--names", "nothing"], "no table nothing.arrow in the folder"),
        (["--names", "coco"], "no table coco_caption"),
        (["--names", "shards:*.tar"], "no *.tar"),
        (["--max-bad-share", "-1"], "give a share from 0 to 1"),
        (["--json", "/no/such/folder/report.json"], "there is no folder /no/such/folder"),
    ],
)
def test_wrong_arguments_are_named(broken, options, message, capsys):
    assert main(["data", "check", str(broken), *options]) == 2
    assert message in capsys.readouterr().err
    assert main(["data", "check", str(broken / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err
