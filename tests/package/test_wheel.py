"""What is asked of a wheel, on a wheel that is packed of the package as it was built here; `make wheel` asks it of one
that setuptools built."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

import audit_wheel
import crossvit
import crossvit_kernels
from crossvit_kernels import backends

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = [Path(module.__file__).parent for module in (crossvit, crossvit_kernels)]
NAME = "crossvit_kernels-0.1.0-py3-none-manylinux_2_28_x86_64.whl"
METADATA = "\n".join(f"{name}: something" for name in audit_wheel.FIELDS)
METADATA += "\nDescription-Content-Type: text/markdown\n\n" + "README " * 200

if not backends.available("cpu"):
    pytest.skip(f"no library to pack: {backends.reason('cpu')}", allow_module_level=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with the CPU's library, as setuptools packs it."""
    path = tmp_path_factory.mktemp("wheel") / NAME
    record = json.loads((PACKAGES[1] / "_build.json").read_text())
    record["cuda"] |= {"missing": "left out, for it is large", "architectures": []}
    with ZipFile(path, "w") as archive:
        for package in PACKAGES:
            for file in package.rglob("*"):
                if file.suffix == ".py" or file.name in ("py.typed", "tuned.json", "_cpu.so"):
                    archive.write(file, file.relative_to(package.parent))
        archive.writestr("crossvit_kernels/_build.json", json.dumps(record | {"sanitize": ""}))
        archive.writestr("crossvit_kernels-0.1.0.dist-info/METADATA", METADATA)
    return path


def test_this_build_makes_a_wheel(wheel: Path) -> None:
    assert audit_wheel.audit(wheel) == []


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("crossvit_kernels-0.1.0-cp311-cp311-manylinux_2_28_x86_64.whl", "the tag is cp311-cp311, expected py3-none"),
        ("crossvit_kernels-0.1.0-py3-none-linux_x86_64.whl", "the platform is linux_x86_64"),
        ("crossvit_kernels-0.1.0-py3-none-manylinux_2_27_x86_64.manylinux_2_34_x86_64.whl", "is manylinux_2_34_x86_64"),
    ],
)
def test_a_wheel_of_one_python_or_of_new_systems_is_wrong(wheel: Path, tmp_path: Path, name: str, wrong: str) -> None:
    shutil.copy(wheel, tmp_path / name)
    (line,) = audit_wheel.audit(tmp_path / name)
    assert wrong in line


@pytest.mark.parametrize("name", ["_emulation.so", "_C.cpython-311-x86_64-linux-gnu.so", "isa.cpp"])
def test_what_is_for_tests_alone_is_wrong_there(wheel: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / NAME
    shutil.copy(wheel, path)
    with ZipFile(path, "a") as archive:
        archive.write(PACKAGES[1] / "_cpu.so", f"crossvit_kernels/{name}")
    assert audit_wheel.audit(path) == [f"crossvit_kernels/{name} does not belong into a wheel"]


def test_what_is_missing_is_named() -> None:
    record = {"missing": None, "sanitize": "", "cuda": {"missing": None}}
    told = audit_wheel.wrong_files({"crossvit/__init__.py", "crossvit_kernels/__init__.py"}, record)
    assert told == [
        f"crossvit_kernels/{name} is missing"
        for name in ("_build.json", "_cpu.so", "_cuda.so", "triton_kernels/tuned.json")
    ]
    assert audit_wheel.wrong_metadata(b"Name: crossvit-kernels\n\n")


def test_a_module_that_was_left_behind_or_forgotten_is_named(tmp_path: Path) -> None:
    for name in ("crossvit/here.py", "crossvit_kernels/ops/forgotten.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert audit_wheel.wrong_modules({"crossvit/here.py", "crossvit/gone.py", "a.dist-info/METADATA"}, tmp_path) == [
        "crossvit_kernels/ops/forgotten.py is missing",
        "crossvit/gone.py is not in the source tree",
    ]


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="no source tree beside the tests")
def test_an_sdist_has_what_its_tests_look_at(tmp_path: Path) -> None:
    """Each file that git keeps is packed."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository to compare with")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    assert {name for name in kept if name and Path(ROOT, name).exists()} <= packed
    assert not [name for name in packed if re.search(r"\.so$|__pycache__|_build\.json$", name)]
