"""Pictures as data sets really hold them: plain, odd, broken and hostile ones, drawn here so that nothing is stored."""

from __future__ import annotations

import functools
import io
import struct
import zlib

import numpy as np
from PIL import Image

from meter_fast.data.images import ImageTransform


def smooth(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A picture like a blurred photograph: uint8 [height, width, channels]."""
    rng = np.random.default_rng([seed, width, height])
    planes = [Image.fromarray(rng.integers(0, 256, (7, 9), dtype=np.uint8)) for _ in range(channels)]
    return np.stack([np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) for plane in planes], axis=2)


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """The hardest picture to resize alike: uint8 [height, width, channels]."""
    return np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encode(picture: np.ndarray | Image.Image, form: str = "JPEG", **options: object) -> bytes:
    """Encode with Pillow."""
    image = (
        picture
        if isinstance(picture, Image.Image)
        else Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
    )
    out = io.BytesIO()
    image.save(out, form, **({"quality": 90} if form == "JPEG" else {}) | options)
    return out.getvalue()


def array(data: bytes) -> np.ndarray:
    """Bytes as the loader hands them over: a read-only uint8 array, as from a mapped file."""
    return np.frombuffer(data, np.uint8)


def published(data: bytes, transform: ImageTransform) -> np.ndarray:
    """The published steps, taken one by one with Pillow: uint8 [S,S,3] before normalising."""
    mode = "RGBA" if transform.name == "clip" else "RGB"
    image = Image.open(io.BytesIO(data)).convert(mode)
    size, (width, height) = transform.size, image.size
    new = (size, size * height // width) if width <= height else (size * width // height, size)
    image = image.resize(new, Image.Resampling.BICUBIC)
    left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)).convert("RGB"))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG put together by hand: rows = filter byte and pixels of each row; chunks stand before the pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    middle = b"".join(chunk(name, body) for name, body in chunks)
    return b"\x89PNG\r\n\x1a\n" + head + middle + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def with_thumbnail(jpeg: bytes, small: np.ndarray) -> bytes:
    """The JPEG with a whole small one, end marker and all, in a segment before its own frame."""
    body = b"thumbnail\0" + encode(small)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def patch_frame(jpeg: bytes, offset: int, value: bytes) -> bytes:
    """Overwrite bytes of a baseline JPEG's frame header; offset 4 is the precision, 5 the height, 7 the width."""
    at = jpeg.index(b"\xff\xc0") + offset
    return jpeg[:at] + value + jpeg[at + len(value) :]


@functools.cache
def usable() -> dict[str, bytes]:
    """Pictures that must give a tensor, equal to the published steps unless the name says 16-bit or extreme."""
    picture, small = smooth(101, 70), smooth(40, 30)
    rgba = np.concatenate([picture, smooth(101, 70, 1, seed=1)], axis=2)
    frames = [Image.fromarray(smooth(50, 40, seed=seed)) for seed in range(3)]
    rotated = Image.Exif()
    rotated[0x0112] = 6
    palette = Image.fromarray(picture).quantize(16)
    gray16 = struct.pack(">30H", *range(0, 60000, 2000))
    rows16 = b"".join(b"\0" + gray16[at : at + 12] for at in range(0, 60, 12))
    rgb16 = b"".join(b"\0" + gray16[:36] for _ in range(6))
    key_rows = b"".join(b"\0" + row.tobytes() for row in small)
    colour_key = struct.pack(">HHH", *(int(value) for value in small[10, 10]))
    return {
        "JPEG": encode(picture),
        "JPEG with bytes after its end": encode(picture) + b"appended by a camera" * 9,
        "progressive JPEG": encode(picture, progressive=True),
        "JPEG without chroma subsampling": encode(picture, subsampling=0),
        "JPEG stored as RGB": encode(picture, keep_rgb=True),
        "gray JPEG": encode(smooth(90, 70, 1)),
        "CMYK JPEG": encode(Image.fromarray(picture).convert("CMYK")),
        "JPEG with EXIF rotation": encode(picture, exif=rotated),
        "JPEG with a thumbnail": with_thumbnail(encode(picture), small),
        "multi-picture JPEG": encode(frames[0], "MPO", save_all=True, append_images=frames[1:]),
        "PNG": encode(picture, "PNG"),
        "gray PNG": encode(smooth(90, 70, 1), "PNG"),
        "RGBA PNG": encode(rgba, "PNG"),
        "gray PNG with alpha": encode(Image.fromarray(rgba).convert("LA"), "PNG"),
        "palette PNG": encode(palette, "PNG"),
        "palette PNG with transparency": encode(palette, "PNG", transparency=bytes(range(0, 256, 16))),
        "PNG with a transparent colour": png(40, 30, 8, 2, key_rows, (b"tRNS", colour_key)),
        "1-bit PNG": encode(Image.fromarray(picture).convert("1"), "PNG"),
        "16-bit gray PNG": png(6, 5, 16, 0, rows16),
        "16-bit PNG": png(6, 6, 16, 2, rgb16),
        "animated PNG": encode(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "animated GIF": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated WebP": encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
        "WebP": encode(picture, "WEBP"),
        "BMP": encode(picture, "BMP"),
        "CMYK TIFF": encode(Image.fromarray(picture).convert("CMYK"), "TIFF"),
        "1 x 1 JPEG": encode(smooth(1, 1)),
        "1 x 1 PNG": encode(smooth(1, 1), "PNG"),
        "extreme 20000 x 1 PNG": encode(smooth(20000, 1), "PNG"),
        "extreme 1 x 20000 JPEG": encode(smooth(1, 20000)),
    }


@functools.cache
def unusable() -> dict[str, tuple[bytes, str]]:
    """Files that must be refused, each with the cause."""
    jpeg, picture = encode(smooth(101, 70)), smooth(101, 70)
    thumbnailed = with_thumbnail(jpeg, smooth(20, 20))
    whole_png, webp = encode(picture, "PNG"), encode(picture, "WEBP")
    flat = png(8, 8, 8, 0, bytes(72))
    return {
        "empty file": (b"", "zero bytes"),
        "web page saved as .jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not an image"),
        "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
        "zeros": (bytes(5000), "not an image"),
        "one byte": (b"\xff", "not an image"),
        "truncated JPEG": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated JPEG with a whole thumbnail": (thumbnailed[:-500], "truncated"),
        "JPEG cut in its header": (jpeg[:100], "truncated"),
        "JPEG of three bytes": (jpeg[:3], "truncated"),
        "truncated PNG": (whole_png[: len(whole_png) // 2], "truncated"),
        "PNG cut in its header": (whole_png[:20], "truncated"),
        "truncated WebP": (webp[: len(webp) // 2], "truncated"),
        "truncated BMP": (encode(picture, "BMP")[:2000], "truncated"),
        "truncated GIF": (encode(picture, "GIF")[:900], "truncated"),
        "JPEG of 12 bits": (patch_frame(jpeg, 4, b"\x0c"), "unsupported"),
        "lossless JPEG": (jpeg.replace(b"\xff\xc0", b"\xff\xc3", 1), "unsupported"),
        "HEIC": (b"\0\0\0\x18ftypheic" + bytes(100), "unsupported"),
        "JPEG XL": (b"\xff\x0a" + bytes(100), "unsupported"),
        "TIFF of 32-bit floats": (encode(Image.fromarray(np.ones((5, 5), np.float32)), "TIFF"), "unsupported"),
        "JPEG of no height": (patch_frame(jpeg, 5, b"\0\0"), "unsupported"),
        "PNG with a damaged header": (flat[:29] + bytes(4) + flat[33:], "undecodable"),
        "PNG with pixels missing": (png(8, 8, 8, 0, bytes(30)), "truncated"),
        "JPEG without tables": (jpeg[:2] + jpeg[jpeg.index(b"\xff\xc0") :], "undecodable"),
        "JPEG of segments alone": (b"\xff\xd8" + b"\xff\xe1\0\2" * 50_000, "undecodable"),
    }


@functools.cache
def bombs() -> dict[str, bytes]:
    """Small files that declare more pixels than any limit, well formed but for the pixels."""
    jpeg, bmp = encode(smooth(101, 70)), bytearray(encode(smooth(8, 8), "BMP"))
    bmp[18:26] = struct.pack("<ii", 60_000, 60_000)
    gif = bytearray(encode(smooth(8, 8), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_000, 65_000)
    tiff = bytearray(encode(smooth(8, 8), "TIFF"))
    for entry in (tiff.index(struct.pack("<HHI", 256, 4, 1)), tiff.index(struct.pack("<HHI", 257, 4, 1))):
        tiff[entry + 8 : entry + 12] = struct.pack("<I", 60_000)
    return {
        "PNG": png(60_000, 60_000, 8, 2, bytes(100)),
        "1-bit PNG": png(60_000, 60_000, 1, 0, bytes(100)),
        "JPEG": patch_frame(jpeg, 5, struct.pack(">HH", 60_000, 60_000)),
        "BMP": bytes(bmp),
        "GIF": bytes(gif),
        "TIFF": bytes(tiff),
    }
