"""What builds C++ and CUDA sources; imported by path, by build_cpu.py, build_cuda.py and setup.py.

A file is compiled when what it is made of has changed: beside an object lies a record of the command and of the
contents of every file that the compiler read. Of PyTorch nothing but its stable C interface is compiled against, as it
was in the oldest PyTorch that the libraries run on.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

OLDEST_TORCH = 0x020B << 48  # 2.11, as its headers write it
TORCH = Path(torch.__file__).parent
TORCH_FLAGS = [
    f"-DTORCH_TARGET_VERSION={OLDEST_TORCH:#x}",
    f"-isystem{TORCH / 'include'}",
]
TORCH_LIBRARIES = [f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
# What all C++ is compiled with.
COMMON_FLAGS = [
    *("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    *("-DNDEBUG", "-fwrapv", "-Wall", "-Wextra", "-g0"),
    "-Wno-missing-field-initializers",  # what a designated initializer does not name is zero
]


class NotBuiltError(Exception):
    """Why something cannot be built, in words."""


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Whoever reads ``path`` meanwhile sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.chmod(mode)
    os.replace(temporary, path)


def compiler_version(command: list[str]) -> str:
    """The first line of what a compiler says of itself; empty where there is none."""
    try:
        told = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return told.stdout.partition("\n")[0]


def digest(path: str) -> str | None:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return None


def files_read(depfile: Path) -> list[str]:
    """The prerequisites that a compiler wrote down for make."""
    _, _, names = depfile.read_text().replace("\\\n", " ").partition(": ")
    return [name.replace("\\ ", " ") for name in re.split(r"(?<!\\)\s+", names.strip())]


def together(sources: Iterable[Path], path: Path) -> Path:
    """Writes a source that includes all of these, so that the compiler reads torch's headers once: they take it longer
    than what they are for."""
    return written(path, "".join(f'#include "{source.resolve()}"\n' for source in sources))


def written(path: Path, text: str) -> Path:
    """The file, once it holds this text."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path


def compiles(source: Path, command: list[str], compiler: str) -> bool:
    """Whether the command makes an object of the source. Where it did, that is remembered beside it; where it did not,
    what was missing may have been installed since."""
    try:
        make(source.with_suffix(".o"), [*command, "-c", str(source)], compiler, quiet=True)
    except NotBuiltError:
        return False
    return True


def make(
    output: Path,
    command: list[str],
    compiler: str,
    inputs: Sequence[Path] = (),
    free: Sequence[str] = (),
    quiet: bool = False,
) -> Path:
    """Runs the command, to which -o output is added, unless its result is there. It reads `inputs`, or what it writes
    down itself; the flags `free` do not change what comes out, `compiler` names who does it. What it says is printed,
    unless `quiet`."""
    record, depfile = output.with_suffix(".json"), output.with_suffix(".d")
    key = [compiler, *command]
    try:
        last = json.loads(record.read_text())
        if output.exists() and last["key"] == key and all(digest(p) == d for p, d in last["read"].items()):
            return output
    except (OSError, ValueError, KeyError):
        pass
    output.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    written_down = [] if inputs else ["-MMD", "-MF", str(depfile)]
    done = subprocess.run(
        [*command, *free, *written_down, "-o", str(output)], capture_output=True, text=True, check=False
    )
    said = done.stderr + done.stdout
    if said.strip() and not quiet:
        print(said, file=sys.stderr)
    if done.returncode:
        lines = said.strip().splitlines() or [f"{command[0]} ended with {done.returncode}"]
        first = next((line for line in lines if "error" in line.lower()), lines[-1])
        source = f"{command[command.index('-c') + 1]}: " if "-c" in command else ""
        raise NotBuiltError(f"{source}it did not compile ({first.strip()})")
    read = map(str, inputs) if inputs else files_read(depfile)
    record.write_text(json.dumps({"key": key, "read": {path: digest(path) for path in read}}))
    return output
