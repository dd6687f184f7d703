"""Caption tables: the published items, de-duplication against a plain loop, nothing copied, bad files named."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest
from golden_cases import GOLDEN
from making import picture, table_of, write_pairs, write_table

from meter_fast.data.tables import ArrowCaptions, TableError

PUBLISHED = json.loads((GOLDEN / "datasets.json").read_text())["sets"]
CAPTION_SETS = [
    n for n, s in PUBLISHED.items() if n.split(".")[0] in ("coco", "f30k", "vg", "sbu", "gcc") and s["items"]
]


@pytest.mark.parametrize("name", CAPTION_SETS)
def test_items_are_those_of_the_published_data_sets(name):
    """Same pictures, same captions with each; the order of a picture's captions is ours (the published is random)."""
    published = PUBLISHED[name]
    pairs = ArrowCaptions([GOLDEN / "arrow" / f"{stem}.arrow" for stem in published["names"]])
    assert (len(pairs), pairs.pictures) == (published["items"], published["images"])
    rows = pairs.image_ids(np.arange(len(pairs))).tolist()
    ours = sorted((rows[i], pairs.read(i).text) for i in range(len(pairs)))
    assert ours == sorted((row["index"][0], row["text"]) for row in published["rows"])


def test_picture_bytes_are_those_of_the_column():
    file = GOLDEN / "arrow" / "vg.arrow"
    pairs = ArrowCaptions([file])
    column = pa.ipc.open_file(pa.memory_map(str(file))).read_all()["image"].to_pylist()
    for index, row in enumerate(pairs.image_ids(np.arange(len(pairs))).tolist()):
        sample = pairs.read(index)
        assert sample.image.tobytes() == column[row]
        assert sample.name == f"vg.arrow row {row}"


def random_rows(chance, rows):
    """Captions with repeats near and far, empty lists, missing lists and missing captions."""
    captions = []
    for _ in range(rows):
        several = [None if chance.random() < 0.05 else f"c{chance.integers(6)}" for _ in range(chance.integers(0, 9))]
        captions.append(None if chance.random() < 0.05 else several)
    return captions


@pytest.mark.parametrize(("rows_per_batch", "at_once"), [(None, 1 << 18), (7, 1 << 18), (50, 5), (1, 1)])
def test_pairs_equal_a_plain_loop(tmp_path, monkeypatch, rows_per_batch, at_once):
    """Two files, several record batches, de-duplication in small pieces: all as a loop over Python lists has it."""
    monkeypatch.setattr("meter_fast.data.tables.CAPTIONS_AT_ONCE", at_once)
    chance = np.random.default_rng(5)
    files, expected, first, written = [], [], 0, 0
    for number in range(2):
        captions = random_rows(chance, 60)
        images = [f"picture {number} {row}".encode() for row in range(60)]
        files.append(write_table(tmp_path / f"{number}.arrow", table_of(images, captions), rows_per_batch))
        for row, several in enumerate(captions):
            expected += [(first + row, images[row], text or "", row, number) for text in dict.fromkeys(several or [])]
        first += 60
        written += sum(len(several or []) for several in captions)
    pairs = ArrowCaptions(files)
    assert len(pairs) == len(expected)
    assert pairs.image_ids(np.arange(len(pairs))).tolist() == [item[0] for item in expected]
    for index, (_, image, text, row, number) in enumerate(expected):
        sample = pairs.read(index)
        assert (sample.image.tobytes(), sample.text, sample.name) == (image, text, f"{number}.arrow row {row}")
    assert pairs.duplicates == written - len(pairs) > 0


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.large_string()), pa.large_list(pa.string()), pa.large_list(pa.large_string())]
)
def test_large_types_are_read_too(tmp_path, kind):
    table = pa.table(
        {"image": pa.array([b"one", b"two"], pa.large_binary()), "caption": pa.array([["a", "a"], ["b", "c"]], kind)}
    )
    pairs = ArrowCaptions([write_table(tmp_path / "t.arrow", table)])
    found = [(pairs.read(i).image.tobytes(), pairs.read(i).text) for i in range(len(pairs))]
    assert found == [(b"one", "a"), (b"two", "b"), (b"two", "c")]


def test_a_picture_is_a_view_of_the_mapped_file(tmp_path):
    file = write_pairs(tmp_path / "t.arrow", 3)
    image = ArrowCaptions([file]).read(1).image
    address = image.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            assert line.endswith(str(file))
            return
    pytest.fail("the picture lies in no mapping")


def test_captions_that_are_not_utf8_are_handed_on_as_such(tmp_path):
    strings = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 4], np.int32)), pa.py_buffer(b"a\xff\xfeb"))
    captions = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), strings)
    table = pa.table({"image": pa.array([b"x"], pa.binary()), "caption": captions})
    assert ArrowCaptions([write_table(tmp_path / "t.arrow", table)]).read(0).text == "a\udcff\udcfeb"


def synthetic_table(pictures, each):
    """`pictures` x `each` captions of 8 bytes, every seventh a repeat, made without a Python object per caption."""
    count = pictures * each
    numbers = np.arange(count)
    numbers[1::7] = numbers[0::7][: numbers[1::7].size]
    ends = pa.py_buffer(np.arange(count + 1, dtype=np.int32) * 8)
    strings = pa.StringArray.from_buffers(count, ends, pa.py_buffer(numbers))
    captions = pa.ListArray.from_arrays(pa.array(np.arange(pictures + 1, dtype=np.int32) * each), strings)
    ends = pa.py_buffer(np.arange(pictures + 1, dtype=np.int32) * 4)
    images = pa.BinaryArray.from_buffers(pa.binary(), pictures, [None, ends, pa.py_buffer(bytes(4 * pictures))])
    return pa.table({"image": images, "caption": captions})


@pytest.mark.parametrize(("pictures", "each"), [(2_000_000, 5), (10_000_000, 1)])
def test_ten_million_pairs_take_megabytes(tmp_path, pictures, each):
    """One integer a picture is kept (at most 40 MB here), and opening takes little more for a while."""
    file = write_table(tmp_path / "t.arrow", synthetic_table(pictures, each), 500_000)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        pairs = ArrowCaptions([file])
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 8_000_000 < len(pairs) <= 10_000_000
    assert (len(pairs) < 10_000_000) == (each > 1)
    assert kept < 50e6
    assert peak < 150e6
    assert pa.total_allocated_bytes() - before < 1e6


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"picture": [b"x"], "caption": [["a"]]}), "no column 'image'.*picture: binary"),
        (pa.table({"image": [b"x"], "text": [["a"]]}), "no column 'caption'.*text: list"),
        (pa.table({"image": ["x.jpg"], "caption": [["a"]]}), "'image' is string, expected binary"),
        (pa.table({"image": [b"x"], "caption": ["a"]}), "'caption' is string, expected list<string>"),
        (pa.table({"image": [b"x"], "caption": [[1]]}), "'caption' is list<.*int64>, expected list<string>"),
        (table_of([], []), "the table is empty"),
        (pa.table({"image": pa.nulls(0), "caption": pa.nulls(0)}), "the table is empty"),
        (table_of([b"x", b"y"], [[], None]), "2 pictures and not one caption"),
    ],
)
def test_tables_that_cannot_be_used_are_named(tmp_path, table, message):
    file = write_table(tmp_path / "bad.arrow", table)
    with pytest.raises(TableError, match=rf"bad\.arrow.*{message}"):
        ArrowCaptions([file])


def test_a_compressed_table_is_refused(tmp_path):
    """Reading it would unpack every picture into memory."""
    table = table_of([picture(n) for n in range(4)], [["a"]] * 4)
    pyarrow.feather.write_feather(table, tmp_path / "bad.arrow", compression="lz4")
    with pytest.raises(TableError, match=r"bad\.arrow: compressed.*without compression"):
        ArrowCaptions([tmp_path / "bad.arrow"])


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = write_pairs(tmp_path / "whole.arrow", 2).read_bytes()
    bad = tmp_path / "bad.arrow"
    for size in range(0, len(whole), 64):
        bad.write_bytes(whole[:size])
        with pytest.raises(TableError, match=r"bad\.arrow: not a complete Arrow IPC file"):
            ArrowCaptions([bad])


@pytest.mark.parametrize("column", ["image", "caption"])
@pytest.mark.parametrize("value", [-5, 1 << 30])
def test_damaged_offsets_are_refused_before_anything_is_read(tmp_path, column, value):
    """An offset outside the column would make a view of foreign memory."""
    file = write_pairs(tmp_path / "bad.arrow", 4)
    mapped = pa.memory_map(str(file))
    array = pa.ipc.open_file(mapped).get_batch(0).column(column)
    mapped.seek(0)
    everything = mapped.read_buffer()
    place = array.buffers()[1].address - everything.address
    content = bytearray(file.read_bytes())
    content[place + 8 : place + 12] = np.int32(value).tobytes()
    file.unlink()
    file.write_bytes(content)
    with pytest.raises(TableError, match=rf"bad\.arrow, record batch 0: damaged offsets in column {column}"):
        ArrowCaptions([file])


def test_numbers_outside_are_refused():
    pairs = ArrowCaptions([GOLDEN / "arrow" / "vg.arrow"])
    for index in (-1, len(pairs)):
        with pytest.raises(IndexError):
            pairs.read(index)
