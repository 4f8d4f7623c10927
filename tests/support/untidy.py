"""What the tests of the command line's untidy world share: odd files and folders, and pictures of a few bytes."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

LATIN1 = os.fsdecode(b"caf\xe9")  # a name that is no UTF-8


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (20, 16)) -> Path:
    """Noise as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")
    return path


def classes(root: Path, *names: str, each: int = 2) -> Path:
    """A folder with a folder of `each` pictures for every name."""
    for k, name in enumerate(names):
        for i in range(each):
            picture(root / name / f"{i}.png", seed=10 * k + i)
    return root


def split(root: Path, *names: str, each: int = 2) -> Path:
    """A folder with train/ and val/ of such classes."""
    classes(root / "train", *names, each=each)
    classes(root / "val", *names, each=1)
    return root


def png(path: Path, width: int, height: int, colour: int = 2, bits: int = 8, palette: bytes = b"") -> Path:
    """A black PNG, compressed to little. colour: the format's number (0 grey, 2 RGB, 3 palette, 6 RGBA)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = bytes(1 + (width * channels * bits + 7) // 8)
    packer = zlib.compressobj(9)
    content = b"".join([packer.compress(row) for _ in range(height)] + [packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"PLTE", palette) if palette else b"", chunk(b"IDAT", content)]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b""))
    return path
