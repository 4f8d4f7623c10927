"""python tests/support/audit_wheel.py WHEEL …: what a built wheel is and has, or a line for each thing that is wrong.

its tag         py3-none, and manylinux_2_28 or an older one
its files       the two packages, the CPU's library and its record, and the CUDA library where the record says so;
                not the emulation, nor the inspection module, nor sources; of modules, those of the source tree
its libraries   ask for PyTorch's stable C interface and the runtimes of manylinux_2_28 alone
its metadata    what pyproject.toml says of the package, and a README
"""

import hashlib
import json
import re
import sys
import tempfile
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import elf
import symbols

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "crossvit_kernels"
FILE = re.compile(r"crossvit(_kernels)?/[\w/]+\.py|crossvit(_kernels)?/py\.typed|[^/]+\.dist-info/.*")
LIBRARIES = {f"{PACKAGE}/_cpu.so", f"{PACKAGE}/_cuda.so"}
OTHER = {f"{PACKAGE}/_build.json", f"{PACKAGE}/triton_kernels/tuned.json"}
FIELDS = ("Name", "Version", "Summary", "Author", "Keywords", "License-Expression", "Requires-Python", "Project-URL")


def wrong_tag(name: str) -> list[str]:
    """What is wrong with a wheel's name."""
    python, abi, platforms = name.removesuffix(".whl").split("-")[-3:]
    found = [] if (python, abi) == ("py3", "none") else [f"the tag is {python}-{abi}, expected py3-none"]
    for platform in platforms.split("."):
        glibc = re.fullmatch(r"manylinux_2_(\d+)_(x86_64|aarch64)|manylinux(2014)_(x86_64|aarch64)", platform)
        if glibc is None or int(glibc[1] or 17) > 28:
            found.append(f"the platform is {platform}, expected manylinux_2_28 or an older one")
    return found


def wrong_files(names: set[str], record: dict) -> list[str]:
    """What is missing, and what does not belong there."""
    expected = {f"{PACKAGE}/_cpu.so", *OTHER, f"{PACKAGE}/__init__.py", "crossvit/__init__.py"}
    if record["cuda"]["missing"] is None:
        expected.add(f"{PACKAGE}/_cuda.so")
    found = [f"{name} is missing" for name in sorted(expected - names)]
    allowed = {name for name in names if FILE.fullmatch(name)} | OTHER | LIBRARIES
    found += [f"{name} does not belong into a wheel" for name in sorted(names - allowed)]
    if record["missing"] is not None:
        found.append(f"the CPU's kernels were not built: {record['missing']}")
    if record["sanitize"]:
        found.append(f"it was built with -fsanitize={record['sanitize']}")
    return found


def wrong_modules(names: set[str], root: Path = ROOT) -> list[str]:
    """Modules of the source tree that were not packed, and those that an earlier build left behind."""
    sources = {str(p.relative_to(root)) for folder in ("crossvit", PACKAGE) for p in (root / folder).rglob("*.py")}
    modules = {name for name in names if name.endswith(".py")}
    return [
        *(f"{name} is missing" for name in sorted(sources - modules)),
        *(f"{name} is not in the source tree" for name in sorted(modules - sources)),
    ]


def wrong_metadata(data: bytes) -> list[str]:
    """What a package index would not show."""
    metadata = message_from_bytes(data)
    found = [f"the metadata has no {name}" for name in FIELDS if not metadata[name]]
    if metadata["Description-Content-Type"] != "text/markdown" or len(str(metadata.get_payload())) < 1000:
        found.append("the metadata has no README")
    return found


def wrong_symbols(path: Path, name: str) -> list[str]:
    """What a library asks for and may not; prints what it asks for."""
    asked = elf.undefined(path)
    versions = ", ".join(filter(None, (symbols.newest(asked, family) for family in symbols.NEWEST)))
    stable = sum(bool(symbols.TORCH.fullmatch(symbol.name)) for symbol in asked)
    print(f"  {name}: {path.stat().st_size:,} bytes; {stable} functions of PyTorch's C interface; newest: {versions}")
    found = [f"{name} asks for {symbol.name}, which is not stable" for symbol in symbols.strange(asked)]
    return found + [f"{name} asks for {symbol.name} of {symbol.version}" for symbol in symbols.newer(asked)]


def audit(path: Path) -> list[str]:
    """All that is wrong with a wheel."""
    with ZipFile(path) as wheel, tempfile.TemporaryDirectory() as folder:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        record = json.loads(wheel.read(f"{PACKAGE}/_build.json"))
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        found = [*wrong_tag(path.name), *wrong_files(names, record), *wrong_modules(names)]
        found += wrong_metadata(wheel.read(metadata))
        for name in sorted(name for name in names if name.endswith(".so")):
            found += wrong_symbols(Path(wheel.extract(name, folder)), name)
    return found


def main() -> None:
    """The status is 1 where something is wrong."""
    failed = False
    for path in map(Path, sys.argv[1:]):
        print(f"{path.name}: {path.stat().st_size:,} bytes, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")
        for line in audit(path):
            failed = True
            print(f"  wrong: {line}")
    sys.exit(failed or len(sys.argv) < 2)


if __name__ == "__main__":
    main()
