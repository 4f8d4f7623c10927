"""Text that people and spreadsheets have written: labels.csv of a folder of images, and files of classes' names."""

import csv
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..system.files import read_file
from ..system.text import printable

_MOST = 1 << 26  # bytes of a file of names: a longer one is something else
_COLUMNS = ("image", "labels")


@dataclass(frozen=True)
class Row:
    """A line of labels.csv: the image's name and its labels."""

    image: str
    labels: list[str]


def read_names(path: str | os.PathLike[str]) -> list[str]:
    """Names from a file of one per line, or of JSON: a list, or an object by index (values that are lists, as
    ImageNet's, end in the name). A byte order mark is passed over.

    Raises ValueError, without the path, for other content, a device, or more than 64 MB; OSError as open() does.
    """
    try:
        text = read_file(path, _MOST, "a file of names").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in UTF-8, got the byte 0x{error.object[error.start]:02x}") from error
    if "\0" in text:
        raise ValueError("expected text, got bytes that are zero")
    if not text.lstrip().startswith(("[", "{")):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("expected a JSON list or object of names, got one nested too deep") from error
    if isinstance(content, dict):
        if missing := [str(i) for i in range(len(content)) if str(i) not in content]:
            raise ValueError(f"expected an entry for every index from 0, there is no '{missing[0]}'")
        content = [content[str(i)] for i in range(len(content))]
    names = [name[-1] if isinstance(name, list) and name else name for name in content]
    if odd := [name for name in names if not isinstance(name, str | int | float)]:
        raise ValueError(f"expected names, got {str(odd[0])[:80]!r}")
    return [str(name) for name in names]


def read_labels(path: Path) -> list[Row]:
    """The rows of a labels.csv under its line `image,labels`, several labels with semicolons between.

    A byte order mark, any kind of line end, blank lines and the header again, as joined files have it, are passed over.
    Names of images may be any bytes. Raises ValueError that names the line for what has no such columns, a row of other
    length, and labels that are not UTF-8; OSError as open() does.
    """
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    header: list[str] | None = None
    try:
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            cells = [field.strip() for field in fields]
            if header is None:
                header = _header(path, cells)
            elif [cell.lower() for cell in cells] != header:
                rows.append(_row(f"{path}, line {reader.line_num}", header, cells))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: no CSV: {error}") from error
    if not rows:
        raise ValueError(f"{path} must have a line 'image,labels' and one line per image below")
    return rows


def _header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.lower() for cell in cells]
    if any(names.count(column) != 1 for column in _COLUMNS):
        raise ValueError(
            f"{path} must have a line 'image,labels' and one line per image below, its first line is "
            f"{printable(','.join(cells))[:80]!r}"
        )
    return names


def _row(place: str, header: list[str], cells: list[str]) -> Row:
    if len(cells) > len(header):
        raise ValueError(
            f"{place}: {len(cells)} fields under {len(header)} columns (several labels have semicolons between)"
        )
    found = dict(zip(header, cells))
    image, labels = found["image"], found.get("labels", "")
    if not image:
        raise ValueError(f"{place}: no image is named")
    if printable(labels) != labels:
        raise ValueError(f"{place}: expected labels in UTF-8 without control characters, got {printable(labels)!r}")
    return Row(image, [label.strip() for label in labels.split(";") if label.strip()])
