"""WebDataset tar shards as img2dataset writes them: KEY.jpg + KEY.txt + KEY.json, read in place.

Knows how members pair up, and what is wrong with a damaged or hostile shard. Nothing is ever extracted to disk, and no
member's name is ever used as a path. Knows nothing of what an encoded picture holds (image_check.py), nor of tar
headers (tar_headers.py).

A shard is indexed once from its headers, and the index is kept beside the shards (INDEX_NAME, plain numpy arrays, valid
for a shard's size and time of change) where the folder is writable. An index entry is 16 bytes a pair.

A pair's picture is .jpg, .jpeg, .png or .webp; its caption is .txt, or the "caption" of .json where there is no .txt.
"""

import json
import logging
import os
import tempfile
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

from meter_fast.data.tables import Sample
from meter_fast.data.tar_headers import BLOCK, Member, read_members

INDEX_NAME = ".meter_fast_index.npz"
INDEX_VERSION = 1
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
OPEN_SHARDS = 64  # open files kept at a time, well below the usual limit of 1024
JSON_CAPTION = 1 << 31  # set in a caption's size where it must be taken out of a .json member

# What indexing finds wrong. Each is counted per shard and shown; the pairs that are whole are used.
PROBLEMS = (
    "cut off",  # the shard ends before its end mark: what follows the last whole member is lost
    "damaged header",  # a stretch that is no member; reading goes on at the next valid header
    "false size",  # a member that claims more bytes than the shard has, or 2 GiB
    "caption without image",
    "image without caption",
    "duplicate key",  # a second member of the same name, or a second picture of a key; the first one counts
    "unsafe name",  # absolute, or leaving the folder through ..
    "not a regular file",  # link, device, sparse file
)

log = logging.getLogger(__name__)


class ShardError(ValueError):
    """Shards that cannot be used: which, why, what to do."""


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The usable pairs of one shard.

    entries: uint32 [pairs, 4] = block and size in bytes of the picture, block and size of the caption (a block is 512
    bytes; JSON_CAPTION is set in the caption's size where the member is .json)
    problems: how many of each of PROBLEMS
    """

    entries: np.ndarray
    problems: Counter


def index_shard(path: Path) -> ShardIndex:
    """Index one shard from its headers. Damage is counted, never raised.

    Raises ShardError for a compressed file, in which nothing can be read at random.
    """
    problems: Counter = Counter()
    groups: dict[str, dict[str, Member]] = {}
    with open(path, "rb") as file:
        _refuse_compressed(path, file.read(6))
        for member in read_members(file, problems):
            _place(member, groups, problems)
    entries = []
    for group in groups.values():
        images = [group[kind] for kind in IMAGES if kind in group]
        caption = group.get(".txt") or group.get(".json")
        problems["duplicate key"] += max(0, len(images) - 1)
        if images and caption:
            json_flag = 0 if ".txt" in group else JSON_CAPTION
            entries.append((images[0].block, images[0].size, caption.block, caption.size | json_flag))
        elif images:
            problems["image without caption"] += 1
        else:
            problems["caption without image"] += 1
    return ShardIndex(np.array(entries, np.uint32).reshape(-1, 4), +problems)


def _place(member: Member, groups: dict[str, dict[str, Member]], problems: Counter) -> None:
    """Put a member to its key; refuse what no img2dataset writes."""
    folder, _, base = member.name.rpartition("/")
    key, dot, kind = base.partition(".")
    kind = dot + kind.lower()
    if member.name.startswith(("/", "\\")) or ".." in member.name.replace("\\", "/").split("/"):
        problems["unsafe name"] += 1
    elif member.is_folder:
        return
    elif not member.regular:
        problems["not a regular file"] += 1
    elif kind in IMAGES or kind in (".txt", ".json"):
        group = groups.setdefault(f"{folder}/{key}", {})
        if kind in group:
            problems["duplicate key"] += 1
        else:
            group[kind] = member


def _refuse_compressed(path: Path, head: bytes) -> None:
    for mark, name in ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")):
        if head.startswith(mark):
            raise ShardError(
                f"{path}: compressed with {name}, so pairs cannot be read at random; unpack it to a plain .tar"
            )


class TarCaptions:
    """The (picture, caption) pairs of tar shards, in shard and member order. Every pair has its own picture.

    Safe to read from several threads. Raises ShardError when no shard holds a whole pair, with what was found instead.
    """

    duplicates = 0  # one caption a picture: nothing to de-duplicate

    def __init__(self, files: Sequence[Path]):
        self.files = [Path(file) for file in files]
        indexes = _load_or_make(self.files)
        self.problems: dict[str, Counter] = {
            file.name: index.problems for file, index in zip(self.files, indexes, strict=True) if index.problems
        }
        self._entries = [index.entries for index in indexes]
        self._first = np.cumsum([0] + [len(entries) for entries in self._entries]).tolist()
        self._opened: OrderedDict[int, object] = OrderedDict()
        self._lock = Lock()
        if len(self) == 0:
            found = sum(self.problems.values(), Counter())
            raise ShardError(
                f"no (picture, caption) pair in {len(self.files)} shards ({self.files[0]} ...); "
                f"found instead: {dict(found) or 'empty archives'}. "
                "A pair is KEY.jpg (or png, webp) and KEY.txt (or json)"
            )

    def __len__(self) -> int:
        return self._first[-1]

    @property
    def pictures(self) -> int:
        """Number of pictures: one a pair."""
        return len(self)

    def image_ids(self, indices: np.ndarray) -> np.ndarray:
        """indices [n] int64 of pairs -> [n] int64: which picture each shows; a pair's own number."""
        return np.array(indices, np.int64)

    def read(self, index: int) -> Sample:
        """Pair `index`. A shard that shrank since it was indexed gives fewer bytes, which the checks then find."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        shard = bisect_right(self._first, index) - 1
        block, size, text_block, text_size = self._entries[shard][index - self._first[shard]].tolist()
        file = self._open(shard)
        image = np.empty(size, np.uint8)
        image = image[: os.preadv(file.fileno(), [image], block * BLOCK)]
        raw = os.pread(file.fileno(), text_size & ~JSON_CAPTION, text_block * BLOCK)
        text = _json_caption(raw) if text_size & JSON_CAPTION else raw.decode("utf-8", "surrogateescape").strip()
        return Sample(image, text, f"{self.files[shard].name} byte {block * BLOCK}")

    def picture(self, index: int) -> tuple[None, list[str]]:
        """Of the picture of pair `index`: no number that it is known by, and its caption."""
        return None, [self.read(index).text]

    def _open(self, shard: int):
        """The shard's open file. An evicted file is closed by its last user letting go of it, not under his hands."""
        with self._lock:
            file = self._opened.pop(shard, None)
            if file is None:
                file = open(self.files[shard], "rb", buffering=0)  # noqa: SIM115 (kept open)
            self._opened[shard] = file
            if len(self._opened) > OPEN_SHARDS:
                self._opened.popitem(last=False)
            return file


def _json_caption(raw: bytes) -> str:
    """The caption of an img2dataset metadata member; "" (an empty caption, which the caption check counts) where there
    is none to be had."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return ""
    caption = found.get("caption") if isinstance(found, dict) else None
    return caption if isinstance(caption, str) else ""


def _load_or_make(files: Sequence[Path]) -> list[ShardIndex]:
    """The index of every shard: from the folder's index file where that is there and right, else from the headers."""
    known: dict[Path, dict[str, tuple[int, int, ShardIndex]]] = {}
    for folder in {file.parent for file in files}:
        known[folder] = _load(folder / INDEX_NAME)
    changed, indexes = Counter(), []
    for file in files:
        status = file.stat()
        size, changed_at, index = known[file.parent].get(file.name, (-1, -1, None))
        if (size, changed_at) != (status.st_size, status.st_mtime_ns) or not _inside(index.entries, size):
            index = index_shard(file)
            known[file.parent][file.name] = (status.st_size, status.st_mtime_ns, index)
            changed[file.parent] += 1
        indexes.append(index)
    for folder, count in changed.items():
        log.info("indexed %d shards in %s", count, folder)
        _save(folder / INDEX_NAME, {name: entry for name, entry in known[folder].items() if (folder / name).exists()})
    return indexes


def _inside(entries: np.ndarray, size: int) -> bool:
    """Whether all members that an index names lie inside a shard of `size` bytes: a foreign index may say anything."""
    lengths = entries[:, 1::2] & ~np.uint32(JSON_CAPTION)
    return bool((entries[:, 0::2].astype(np.int64) * BLOCK + lengths <= size).all())


def _load(path: Path) -> dict[str, tuple[int, int, ShardIndex]]:
    """Read an index file: shard name -> (size, time of change, index). One that cannot be read counts as none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if int(file["version"]) != INDEX_VERSION or file["problem_names"].tolist() != list(PROBLEMS):
                return {}
            ends = np.cumsum(file["pairs"])
            parts = np.split(file["entries"].reshape(-1, 4), ends[:-1])
            if ends.size and ends[-1] != sum(map(len, parts)):
                return {}
            counts = [Counter(dict(zip(PROBLEMS, row, strict=True))) for row in file["problems"].tolist()]
            rows = zip(file["names"].tolist(), file["stamps"].tolist(), parts, counts, strict=True)
            return {name: (*stamp, ShardIndex(entries, +found)) for name, stamp, entries, found in rows}
    except FileNotFoundError:
        return {}
    except Exception as error:  # of a damaged archive zipfile and numpy raise nearly anything
        log.warning("%s cannot be used (%s): the shards are indexed again", path, error)
        return {}


def _save(path: Path, known: dict[str, tuple[int, int, ShardIndex]]) -> None:
    """Write an index file in one rename, so that several processes may do it at once."""
    arrays = {
        "version": np.array(INDEX_VERSION),
        "problem_names": np.array(PROBLEMS),
        "names": np.array(list(known)),
        "stamps": np.array([entry[:2] for entry in known.values()], np.int64),
        "pairs": np.array([len(entry[2].entries) for entry in known.values()], np.int64),
        "problems": np.array([[entry[2].problems[name] for name in PROBLEMS] for entry in known.values()], np.int64),
        "entries": np.concatenate([entry[2].entries for entry in known.values()]),
    }
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            try:
                np.savez(file, **arrays)
                file.flush()
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        log.warning(
            "the index of %d shards cannot be kept in %s (%s): it is made anew at each start", len(known), path, error
        )
