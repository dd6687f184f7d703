"""The header check: what it lets through, what it refuses and why, and that it stays cheap on hostile files."""

from __future__ import annotations

import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from odd_pictures import array, bombs, encode, png, smooth, unusable, usable

from meter_fast.data.image_check import CAUSES, DEFAULT_MAX_PIXELS, BadImage, check_image

# What only decoding can tell; the header and the end of these files are right.
BODY_IS_BAD = {
    "truncated BMP",
    "truncated GIF",
    "TIFF of 32-bit floats",
    "PNG with a damaged header",
    "PNG with pixels missing",
    "JPEG without tables",
}


@pytest.mark.parametrize("picture", usable())
def test_usable_pictures_pass(picture: str) -> None:
    header = check_image(array(usable()[picture]))
    assert header.width * header.height > 0


@pytest.mark.parametrize("picture", sorted(set(unusable()) - BODY_IS_BAD))
@pytest.mark.scenario(19, "each with its cause")
def test_unusable_files_are_refused_with_their_cause(picture: str) -> None:
    data, cause = unusable()[picture]
    with pytest.raises(BadImage) as caught:
        check_image(array(data))
    assert caught.value.cause == cause
    assert caught.value.cause in CAUSES


def test_header_tells_size_and_kind() -> None:
    pictures = usable()
    seen = {
        name: check_image(pictures[name]) for name in ("JPEG with a thumbnail", "RGBA PNG", "CMYK JPEG", "WebP", "PNG")
    }
    assert {(header.width, header.height) for header in seen.values()} == {(101, 70)}
    assert [header.kind for header in seen.values()] == ["JPEG", "PNG with alpha", "CMYK JPEG", "WEBP", "PNG"]
    assert [header.plain for header in seen.values()] == [True, False, False, False, True]
    assert not check_image(pictures["JPEG stored as RGB"]).plain
    assert not check_image(pictures["PNG with a transparent colour"]).plain


def test_arrays_views_and_bytes_are_alike() -> None:
    data = encode(smooth(40, 30))
    assert check_image(data) == check_image(array(data)) == check_image(memoryview(data))


def test_pixel_limit_is_exact_and_names_its_setting() -> None:
    data = encode(smooth(40, 30))
    check_image(data, max_pixels=1200)
    with pytest.raises(
        BadImage, match=r"too many pixels: JPEG of 40 x 30 = 1,200 pixels; .*1,199 .data.max_image_pixels"
    ):
        check_image(data, max_pixels=1199)
    edge = png(8192, 8192, 1, 0, b"")
    assert check_image(edge).width == 8192
    assert DEFAULT_MAX_PIXELS == 8192 * 8192


@pytest.mark.parametrize("name", ["JPEG", "progressive JPEG", "JPEG with a thumbnail", "PNG", "RGBA PNG", "WebP"])
def test_every_cut_is_seen(name: str) -> None:
    """Files of the formats with an end mark, cut at every 7th byte, are refused from the outside."""
    data = usable()[name]
    check_image(data)
    for length in range(1, len(data) - 12, 7):
        with pytest.raises(BadImage) as caught:
            check_image(data[:length])
        assert caught.value.cause in ("truncated", "not an image"), length


@pytest.mark.parametrize("name", bombs())
@pytest.mark.scenario(20, "refused from the header")
def test_bombs_are_refused_from_the_header(name: str) -> None:
    with pytest.raises(BadImage) as caught:
        check_image(array(bombs()[name]))
    assert caught.value.cause == "too many pixels"


@pytest.mark.scenario(20, "memory does not grow")
def test_bombs_need_no_memory() -> None:
    """In a process that may take 150 MB more: bombs declare 3.6 G pixels, text chunks unpack to 200 MB."""
    code = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch, zlib
from odd_pictures import array, bombs, encode, png, smooth
from meter_fast.data.image_check import BadImage, check_image
from meter_fast.data.images import image_transform, open_backend
opened = open_backend("torchvision", image_transform("clip", 288), "cpu", torch.float32)
opened.decode([array(encode(smooth(40, 30))), array(encode(smooth(40, 30), "PNG"))])
packer = zlib.compressobj()
packed = b"".join(packer.compress(bytes(10 ** 7)) for _ in range(20)) + packer.flush()
files = dict(bombs())
for chunk, head in ((b"zTXt", b"a\\0\\0"), (b"iCCP", b"a\\0\\0"), (b"iTXt", b"a\\0\\1\\0\\0\\0")):
    files[chunk.decode()] = png(4, 4, 8, 0, bytes(20), (chunk, head + packed))
thin = array(encode(smooth(60_000, 1), "PNG"))  # resized whole it would be 17 280 000 x 288 pixels
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 150 * 10 ** 6,) * 2)
for name, data in files.items():
    try:
        check_image(array(data))
        opened.decode_one(array(data))
        print(name, "decoded")
    except BadImage as error:
        print(name, error.cause)
assert opened.decode_one(thin).shape == (3, 288, 288)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("too many pixels") == len(bombs()), done.stdout
    assert len(done.stdout.splitlines()) == len(bombs()) + 3, done.stdout


@pytest.mark.parametrize("filler", [b"\xff\xe1\0\2", b"\xff"])
def test_a_crafted_header_is_not_walked_for_ever(filler: bytes) -> None:
    """Megabytes of empty segments or fill bytes are given up after a bounded number of steps."""
    with pytest.raises(BadImage) as caught:
        check_image(b"\xff\xd8\xff" + filler * (4_000_000 // len(filler)))
    assert caught.value.cause == "undecodable"
    assert "in its first 4096 segments" in caught.value.detail


def test_colour_key_is_found_behind_other_chunks() -> None:
    rows = b"".join(b"\0" + bytes(12) for _ in range(4))
    text = (b"tEXt", b"a\0" + zlib.compress(b"tRNS" * 9))
    assert check_image(png(4, 4, 8, 2, rows, text)).plain
    assert not check_image(png(4, 4, 8, 2, rows, text, (b"tRNS", bytes(6)))).plain
