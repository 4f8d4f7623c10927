"""Text for people and programs, whatever a file is called and whatever encoding the output has."""

import codecs
import json
import math
import sys
import unicodedata
from os import PathLike, fspath
from typing import Any

# What the commands print beyond ASCII, for outputs that have no more.
_PLAIN = {"×": "x", "…": "...", "–": "-", "†": "+", "²": "^2", "⁶": "^6", "⁹": "^9", "·": "*", "µ": "u"}
_ESCAPED = ("Cc", "Cs", "Zl", "Zp")  # control characters, lone surrogates, line and paragraph separators
_HANDLER = "crossvit.plain"


def printable(name: object) -> str:
    """A file's or class's name in one line that any encoding of Unicode has: bytes that are no UTF-8 as \\xe9, control
    characters as \\n or \\x1b.
    """
    text = utf8(fspath(name) if isinstance(name, PathLike) else str(name))
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in _ESCAPED else c for c in text)


def utf8(text: str) -> str:
    """`text` with the bytes in it that are no UTF-8, which Python holds as lone surrogates, as \\xe9."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a surrogate that is no byte's
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: names as `utf8` leaves them, and null for what is no finite number."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return utf8(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {_plain(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def print_line(text: str, *, end: str = "\n", flush: bool = False) -> None:
    """`print`, whose OSError says that it was standard output that could not be written."""
    try:
        print(text, end=end, flush=flush)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def flush_output() -> None:
    """Writes what is still held back. Raises as `print_line`."""
    if sys.stdout is not None:
        print_line("", end="", flush=True)


def use_any_encoding() -> None:
    """Has standard output and error print what their encoding lacks in plain letters, or escaped."""
    codecs.register_error(_HANDLER, _in_plain_letters)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_HANDLER)


def _in_plain_letters(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    bad = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in bad), error.end
