"""Header checks of encoded pictures: what a file is, how large it claims to be, and whether its end is there.

Knows the containers' headers, nothing of pixels: no picture is decoded, so a bomb costs what its header costs. The back
ends use the same header to choose a decoder. A picture whose header is right may still fail to decode: that is
"undecodable".
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

# 64 Mi pixels (8192 x 8192) are more than web pictures and nearly all cameras have, stay under the size at which Pillow
# itself warns of a bomb (89 M), and bound one decode to 256 MiB as RGBA, so that several workers fit on one host.
DEFAULT_MAX_PIXELS = 64 * 1024 * 1024

# Formats that Pillow may read for us, if this build of it can. Plugins that run other programs (EPS) are left out.
Image.init()
PILLOW_FORMATS = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"} & set(Image.OPEN)

# Real JPEGs have a few dozen segments before the frame header; a crafted one must not cost a walk through megabytes.
MAX_SEGMENTS = 4096

CAUSES = ("zero bytes", "not an image", "too many pixels", "truncated", "unsupported", "undecodable")

Encoded = np.ndarray | memoryview | bytes


class BadImage(ValueError):
    """A picture that cannot be used. `cause` is one of CAUSES (it is counted), `detail` says more (it is shown)."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause
        self.detail = detail


@dataclass(frozen=True)
class ImageHeader:
    """What the first bytes say. width, height: pixels. kind: for counting, such as "CMYK JPEG".

    plain: an opaque JPEG or PNG, gray or in colour, of 8 bits a channel, which all decoders read alike.
    """

    format: str
    width: int
    height: int
    plain: bool
    kind: str


def check_image(encoded: Encoded, max_pixels: int = DEFAULT_MAX_PIXELS) -> ImageHeader:
    """Check an encoded picture by its header and its end, without decoding it.

    encoded: the file's bytes (uint8 array, memoryview or bytes). max_pixels: largest width x height that is accepted.
    Returns the header. Raises BadImage with cause "zero bytes", "not an image", "unsupported", "too many pixels" or
    "truncated".
    """
    data = memoryview(encoded).cast("B")
    header = read_header(data)
    if header.width * header.height > max_pixels:
        raise BadImage(
            "too many pixels",
            f"{header.format} of {header.width} x {header.height} = {header.width * header.height:,} pixels; "
            f"the limit is {max_pixels:,} (data.max_image_pixels)",
        )
    _check_end(data, header.format)
    return header


def read_header(encoded: Encoded) -> ImageHeader:
    """Format, size and kind of an encoded picture. Raises BadImage with any cause but "too many pixels"."""
    data = memoryview(encoded).cast("B")
    if len(data) == 0:
        raise BadImage("zero bytes", "the file is empty")
    head = bytes(data[:32])
    try:
        if head[:3] == b"\xff\xd8\xff":
            return _jpeg_header(data)
        if head[:8] == b"\x89PNG\r\n\x1a\n":
            return _png_header(data, head)
        return _other_header(data, head)
    except (struct.error, IndexError):
        raise BadImage("truncated", f"the header of {len(data)} bytes ends early") from None


def _jpeg_header(data: memoryview) -> ImageHeader:
    """A thumbnail inside EXIF is part of its segment and is passed over."""
    rgb = False
    for marker, at in _jpeg_segments(data):
        if marker in (0xD9, 0xDA):
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return _jpeg_frame(marker, *struct.unpack_from(">BHHB", data, at + 4), rgb)
        if marker == 0xEE and data[at + 4 : at + 9] == b"Adobe" and data[at + 15] == 0:
            rgb = True
    raise BadImage("undecodable", "JPEG without a frame header")


def _jpeg_segments(data: memoryview) -> Iterator[tuple[int, int]]:
    """Marker and place of each segment that has a length. Leave it at the first scan: pixels are no segments."""
    at = 2
    for _ in range(MAX_SEGMENTS):
        if data[at] != 0xFF:
            raise BadImage("undecodable", f"JPEG without a segment marker at byte {at}")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            at += 2
        else:
            yield marker, at
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    raise BadImage("undecodable", f"JPEG without a picture in its first {MAX_SEGMENTS} segments")


def _jpeg_frame(marker: int, precision: int, height: int, width: int, channels: int, rgb: bool) -> ImageHeader:
    """rgb: an Adobe segment says that the channels are no luma and chroma."""
    if precision != 8:
        raise BadImage("unsupported", f"JPEG with {precision} bits a channel; convert it to 8 bits")
    if marker not in (0xC0, 0xC1, 0xC2):
        raise BadImage(
            "unsupported",
            f"JPEG coding 0xFF{marker:02X} (lossless, hierarchical or arithmetic); save it as baseline JPEG",
        )
    if width == 0 or height == 0:
        raise BadImage("unsupported", f"JPEG that declares {width} x {height} pixels")
    kind = {1: "gray JPEG", 3: "RGB JPEG" if rgb else "JPEG", 4: "CMYK JPEG"}.get(
        channels, f"JPEG of {channels} channels"
    )
    return ImageHeader("JPEG", width, height, kind in ("gray JPEG", "JPEG"), kind)


_PNG_KINDS = {0: "gray PNG", 2: "PNG", 3: "palette PNG", 4: "PNG with alpha", 6: "PNG with alpha"}


def _png_header(data: memoryview, head: bytes) -> ImageHeader:
    if head[12:16] != b"IHDR":
        raise BadImage("truncated" if len(data) < 33 else "undecodable", "PNG without its first chunk")
    width, height, depth, colour = struct.unpack_from(">IIBB", head, 16)
    if width == 0 or height == 0 or colour not in _PNG_KINDS:
        raise BadImage("undecodable", f"PNG that declares {width} x {height} pixels of colour type {colour}")
    kind = _PNG_KINDS[colour]
    if depth != 8:
        return ImageHeader("PNG", width, height, False, f"{depth}-bit {kind}")
    if colour in (0, 2) and _has_colour_key(data):
        return ImageHeader("PNG", width, height, False, "PNG with alpha")
    return ImageHeader("PNG", width, height, colour in (0, 2), kind)


def _has_colour_key(data: memoryview) -> bool:
    """True when a tRNS chunk, which makes one colour transparent, stands before the pixels."""
    at = 33
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        if name == b"tRNS":
            return True
        if name in (b"IDAT", b"IEND"):
            return False
        at += 12 + length
    return False


_SIGNATURES = (
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"P4", "PPM"),
    (b"P5", "PPM"),
    (b"P6", "PPM"),
    (b"\0\0\0\x0cjP  ", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
)
_FOREIGN = (
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"8BPS", "Photoshop"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
)


def _other_header(data: memoryview, head: bytes) -> ImageHeader:
    """Formats other than JPEG and PNG: the signature here, the size by Pillow, which reads headers lazily."""
    name = next((name for mark, name in _SIGNATURES if head.startswith(mark)), None)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        name = "WEBP"
    if head[4:8] == b"ftyp":
        name = "AVIF" if b"avif" in head or b"avis" in head else None
        if name is None:
            raise BadImage(
                "unsupported", f"{head[8:12].decode('latin-1')} container (HEIC?); convert it to JPEG, PNG or WebP"
            )
    if name is None:
        foreign = next((name for mark, name in _FOREIGN if head.startswith(mark)), None)
        if foreign:
            raise BadImage("unsupported", f"{foreign}; convert it to JPEG, PNG or WebP")
        raise BadImage("not an image", f"the file begins with {head[:16]!r}")
    if name not in PILLOW_FORMATS:
        raise BadImage("unsupported", f"{name}, which this build of Pillow does not read; convert it to JPEG or PNG")
    if name == "WEBP":
        _check_end(data, name)  # before Pillow, which needs the whole file even for the header
    with open_with_pillow(data, name) as image:
        width, height = image.size
    if width == 0 or height == 0:
        raise BadImage("undecodable", f"{name} that declares {width} x {height} pixels")
    return ImageHeader(name, width, height, False, name)


def open_with_pillow(data: memoryview, name: str) -> Image.Image:
    """Open lazily with Pillow as `name`, one of PILLOW_FORMATS. Raises BadImage where its parsers fail on the bytes.

    They raise OSError, SyntaxError, ValueError, struct.error, IndexError and more, so all but MemoryError is caught.
    """
    try:
        return Image.open(io.BytesIO(data), formats=("JPEG", "MPO") if name == "JPEG" else (name,))
    except MemoryError:
        raise
    except Exception as error:
        raise bad_image_of(error) from error


def bad_image_of(error: Exception) -> BadImage:
    """The BadImage for what a decoder raised, with a closer cause than "undecodable" where its words tell one."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, Image.DecompressionBombError):
        return BadImage("too many pixels", text)
    if "truncat" in text.lower() or "incomplete" in text.lower():
        return BadImage("truncated", text)
    return BadImage("undecodable", f"{type(error).__name__}: {text}")


def _check_end(data: memoryview, name: str) -> None:
    """Raise BadImage("truncated") when the end mark is missing. Bytes after it are allowed: cameras append to JPEGs."""
    if name == "JPEG":
        if data[-2:] != b"\xff\xd9" and not _jpeg_ends(data):
            raise BadImage("truncated", f"JPEG of {len(data)} bytes has no end marker")
    elif name == "PNG":
        if data[-8:-4] != b"IEND" and b"\0\0\0\0IEND" not in bytes(data):
            raise BadImage("truncated", f"PNG of {len(data)} bytes has no IEND chunk")
    elif name == "WEBP":
        declared = struct.unpack_from("<I", data, 4)[0] + 8
        if declared > len(data):
            raise BadImage("truncated", f"WebP of {len(data)} bytes declares {declared}")


def _jpeg_ends(data: memoryview) -> bool:
    """True when an end marker follows the start of the first scan. Before it, in a thumbnail, one means nothing."""
    try:
        scan = next(at for marker, at in _jpeg_segments(data) if marker == 0xDA)
    except (struct.error, IndexError):
        return False
    return b"\xff\xd9" in bytes(data[scan:])
