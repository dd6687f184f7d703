"""Sources: the published file names, what is missing is named or reported, several sources are one run of samples."""

import json
import re
import shutil

import numpy as np
import pytest
from golden_cases import GOLDEN
from making import caption, pair_members, picture, write_pairs, write_tar

from meter_fast.data.shards import ShardError
from meter_fast.data.sources import PUBLISHED, SourceError, expand_braces, open_sources

READS = json.loads((GOLDEN / "arrow_schema.json").read_text())["reads"]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_tables_of_each_split_are_the_published_ones(name, split):
    ours = PUBLISHED[name].get(split)
    assert (list(ours.names) if ours else []) == READS[name][split]["names"]


def test_the_published_sets_one_after_another():
    sources = open_sources(["coco", "vg", "sbu", "gcc", "f30k"], GOLDEN / "arrow")
    assert sources.names == ["coco", "vg", "sbu", "gcc", "f30k"]
    assert sources.sizes == [9, 9, 3, 2, 9]
    assert len(sources) == 32
    texts = [sources.read(index).text for index in range(32)]
    assert texts[0] == "caption 0 of picture 1"
    assert texts[9] == "region 0 of 1"
    assert texts[21:23] == ["train concept 0", "train concept 1"]
    pictures = sources.image_ids(np.arange(32))
    assert pictures.tolist() == sorted(pictures.tolist())  # tables are read in order
    bytes_of = {}
    for index, number in enumerate(pictures.tolist()):
        bytes_of.setdefault(number, set()).add((sources.read(index).image.tobytes(), sources.read(index).name))
    assert all(len(seen) == 1 for seen in bytes_of.values())
    assert len(bytes_of) == sum(row["pictures"] for row in sources.coverage())
    shuffled = np.random.default_rng(0).permutation(32)
    assert (sources.image_ids(shuffled) == pictures[shuffled]).all()


def test_coverage_counts_and_names_the_missing():
    rows = {row["source"]: row for row in open_sources(["coco", "sbu", "gcc"], GOLDEN / "arrow").coverage()}
    assert (rows["coco"]["files"], rows["coco"]["pictures"], rows["coco"]["captions"]) == (2, 3, 9)
    assert rows["coco"]["missing"] == []
    assert rows["sbu"]["missing"] == [f"sbu_{n}.arrow" for n in range(1, 9)]
    assert rows["gcc"]["missing"] == [f"conceptual_caption_train_{n}.arrow" for n in range(1, 31)]


def test_gaps_in_numbered_tables_are_reported_and_the_rest_is_read(tmp_path):
    for number in (4, 2):
        write_pairs(tmp_path / f"sbu_{number}.arrow", 2, first=number * 10)
    sources = open_sources(["sbu"], tmp_path)
    assert [sources.read(index).name for index in range(4)] == [
        f"sbu_{number}.arrow row {row}" for number in (2, 4) for row in range(2)
    ]
    assert sources.coverage()[0]["missing"] == [f"sbu_{n}.arrow" for n in (0, 1, 3, 5, 6, 7, 8)]


def test_a_missing_main_table_names_file_folder_and_what_is_there(tmp_path):
    shutil.copy(GOLDEN / "arrow" / "vg.arrow", tmp_path / "visual_genome.arrow")
    shutil.copy(GOLDEN / "arrow" / "coco_caption_karpathy_restval.arrow", tmp_path)
    there = re.escape(f"{tmp_path}; it holds 2 .arrow files: coco_caption_karpathy_restval.arrow, visual_genome.arrow")
    with pytest.raises(SourceError, match=f"'coco': no table coco_caption_karpathy_train.arrow in the folder {there}"):
        open_sources(["coco"], tmp_path)
    with pytest.raises(SourceError, match=f"'vg': no table vg.arrow in the folder {there}"):
        open_sources(["vg"], tmp_path)
    with pytest.raises(
        SourceError, match=f"'sbu': no table sbu_0.arrow .nor any other of its 9 tables. in the folder {there}"
    ):
        open_sources(["sbu"], tmp_path)
    with pytest.raises(SourceError, match=f"no table mine.arrow in the folder {there}"):
        open_sources(["arrow:visual_genome,mine"], tmp_path)


def test_a_missing_or_wrong_folder_is_named(tmp_path):
    with pytest.raises(SourceError, match=r"data\.root=.*nowhere' is not a folder"):
        open_sources(["coco"], tmp_path / "nowhere")
    with pytest.raises(SourceError, match=f"{tmp_path}; the folder is empty"):
        open_sources(["coco"], tmp_path)
    (tmp_path / "inner").mkdir()
    with pytest.raises(SourceError, match="it holds 1 files and folders: inner"):
        open_sources(["coco"], tmp_path)


def test_own_tables_by_name_whatever_the_split(tmp_path):
    write_pairs(tmp_path / "mine.arrow", 2)
    write_pairs(tmp_path / "yours.arrow", 1, first=5)
    for split in ("train", "val"):
        sources = open_sources(["arrow:yours, mine.arrow"], tmp_path, split)
        assert [sources.read(n).text for n in range(3)] == [caption(5), caption(0), caption(1)]


def test_sources_without_the_split_are_left_out_and_shown():
    sources = open_sources(["vg", "coco", "gcc"], GOLDEN / "arrow", "val", weights=[1, 2, 3])
    assert (sources.names, sources.weights, sources.left_out) == (["coco"], [2.0], ["vg", "gcc"])
    assert {row["source"]: row["files"] for row in sources.coverage()} == {"coco": 1, "vg": 0, "gcc": 0}
    with pytest.raises(SourceError, match=r"none of the sources .*'vg'.* has a val split"):
        open_sources(["vg"], GOLDEN / "arrow", "val")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": []}, "no data source is named"),
        ({"names": ["cocoa"]}, "unknown data source 'cocoa': choose coco, f30k, vg, sbu, gcc, arrow:TABLE"),
        ({"names": ["coco"], "split": "dev"}, "split 'dev': choose one of train, val, test"),
        ({"names": ["coco", "vg"], "weights": [1]}, "one positive number for each of the sources"),
        ({"names": ["coco", "vg"], "weights": [1, 0]}, "one positive number for each of the sources"),
        ({"names": ["coco", "vg"], "weights": [1, float("nan")]}, "one positive number for each of the sources"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(SourceError, match=message):
        open_sources(root=GOLDEN / "arrow", **arguments)


def test_no_weights_given_as_an_empty_tuple_mean_concatenation():
    assert open_sources(["coco"], GOLDEN / "arrow", weights=()).weights is None


def test_numbers_outside_are_refused():
    sources = open_sources(["coco"], GOLDEN / "arrow")
    for index in (-1, len(sources)):
        with pytest.raises(IndexError):
            sources.read(index)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{008..011}.tar", ["008.tar", "009.tar", "010.tar", "011.tar"]),
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("{a,bc}/{0..1}.tar", ["a/0.tar", "a/1.tar", "bc/0.tar", "bc/1.tar"]),
    ],
)
def test_braces(pattern, names):
    assert expand_braces(pattern) == names


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("{5..2}.tar", "must ascend"), ("a{0..1.tar", "brace without"), ("{0..9999999}", "must ascend")],
)
def test_wrong_braces_are_named(pattern, message):
    with pytest.raises(SourceError, match=message):
        expand_braces(pattern)


def test_shards_by_glob_braces_and_absolute_path_beside_tables(tmp_path):
    (tmp_path / "cc3m").mkdir()
    for number in range(4):
        write_tar(tmp_path / "cc3m" / f"{number:05d}.tar", pair_members(number))
    write_pairs(tmp_path / "mine.arrow", 1, first=9)
    for pattern in (
        "cc3m/*.tar",
        "cc3m/{00000..00003}.tar",
        f"{tmp_path}/cc3m/0000?.tar",
        "cc3m/{00000,0000[1-3]}.tar",
    ):
        sources = open_sources(["arrow:mine", f"shards:{pattern}"], tmp_path)
        assert [sources.read(n).text for n in range(5)] == [caption(n) for n in (9, 0, 1, 2, 3)]
        assert [sources.read(n).image.tobytes() for n in range(5)] == [picture(n) for n in (9, 0, 1, 2, 3)]
        assert sources.image_ids(np.arange(5)).tolist() == [0, 1, 2, 3, 4]


def test_shards_that_are_not_there_are_named(tmp_path):
    write_tar(tmp_path / "00000.tar", pair_members(0))
    write_tar(tmp_path / "00003.tar", pair_members(3))
    message = (
        rf"no 00001\.tar, 00002\.tar \(folder {tmp_path}\); it holds 2 \.tar files: 00000\.tar, 00003\.tar; a glob"
    )
    with pytest.raises(SourceError, match=message):
        open_sources(["shards:{00000..00003}.tar"], tmp_path)
    with pytest.raises(SourceError, match=r"no x\*\.tar \(folder .*it holds 2 \.tar files"):
        open_sources(["shards:x*.tar"], tmp_path)
    with pytest.raises(SourceError, match="there is no such folder"):
        open_sources(["shards:nowhere/*.tar"], tmp_path)


def test_problems_of_shards_are_in_the_coverage(tmp_path):
    write_tar(tmp_path / "0.tar", [*pair_members(0), ("lonely.txt", b"x")])
    cut = write_tar(tmp_path / "1.tar", [*pair_members(1), *pair_members(2)])
    cut.write_bytes(cut.read_bytes()[: 8 * 512])
    row = open_sources(["shards:*.tar"], tmp_path).coverage()[0]
    assert (row["files"], row["pictures"], row["captions"]) == (2, 2, 2)
    assert row["problems"] == {
        "0.tar": {"caption without image": 1},
        "1.tar": {"cut off": 1, "image without caption": 1},
    }
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.tar").write_bytes(b"<html>")
    with pytest.raises(ShardError, match=r"no .* pair in 1 shards"):
        open_sources(["shards:bad/*.tar"], tmp_path)
