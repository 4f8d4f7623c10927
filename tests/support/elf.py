"""The symbols that a shared library asks of others, read from the file itself: no binutils are needed."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

WEAK = 2


class Symbol(NamedTuple):
    """A symbol that a library uses and does not define."""

    name: str
    version: str  # such as GLIBC_2.17; empty where it has none
    weak: bool  # the library loads without it


def undefined(path: Path) -> list[Symbol]:
    """The symbols that a library of 64 bits asks for. ValueError where the file is none."""
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{path} is no little-endian library of 64 bits")
    sections = dict(_sections(data))
    strings = sections[".dynstr"]
    versions = _versions(sections.get(".gnu.version_r", b""), strings)
    numbers = sections.get(".gnu.version", b"")
    found = []
    for i, (name, info, _, section, _, _) in enumerate(struct.iter_unpack("<IBBHQQ", sections[".dynsym"])):
        if i and section == 0:
            number = struct.unpack_from("<H", numbers, 2 * i)[0] & 0x7FFF if numbers else 0
            found.append(Symbol(_text(strings, name), versions.get(number, ""), info >> 4 == WEAK))
    return found


def _text(strings: bytes, start: int) -> str:
    return strings[start : strings.index(b"\0", start)].decode()


def _sections(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the sections."""
    (start,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, start + i * size) for i in range(count)]
    _, _, _, _, offset, length = headers[names_at]
    names = data[offset : offset + length]
    for name, kind, _, _, offset, length in headers:
        yield _text(names, name), b"" if kind == 8 else data[offset : offset + length]  # 8: takes no room in the file


def _versions(needed: bytes, strings: bytes) -> dict[int, str]:
    """The versions' names by their numbers in the table of symbols."""
    found, at = {}, 0
    while needed:
        _, count, _, first, following = struct.unpack_from("<HHIII", needed, at)
        entry = at + first
        for _ in range(count):
            _, _, number, name, step = struct.unpack_from("<IHHII", needed, entry)
            found[number] = _text(strings, name)
            entry += step
        if not following:
            break
        at += following
    return found
