"""Files that appear under their names only when they are complete, whenever the process is killed."""

import errno
import io
import os
import re
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import IO, Any

TEMPORARY = ".writing"  # suffix of what is not complete
# Windows opens nothing that would have to be waited for.
_WITHOUT_WAITING = getattr(os, "O_NONBLOCK", 0)
_LONGEST = 48  # characters of a name that a temporary name takes over
# What safetensors' writer raises instead of an OSError; the number is errno
_WRITERS = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+)")


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path`; the file written there takes its place when the block ends well and it is on the
    disk, and is removed when the block fails. A link stays one, and what it points to is replaced; into what is no
    file, such as /dev/stdout or a pipe that somebody reads, the content is copied.

    Raises FileNotFoundError before anything is written if the folder does not exist, and OSError naming `path` where
    the system refuses to write, whoever wrote.
    """
    path = Path(path)
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {target.parent}")
    try:
        if _is_special(path):
            with tempfile.TemporaryDirectory() as folder:
                temporary = Path(folder, "content")
                yield temporary
                with open(temporary, "rb") as source, open(path, "wb", opener=_without_waiting) as sink:
                    shutil.copyfileobj(source, sink)
            return
        temporary = target.with_name(f".{_short(target.name)}.{os.getpid()}{TEMPORARY}")
        try:
            yield temporary
            _synchronise(temporary)
            os.replace(temporary, target)
            with suppress(OSError):  # not every file system can, and the file is there
                _synchronise(target.parent)  # the new name too is on the disk
        except Exception as error:
            _raise_as_system_error(error, temporary)
            raise
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno is None or (error.filename is not None and not _is_temporary(error.filename)):
            raise
        raise OSError(error.errno, error.strerror or os.strerror(error.errno), str(path)) from error


class _Patient(io.FileIO):
    """Takes whatever is written, also where the system does not; `failed` is what it first said."""

    failed: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest and self.failed is None:
            try:
                rest = rest[super().write(rest) :]
            except OSError as error:
                self.failed = error
        return size


@contextmanager
def patient_file(path: str | PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write to that raises the system's OSError at the end of the block alone: torch's writer aborts the
    process where a write fails within.
    """
    with _Patient(path, "wb") as raw:
        buffered = io.BufferedWriter(raw)
        yield buffered
        buffered.flush()
        failed = raw.failed
    if failed is not None:
        raise failed


def write_text(path: str | PathLike[str], text: str) -> None:
    """Writes `text`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_file(path: str | PathLike[str], most: int, what: str = "a file") -> bytes:
    """All of a file or pipe. A pipe that nobody writes to is empty, instead of being waited for.

    Raises ValueError, without the path, for a folder, a device, or more than `most` bytes, which is not `what` was
    expected; OSError as open() does.
    """
    descriptor = os.open(path, os.O_RDONLY | _WITHOUT_WAITING)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise ValueError("expected a file, it is a folder")
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise ValueError("expected a file, it is a device")
        _wait_again(descriptor)
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(most + 1)
    finally:
        os.close(descriptor)
    if len(content) > most:
        size = f"{most >> 20} MB" if most >> 20 else f"{most >> 10} kB"
        raise ValueError(f"expected {what}, it has more than {size}")
    return content


def try_to_write(path: str | PathLike[str]) -> None:
    """Raises OSError, naming `path`, if no file can be made there; leaves what is there as it was."""
    path = Path(path)
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if _is_special(path):
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return
    temporary = target.with_name(f".{_short(target.name)}.{os.getpid()}{TEMPORARY}")
    try:
        longest = os.pathconf(target.parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
        if len(os.fsencode(target.name)) > longest:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left half written."""
    for path in folder.glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def _is_special(path: Path) -> bool:
    """Whether something is at `path` that must not be replaced by a file: a device, a pipe, a socket."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _without_waiting(path: str, flags: int) -> int:
    """os.open that refuses a pipe nobody reads from, ENXIO, instead of waiting for one who does."""
    descriptor = os.open(path, flags | _WITHOUT_WAITING)
    _wait_again(descriptor)
    return descriptor


def _wait_again(descriptor: int) -> None:
    """Undoes `_WITHOUT_WAITING`, where there is something to undo."""
    if _WITHOUT_WAITING:
        os.set_blocking(descriptor, True)


def _short(name: str) -> str:
    """`name`, or where it would leave no room for more a beginning of it that is told apart by a checksum."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 9]}-{zlib.crc32(os.fsencode(name)):08x}"


def _is_temporary(name: object) -> bool:
    return os.fsdecode(name).endswith(TEMPORARY) if isinstance(name, str | bytes) else False


def _raise_as_system_error(error: Exception, temporary: Path) -> None:
    """Raises the OSError behind `error`, which came from a library that wrote `temporary`, if there is one."""
    found = None if isinstance(error, OSError) else _WRITERS.search(str(error))
    if found:
        code = int(found[1] or found[2])
        raise OSError(code, os.strerror(code), str(temporary)) from error


def _synchronise(path: Path) -> None:
    # Windows synchronises what may be written to; others refuse to open a folder for writing.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
