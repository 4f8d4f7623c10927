"""A build for an aarch64 as far as any machine can show it: what a processor has alone stands behind its guard, and a
compiler that takes nothing of an x86-64 is asked for nothing of one. Where the cross compiler is, it compiles."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "csrc").is_dir():
    pytest.skip("no source tree beside the tests", allow_module_level=True)

# What a processor has alone, and the macros that say it is there.
X86 = re.compile(r"\b_mm\d*_\w+|\b__m\d+\w*|\b__builtin_cpu_\w+|<(\w*mmintrin|x86intrin|cpuid)\.h>|\b_MM_\w+|\bcpuid\b")
ARM = re.compile(
    r"\bv(bf|cvt|dup|fma|ld1|reinterpret|st1)\w*_\w+|\b(b?float|u?int)\d+x\d+_t\b|<(arm_\w+|sys/auxv)\.h>|\bgetauxval\b"
)
GUARDS = {X86: re.compile(r"__AVX|CROSSVIT_HAVE_AVX"), ARM: re.compile(r"__ARM_FEATURE_|CROSSVIT_HAVE_NEON")}
SOURCES = [p for folder in ("", "cpu", "torch_c", "inspection") for p in sorted((ROOT / "csrc" / folder).glob("*.*"))]
CODE = [path for path in SOURCES if path.suffix in (".h", ".cpp")]


def guarded_lines(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each line of code, and the conditions of the preprocessor that it stands under."""
    under: list[str] = []
    for line in text.splitlines():
        directive = re.match(r"#\s*(ifdef|ifndef|if|elif|else|endif)\b(.*)", line)
        if directive is None:
            yield line.partition("//")[0], under
        elif directive[1].startswith("if"):
            under = [*under, "" if directive[1] == "ifndef" else directive[2]]
        elif directive[1] == "endif":
            under = under[:-1]
        else:
            under = [*under[:-1], directive[2]]


def unguarded(text: str) -> list[str]:
    """The lines that only one kind of processor has and that are compiled for others as well."""
    return [
        line
        for line, under in guarded_lines(text)
        for words, guard in GUARDS.items()
        if words.search(line) and not any(guard.search(condition) for condition in under)
    ]


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_what_one_processor_has_alone_stands_behind_its_guard(path: Path) -> None:
    assert unguarded(path.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "#include <immintrin.h>",
        "#if defined(__AVX2__)\n#else\n__m256 x = _mm256_setzero_ps();\n#endif",
        "#ifndef __AVX2__\nauto x = __builtin_cpu_supports(0);\n#endif",
        "#if defined(__AVX2__)\nauto x = vbfdotq_f32(a, b, c);\n#endif",
        "#if defined(__AVX2__)\n#endif\nfloat32x4_t x;",
    ],
)
def test_what_does_not_is_found(text: str) -> None:
    assert len(unguarded(text)) == 1


# In the cross compiler's place: it refuses the flags of an x86-64, writes down how it was called, and compiles nothing.
COMPILER = """#!{python}
import sys
words = sys.argv[1:]
if words == ["-dumpmachine"]:
    print("{machine}-linux-gnu")
    sys.exit()
if any(word.startswith(("-mavx", "-msse", "-mfma", "-mf16c", "-m64", "-march=x86", "-march=native")) for word in words):
    sys.exit("unrecognized command-line option")
with open("{log}", "a") as log:
    log.write(" ".join(words) + chr(10))
for flag in ("-o", "-MF"):
    if flag in words:
        open(words[words.index(flag) + 1], "w").write("" if flag == "-o" else "it: /dev/null" + chr(10))
"""


class Tree:
    """A copy of the sources with a compiler that compiles for `machine`."""

    def __init__(self, folder: Path, machine: str) -> None:
        self.folder, self.log = folder, folder / "log"
        for name in ("crossvit", "crossvit_kernels", "csrc"):
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
            )
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        self.compiler = folder / "g++"
        self.compiler.write_text(COMPILER.format(python=sys.executable, machine=machine, log=self.log))
        self.compiler.chmod(0o755)

    def run(self, *words: str, platform: str = "linux-aarch64") -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CROSSVIT_")}
        environment |= {"CXX": str(self.compiler), "_PYTHON_HOST_PLATFORM": platform}
        command = [sys.executable, "setup.py", "-q", *words]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=120
        )


foreign = pytest.mark.skipif(platform.machine() == "aarch64", reason="here a build for an aarch64 is a native one")


@foreign
def test_a_cross_build_is_a_wheel_for_an_aarch64_and_asks_for_nothing_of_an_x86(tmp_path: Path) -> None:
    tree = Tree(tmp_path, "aarch64")
    result = tree.run("bdist_wheel", "--dist-dir", "dist")
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "dist").iterdir()
    assert path.name.endswith("-py3-none-linux_aarch64.whl")
    with ZipFile(path) as wheel:
        record = json.loads(wheel.read("crossvit_kernels/_build.json"))
        assert "crossvit_kernels/_cpu.so" in wheel.namelist()
    assert (record["machine"], record["missing"]) == ("aarch64", None)
    assert record["instruction_sets"] == ["generic", "neon_bf16"]
    assert record["cuda"]["missing"] == "CUDA kernels are not built for another machine than this one"

    commands = tree.log.read_text().splitlines()
    of_machine = {word for command in commands for word in command.split() if re.match("-m(?!$)", word)}
    assert of_machine == {"-march=armv8.2-a+bf16"}
    (linked,) = (command for command in commands if "/cpu/_cpu.so" in command)
    # PyTorch's own libraries here are this machine's.
    assert "-ltorch_cpu" not in linked
    assert "/cpu/torch/libtorch_cpu.so" in linked
    objects = {Path(word).stem for word in linked.split() if word.endswith(".o")}
    assert objects == {"host", "instruction_sets", "generic", "neon_bf16"}


@pytest.mark.parametrize("compiled, wanted", [("x86_64", "aarch64"), ("aarch64", "x86_64")])
def test_a_compiler_for_another_machine_is_named(tmp_path: Path, compiled: str, wanted: str) -> None:
    result = Tree(tmp_path, compiled).run("build_ext", "--build-lib", "lib", platform=f"linux-{wanted}")
    assert result.returncode == 1
    assert f"compiles for {compiled}, and the kernels are for {wanted}" in result.stderr
    assert "_PYTHON_HOST_PLATFORM" in result.stderr


@foreign
def test_a_source_tree_gets_no_kernels_of_another_machine(tmp_path: Path) -> None:
    result = Tree(tmp_path, "aarch64").run("build_ext", "--inplace")
    assert result.returncode == 1
    assert "a source tree holds kernels for this machine; aarch64 gets a wheel" in result.stderr
    assert not list((tmp_path / "crossvit_kernels").glob("_*.so"))


# The products with the cross compiler itself, as far as their instructions.

PREFIX = "" if platform.machine() == "aarch64" else "aarch64-linux-gnu-"
PRODUCT = """
#include "cpu/rows.h"
namespace crossvit::CROSSVIT_ISA {
void product(const Matrix& a, int64_t depth, const Panel& b, float* c, float* widened) {
  multiply_block<kPanelVectors>(a, 0, kBlock, depth, b, c, b.lanes, widened);
}
}
"""


@pytest.mark.skipif(shutil.which(f"{PREFIX}g++") is None, reason=f"{PREFIX}g++ is not installed")
@pytest.mark.parametrize(
    "name, flags, instruction",
    [("generic", [], "fmla"), ("neon_bf16", ["-march=armv8.2-a+bf16"], "bfdot")],
)
def test_products_are_instructions_of_vectors(tmp_path: Path, name: str, flags: list[str], instruction: str) -> None:
    """A register tile multiplies and adds whole vectors, and keeps its sums in registers."""
    (tmp_path / "product.cpp").write_text(PRODUCT)
    command = [f"{PREFIX}g++", "-O3", "-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    command += [*flags, f"-DCROSSVIT_ISA={name}", f"-I{ROOT / 'csrc'}", "-S", "product.cpp", "-o", "product.s"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assembly = (tmp_path / "product.s").read_text()
    # From a label or a branch to the next.
    blocks = re.split(r"^\.L\w+:$|^\s+\S+\s+(?:\w+, (?:\d+, )?)?\.L\d+$", assembly, flags=re.MULTILINE)
    products = [b for b in blocks if len(re.findall(rf"^\s+{instruction}\s+v\d+\.4s, v", b, re.MULTILINE)) >= 16]
    assert products
    assert not [block for block in products if re.search(r"^\s+(str|stp|stur)\s+q", block, re.MULTILINE)]
