"""What lies in a folder, without what other programs leave there."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

# By other systems, archives, network drives and editors; names that begin with a dot are passed over too
LEFT_BEHIND = frozenset(
    {
        "__macosx",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "@eadir",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "__pycache__",
    }
)


def is_left_behind(name: str) -> bool:
    """Whether nobody put a file or folder of that name there on purpose: hidden ones (.ipynb_checkpoints, ._cat.jpg,
    .DS_Store), __MACOSX, Thumbs.db and their like."""
    return name.startswith(".") or name.lower() in LEFT_BEHIND


def subfolders(root: Path) -> list[str]:
    """The names of the folders in `root`, sorted. Raises OSError as os.scandir does."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if not is_left_behind(entry.name) and entry.is_dir())


def files_below(root: str | Path) -> Iterator[Path]:
    """All files in `root` and below it, links followed, folder by folder in the order of their paths; also links that
    lead nowhere, but no pipes, sockets or devices, which would be waited for. A folder that contains itself, or
    `root`, by a link is not entered again.

    Raises OSError for a folder that cannot be read.
    """
    around = frozenset((at.st_dev, at.st_ino) for at in map(os.stat, Path(root).resolve().parents))
    for folder, names in sorted(_folders(str(root), around)):
        for name in sorted(names):
            yield Path(folder, name)


def _folders(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, list[str]]]:
    """Each folder, with the names of its files. above: the folders around it, by device and inode."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_left_behind(entry.name):
                continue
            if entry.is_dir():
                yield from _folders(entry.path, above | {here})
            elif not _is_waited_for(entry):
                files.append(entry.name)
    yield folder, files


def _is_waited_for(entry: os.DirEntry[str]) -> bool:
    try:
        mode = entry.stat().st_mode
    except OSError:  # a link that leads nowhere
        return False
    return not stat.S_ISREG(mode)
