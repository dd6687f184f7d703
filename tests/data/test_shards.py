"""Tar shards: pairs read back, damage found and counted, whole pairs unaffected, nothing extracted, the kept index."""

import gzip
import io
import os
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from making import caption, pair_members, picture, write_tar

from meter_fast.data.shards import INDEX_NAME, OPEN_SHARDS, ShardError, TarCaptions, index_shard

BLOCK = 512


def found(pairs):
    """What each pair reads as."""
    samples = [pairs.read(index) for index in range(len(pairs))]
    return [(sample.image.tobytes(), sample.text) for sample in samples]


def written(*numbers):
    """What the pairs of these numbers should read as."""
    return [(picture(number), caption(number)) for number in numbers]


def members(*numbers):
    """The members of these pairs, one after another."""
    return [member for number in numbers for member in pair_members(number)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_pairs_read_back_in_every_tar_format(tmp_path, form):
    """Long and foreign names included, which are written in headers of their own."""
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for number, name in enumerate(
            ("000000000", "folder/000000001", "./2", "x" * 90 + "/" + "y" * 60, "\u00e9\u4e2d")
        ):
            for kind, content in ((".jpg", picture(number)), (".txt", caption(number).encode())):
                info = tarfile.TarInfo(name + kind)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    pairs = TarCaptions([tmp_path / "a.tar"])
    assert found(pairs) == written(0, 1, 2, 3, 4)
    assert pairs.problems == {}
    assert pairs.image_ids(np.array([4, 0, 4])).tolist() == [4, 0, 4]
    assert pairs.read(0).name == f"a.tar byte {BLOCK}"


def test_which_member_is_picture_and_which_is_caption(tmp_path):
    """Upper case, other picture kinds, the caption in .json without a .txt; other members are no part of a pair."""
    shard = write_tar(
        tmp_path / "a.tar",
        [
            ("0.JPG", picture(0)),
            ("0.txt", b" with spaces\n"),
            ("0.json", b'{"caption": "not this one"}'),
            ("1.png", picture(1)),
            ("1.json", b'{"caption": "from \\u0041 json", "other": 1}'),
            ("2.seg.png", b"mask"),
            ("2.txt", b"two"),
            ("2.webp", picture(2)),
            ("3.jpeg", picture(3)),
            ("3.cls", b"7"),
            ("3.txt", b"\xff"),
            ("readme.md", b"hello"),
        ],
    )
    pairs = TarCaptions([shard])
    assert [text for _, text in found(pairs)] == ["with spaces", "from A json", "two", "\udcff"]
    assert [image for image, _ in found(pairs)] == [picture(n) for n in range(4)]
    assert pairs.problems == {}


@pytest.mark.parametrize(
    "content", [b"{", b"[1]", b'{"caption": null}', b'{"caption": 3}', b"\xff\xff", b"[" * 100_000]
)
def test_metadata_without_a_caption_is_an_empty_caption(tmp_path, content):
    shard = write_tar(tmp_path / "a.tar", [("0.jpg", picture(0)), ("0.json", content)])
    assert found(TarCaptions([shard])) == [(picture(0), "")]


@pytest.mark.scenario(21, "cut at every block of 512 bytes: whole pairs are read, the rest is counted")
def test_a_shard_cut_at_any_block_keeps_its_whole_pairs(tmp_path):
    """Cut at every 512 bytes, and once inside a block: what is whole reads as before, and the cut is always shown,
    unless only padding behind the end mark is gone."""
    whole = write_tar(tmp_path / "whole.tar", members(0, 1, 2)).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        ends = [info.offset_data + info.size for info in tar]
    keeps_end_mark = -(-ends[-1] // BLOCK) * BLOCK + BLOCK
    cut = tmp_path / "cut.tar"
    for size in [*range(0, len(whole), BLOCK), ends[3] + 700]:
        cut.write_bytes(whole[:size])
        index = index_shard(cut)
        complete = sum(1 for end in ends[1::3] if end <= size)
        assert len(index.entries) == complete, size
        assert index.problems["cut off"] == (size < keeps_end_mark), size
        pairs = TarCaptions([cut, tmp_path / "whole.tar"])
        assert found(pairs) == written(*range(complete), 0, 1, 2)
        assert list(pairs.problems) == (["cut.tar"] if index.problems else [])


def header(name, size, kind=tarfile.REGTYPE, link=""):
    """A member's header block alone."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.GNU_FORMAT)


def blocks(content):
    return content + bytes(-len(content) % BLOCK)


def shard_with(path, hostile):
    """A shard of pairs 0 and 1 with foreign bytes between them and behind them."""
    first = write_tar(path, members(0)).read_bytes().rstrip(b"\0")
    second = write_tar(path, members(1)).read_bytes().rstrip(b"\0")
    path.write_bytes(blocks(first) + hostile + blocks(second) + hostile + bytes(1024))
    return path


HOSTILE = {
    "absolute name": (header("/tmp/evil.txt", 4) + blocks(b"evil"), "unsafe name"),
    "leaves the folder": (header("a/../../evil.jpg", 4) + blocks(b"evil"), "unsafe name"),
    "windows name": (header("..\\evil.jpg", 4) + blocks(b"evil"), "unsafe name"),
    "symbolic link": (header("9.jpg", 0, tarfile.SYMTYPE, "/etc/passwd"), "not a regular file"),
    "hard link": (header("9.jpg", 0, tarfile.LNKTYPE, "000000000.jpg"), "not a regular file"),
    "link with a size": (header("9.jpg", 5000, tarfile.SYMTYPE, "/etc/passwd"), "not a regular file"),
    "device": (header("9.jpg", 0, tarfile.CHRTYPE), "not a regular file"),
    "sparse file": (header("9.jpg", 4, tarfile.GNUTYPE_SPARSE) + blocks(b"1234"), "not a regular file"),
    "larger than the shard": (header("9.jpg", 10_000_000), "false size"),
    "huge": (header("9.jpg", 2**60), "false size"),
    "negative size": (header("9.jpg", -(2**40)), "false size"),
    "huge extended header": (header("x", 2**40, tarfile.XHDTYPE), "false size"),
    "extended header larger than any name": (header("x", 2**20, tarfile.XHDTYPE) + bytes(2**20), "false size"),
    "garbage": (b"\xab" * 3000 + bytes(72), "damaged header"),
    "wrong checksum": (header("9.jpg", 4).replace(b"9.jpg", b"8.jpg") + blocks(b"evil"), "damaged header"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.scenario(22, "links, devices, absolute and outside names: refused, nothing is written")
def test_hostile_members_are_refused_and_others_unaffected(tmp_path, name):
    hostile, problem = HOSTILE[name]
    pairs = TarCaptions([shard_with(tmp_path / "a.tar", hostile)])
    assert found(pairs) == written(0, 1)
    assert pairs.problems == {"a.tar": Counter({problem: 2})}
    assert sorted(os.listdir(tmp_path)) == [INDEX_NAME, "a.tar"]  # nothing was unpacked


def test_a_size_that_swallows_the_next_members_loses_only_these(tmp_path):
    """Pair 0's picture claims 2000 bytes more: its caption is inside, the pairs behind are found again."""
    content = bytearray(write_tar(tmp_path / "a.tar", members(0, 1, 2)).read_bytes())
    content[:BLOCK] = header("000000000.jpg", len(picture(0)) + 2000)
    (tmp_path / "a.tar").write_bytes(content)
    pairs = TarCaptions([tmp_path / "a.tar"])
    assert found(pairs)[-2:] == written(1, 2)


def test_a_size_that_is_too_small_loses_only_that_picture(tmp_path):
    large = ("000000000.jpg", bytes(range(1, 251)) * 8)
    content = bytearray(write_tar(tmp_path / "a.tar", [large, *members(0)[1:], *members(1)]).read_bytes())
    content[:BLOCK] = header("000000000.jpg", 100)
    (tmp_path / "a.tar").write_bytes(content)
    pairs = TarCaptions([tmp_path / "a.tar"])
    assert found(pairs) == [(bytes(range(1, 101)), caption(0)), *written(1)]
    assert pairs.problems == {"a.tar": Counter({"damaged header": 1})}


@pytest.mark.scenario(21, "pictures without a text and members twice are counted")
def test_lone_members_and_duplicates_are_counted_and_the_first_counts(tmp_path):
    shard = write_tar(
        tmp_path / "a.tar",
        [
            *members(0),
            ("lonely.jpg", picture(7)),
            ("silent.txt", b"a caption"),
            ("000000000.jpg", picture(8)),
            ("000000000.txt", b"again"),
            *members(1)[:2],
            ("000000001.png", picture(9)),
            ("folder/000000000.jpg", picture(2)),
            ("folder/000000000.txt", caption(2).encode()),
        ],
    )
    pairs = TarCaptions([shard])
    assert found(pairs) == written(0, 1, 2)
    expected = {"image without caption": 1, "caption without image": 1, "duplicate key": 3}
    assert pairs.problems == {"a.tar": Counter(expected)}


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>" * 100, bytes(10240)])
def test_shards_without_a_pair_are_named_with_what_was_found(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ShardError, match=r"no \(picture, caption\) pair in 1 shards.*a\.tar.*found instead"):
        TarCaptions([tmp_path / "a.tar"])


def test_a_compressed_shard_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(gzip.compress(write_tar(tmp_path / "b.tar", members(0)).read_bytes()))
    with pytest.raises(ShardError, match=r"a\.tar: compressed with gzip.*unpack"):
        TarCaptions([tmp_path / "a.tar"])


def test_the_index_is_kept_and_used(tmp_path):
    """With the headers gone (same size, same time) the pairs are still known, so no header was read again."""
    shard = write_tar(tmp_path / "a.tar", [*members(0, 1), ("lonely.jpg", b"x")])
    first = TarCaptions([shard])
    status, content = shard.stat(), bytearray(shard.read_bytes())
    for number in range(2):
        content[_header_of(content, f"{number:09d}.jpg")] = 0xFF
    shard.write_bytes(content)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = TarCaptions([shard])
    assert found(again) == found(first) == written(0, 1)
    assert again.problems == first.problems == {"a.tar": Counter({"image without caption": 1})}
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(ShardError, match=r"no .* pair"):
        TarCaptions([shard])


def _header_of(content, name):
    return content.index(name.encode())


def test_a_shard_that_changed_is_indexed_anew_and_others_stay(tmp_path):
    shards = [write_tar(tmp_path / f"{n}.tar", members(n)) for n in range(3)]
    assert found(TarCaptions(shards)) == written(0, 1, 2)
    write_tar(shards[1], members(5, 6))
    shards.append(write_tar(tmp_path / "3.tar", members(9)))
    assert found(TarCaptions(shards)) == written(0, 5, 6, 2, 9)
    assert found(TarCaptions(shards[2:])) == written(2, 9)
    assert found(TarCaptions(shards)) == written(0, 5, 6, 2, 9)


@pytest.mark.scenario(40, "an index of shards (the loader's own file) that holds objects is made anew, not opened")
def test_an_index_that_is_damaged_or_holds_objects_is_made_anew(tmp_path):
    shard = write_tar(tmp_path / "a.tar", members(0, 1))
    TarCaptions([shard])
    index = tmp_path / INDEX_NAME
    whole = index.read_bytes()
    marker = tmp_path / "marker"

    class Payload:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    np.savez(tmp_path / "evil.npz", version=np.array([Payload()], object))
    damaged = [(tmp_path / "evil.npz").read_bytes(), b"", b"no archive", whole[: len(whole) // 2]]
    for place in range(0, len(whole), 97):
        damaged.append(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
    for content in damaged:
        index.write_bytes(content)
        assert found(TarCaptions([shard])) == written(0, 1)
    assert not marker.exists()


@pytest.mark.parametrize("column", [0, 1, 2, 3])
def test_an_index_that_points_outside_its_shard_is_made_anew(tmp_path, column):
    """It would make the reader allocate what it says, up to 4 GiB a picture."""
    shard = write_tar(tmp_path / "a.tar", members(0, 1))
    TarCaptions([shard])
    with np.load(tmp_path / INDEX_NAME) as file:
        arrays = dict(file)
    arrays["entries"][1, column] = 2**31 - 1
    np.savez(tmp_path / INDEX_NAME, **arrays)
    assert found(TarCaptions([shard])) == written(0, 1)


def test_a_folder_that_takes_no_index_is_read_all_the_same(tmp_path, caplog):
    (tmp_path / INDEX_NAME).mkdir()
    shard = write_tar(tmp_path / "a.tar", members(0))
    assert found(TarCaptions([shard])) == written(0)
    assert "cannot be kept" in caplog.text
    assert sorted(os.listdir(tmp_path)) == [INDEX_NAME, "a.tar"]


def test_many_shards_read_by_many_threads_keep_few_files_open(tmp_path):
    count = OPEN_SHARDS + 20
    shards = [write_tar(tmp_path / f"{n:03d}.tar", members(n)) for n in range(count)]
    pairs = TarCaptions(shards)
    before = len(os.listdir("/proc/self/fd"))
    numbers = np.random.default_rng(0).integers(0, count, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda n: pairs.read(n).text, numbers))
    assert texts == [caption(n) for n in numbers]
    assert len(os.listdir("/proc/self/fd")) - before <= OPEN_SHARDS


def test_a_shard_that_shrinks_after_indexing_gives_short_bytes(tmp_path):
    shard = write_tar(tmp_path / "a.tar", members(0, 1))
    pairs = TarCaptions([shard])
    os.truncate(shard, BLOCK + 40)
    assert pairs.read(0).image.tobytes() == picture(0)[:40]
    assert pairs.read(1).image.size == 0
