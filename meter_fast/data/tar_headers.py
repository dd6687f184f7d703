"""The members of a tar file, from its headers alone; goes on behind damage.

Knows the block structure, long names (GNU and pax) and how to find the next header behind bytes that are none. Trusts
no size or name: nothing is read beyond a header, and no header beyond LARGEST_HEADER. Uncommon headers are parsed by
the standard library; its reader of whole archives is not used, as it ends at the first damage without a word.
"""

import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
LARGEST_HEADER = 1 << 16  # bytes of an extended header (long names); more is damage or an attack
LARGEST_MEMBER = (1 << 31) - 1
_LONG_NAME, _LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_SIZE, _SUM = re.compile(rb"[0-7]{11}[\0 ]"), re.compile(rb"[0-7]{6}[\0 ]")
_WITHOUT_CONTENT = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)


@dataclass(frozen=True, slots=True)
class Member:
    """One member: its name as written, where its content is (in blocks of 512 bytes), how long that is in bytes."""

    name: str
    block: int
    size: int
    regular: bool
    is_folder: bool


def read_members(file: BinaryIO, problems: Counter) -> Iterator[Member]:
    """Every member whose content is all there, in the file's order.

    Counts into `problems`: "damaged header" per stretch of bytes that is neither member nor padding, "false size" per
    member that claims more than there is (or 2 GiB), and "cut off" when the file ends without an end mark.
    """
    end = file.seek(0, 2)
    at, named = 0, {}  # `named`: what extended headers say of the member that follows them
    lost = None  # why the bytes before `at` are no member: "damaged header" or "false size", once it is known
    ended = False  # whether an end mark follows the last member
    while at + BLOCK <= end:
        file.seek(at)
        block = file.read(BLOCK)
        try:
            info = _parse(block)
        except tarfile.HeaderError:
            if block.count(0) == BLOCK:
                ended = True
            else:
                lost = lost or "damaged header"
            at, named = at + BLOCK, {}
            continue
        ended = False
        content = at + BLOCK
        if info.type in (_LONG_NAME, _LONG_LINK, *_PAX):
            if 0 <= info.size <= min(LARGEST_HEADER, end - content):
                named |= _extension(info.type, file.read(info.size))
                at = content + _blocks(info.size)
            else:
                lost, at, named = lost or "false size", content, {}
            continue
        size = 0 if info.type in _WITHOUT_CONTENT else named.get("size", info.size)
        if not 0 <= size <= min(LARGEST_MEMBER, end - content):
            # Either a lie, or the file is cut: members behind it tell. Look for them right behind this header.
            lost, at, named = lost or "false size", content, {}
            continue
        if lost:
            problems[lost] += 1
            lost = None
        regular = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not named.get("sparse")
        yield Member(named.get("name", info.name), content // BLOCK, size, regular, info.isdir())
        at, named = content + _blocks(size), {}
    if lost == "damaged header" or (lost and ended):
        problems[lost] += 1
    if not ended:
        problems["cut off"] += 1


def _parse(block: bytes) -> tarfile.TarInfo:
    """One header. Raises tarfile.HeaderError when it is none.

    What img2dataset writes, plain files with short names, is read here: the library takes four times as long, which is
    minutes for millions of pairs.
    """
    plain = block[156:157] == tarfile.REGTYPE and not block[345] and _SIZE.match(block, 124) and _SUM.match(block, 148)
    if plain and int(block[148:154], 8) == sum(block) - sum(block[148:156]) + 8 * ord(" "):
        info = tarfile.TarInfo(block[:100].split(b"\0", 1)[0].decode("utf-8", "surrogateescape"))
        info.size = int(block[124:135], 8)
        return info
    return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")


def _blocks(size: int) -> int:
    """Bytes that `size` bytes of content take up."""
    return -(-size // BLOCK) * BLOCK


def _extension(kind: bytes, content: bytes) -> dict:
    """What an extended header says of the next member: its name, its size, whether it is sparse."""
    if kind == _LONG_LINK or kind == tarfile.XGLTYPE:
        return {}
    if kind == _LONG_NAME:
        return {"name": content.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")}
    said: dict = {}
    while content:
        length, _, rest = content.partition(b" ")
        if not length.isdigit() or len(length) > 6 or int(length) <= len(length) + 1:
            break
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if key == b"path":
            said["name"] = value.decode("utf-8", "surrogateescape")
        elif key == b"size" and value.isdigit() and len(value) < 20:
            said["size"] = int(value)
        elif key.startswith(b"GNU.sparse"):
            said["sparse"] = True
        content = content[int(length) :]
    return said
