"""Small shards, good and hostile, written by the tests themselves."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from instella_ray.runs import RECORD

Members = list[tuple[str, bytes]]


def image_bytes(seed: int = 0, size: tuple[int, int] = (64, 48), kind: str = "JPEG", **save: Any) -> bytes:
    """A smooth random image, encoded."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(buffer, kind, **save)
    return buffer.getvalue()


def sample(key: str, seed: int = 0, caption: str = "a smooth image", **meta: Any) -> Members:
    return [
        (f"{key}.jpg", image_bytes(seed)),
        (f"{key}.txt", caption.encode()),
        (f"{key}.json", json.dumps(meta).encode()),
    ]


def tar_bytes(members: Members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    """What a job has made, by the names of the files: all but its record, which is another one each time."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def bomb(width: int = 50_000, height: int = 50_000) -> bytes:
    """A PNG of a few bytes that claims ``width x height`` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def converted(mode: str, kind: str) -> bytes:
    """An image of another mode than RGB."""
    image = Image.open(io.BytesIO(image_bytes(20)))
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
    buffer = io.BytesIO()
    (Image.fromarray(grey) if mode == "I;16" else image.convert(mode)).save(buffer, kind)
    return buffer.getvalue()


def animated() -> bytes:
    frames = [Image.open(io.BytesIO(image_bytes(seed))) for seed in (21, 22, 23)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], duration=100)
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return image_bytes(24, exif=exif)


HOSTILE: dict[str, tuple[Members, str]] = {
    "good": (sample("good", 1), "kept"),
    "html": ([("html.jpg", b"<html>gone</html>"), ("html.txt", b"an image")], "quarantined:undecodable"),
    "cut": ([("cut.jpg", image_bytes(2)[:-300]), ("cut.txt", b"an image")], "quarantined:undecodable"),
    "empty": ([("empty.jpg", b""), ("empty.txt", b"an image")], "quarantined:undecodable"),
    "bomb": ([("bomb.png", bomb()), ("bomb.txt", b"an image")], "quarantined:too_many_pixels"),
    "nocaption": ([("nocaption.jpg", image_bytes(3))], "quarantined:no_caption"),
    "noimage": ([("noimage.txt", b"an image")], "quarantined:no_image"),
    "badjson": ([*sample("badjson", 4)[:2], ("badjson.json", b"{not json")], "quarantined:bad_metadata"),
    "again": (sample("good", 5), "quarantined:duplicate_key"),
    "escape": ([("../../escape.jpg", image_bytes(6)), ("../../escape.txt", b"an image")], "quarantined:unsafe_name"),
    "watermark": (sample("watermark", 7, pwatermark=0.99), "dropped:watermark"),
    "unsafe": (sample("unsafe", 8, punsafe=0.99), "dropped:unsafe"),
    "long": (sample("long", 9, caption="word " * 20_000), "dropped:caption_length"),
    "narrow": ([("narrow.jpg", image_bytes(10, (400, 40))), ("narrow.txt", b"an image")], "dropped:aspect_ratio"),
    "small": ([("small.jpg", image_bytes(11, (20, 20))), ("small.txt", b"an image")], "dropped:small"),
    "nul": (sample("nul", 12, caption="an image\0 with\nNUL"), "kept"),
    "cmyk": ([("cmyk.jpg", converted("CMYK", "JPEG")), ("cmyk.txt", b"in print colours")], "kept"),
    "sixteen": ([("sixteen.png", converted("I;16", "PNG")), ("sixteen.txt", b"16 bits a pixel")], "kept"),
    "palette": ([("palette.png", converted("P", "PNG")), ("palette.txt", b"a few colours")], "kept"),
    "alpha": ([("alpha.png", converted("RGBA", "PNG")), ("alpha.txt", b"see through")], "kept"),
    "animated": ([("animated.webp", animated()), ("animated.txt", b"moving images")], "kept"),
    "rotated": ([("rotated.jpg", rotated()), ("rotated.txt", b"held upright")], "kept"),
    "listjson": ([*sample("listjson", 15)[:2], ("listjson.json", b"[1, 2]")], "quarantined:bad_metadata"),
    "last": (sample("last", 14), "kept"),
}
"""Samples of one shard by name, with the verdict that each must get."""

IMAGE_SIZES = [(1, 1), (1, 3000), (3000, 1), (9, 12), (300, 40), (640, 480)]
"""Images that every scorer must take: width and height."""
