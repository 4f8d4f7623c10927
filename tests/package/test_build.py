"""What setup.py builds, what it says where it cannot, and how the package runs on what it finds beside it."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

import crossvit_kernels
from crossvit_kernels import backends

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(crossvit_kernels.__file__).parent
HOW_TO_INSTALL = "pip install --no-build-isolation ."

extension = pytest.mark.skipif(not backends.available("cpu"), reason=f"no extension: {backends.reason('cpu')}")
source_tree = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="no source tree beside the tests")
compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")


def python(code: str, *, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter, with `path` as its first place to import from."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("CROSSVIT_")} | environment
    variables["PYTHONPATH"] = str(path or PACKAGE.parent)
    return subprocess.run(
        [sys.executable, "-c", code], env=variables, cwd=path, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture
def copy_of_package(tmp_path: Path) -> Path:
    """crossvit_kernels without its extension, importable from the folder returned."""
    shutil.copytree(
        PACKAGE, tmp_path / "crossvit_kernels", ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    )
    return tmp_path


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The modules that setup.py builds with, by their names, without its call of setuptools.setup."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # setup.py adds to it
    for name in (
        "CROSSVIT_KERNELS_SANITIZE",
        "CROSSVIT_KERNELS_CUDA",
        "TORCH_CUDA_ARCH_LIST",
        "CUDA_HOME",
        "CUDA_PATH",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    runpy.run_path("setup.py")
    return {name: sys.modules[name] for name in ("build_kernels", "build_cpu", "build_cuda")}


@extension
def test_what_was_built_agrees_with_the_record() -> None:
    record = json.loads((PACKAGE / "_build.json").read_text())
    cpu = torch.ops.crossvit_kernels_cpu
    assert cpu.instruction_sets().split() == record["instruction_sets"]
    assert record["instruction_sets"][0] == "generic"
    assert cpu.instruction_set() in record["instruction_sets"]
    assert cpu.compiler().split()[-1] in record["compiler"]
    assert record["missing"] is None


@extension
def test_the_environment_forces_an_instruction_set() -> None:
    code = (
        "import torch; from crossvit_kernels import backends; "
        "print(backends.reason('cpu'), torch.ops.crossvit_kernels_cpu.instruction_set())"
    )
    assert python(code, CROSSVIT_KERNELS_ISA="generic").stdout.split() == ["None", "generic"]


@extension
def test_an_instruction_set_that_is_not_there_is_named() -> None:
    code = "from crossvit_kernels import backends; print(backends.reason('cpu'))"
    result = python(code, CROSSVIT_KERNELS_ISA="sse9")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(
        "the environment variable CROSSVIT_KERNELS_ISA: instruction set 'sse9' was not compiled in; there are: generic"
    )


@extension
def test_the_library_brings_no_openmp_runtime_of_its_own() -> None:
    """Two of them in one process are two pools of threads on the same cores."""
    mapped = python("import crossvit_kernels; print(open('/proc/self/maps').read())").stdout
    assert "crossvit_kernels/_cpu.so" in mapped
    assert len(set(re.findall(r"/\S*lib(?:gomp|iomp5|omp)\S*", mapped))) == 1


@extension
def test_nothing_at_run_time_needs_the_inspection_module(copy_of_package: Path) -> None:
    """Wheels leave it out; a build of another torch, which the record names, serves this one."""
    package = copy_of_package / "crossvit_kernels"
    record = json.loads((PACKAGE / "_build.json").read_text()) | {"torch": "2.11.0"}
    (package / "_build.json").write_text(json.dumps(record))
    shutil.copy(PACKAGE / "_cpu.so", package)
    (package / "_C.py").write_text("raise SystemExit('_C was loaded')")
    code = """
import torch, crossvit_kernels as k
x, w = torch.randn(2, 3, 8), torch.randn(4, 8)
torch.testing.assert_close(*(k.layer_norm_linear(x, torch.ones(8), None, w, kernels=n) for n in ("cpu", "reference")))
print(k.backends.reason("cpu"))
"""
    result = python(code, path=copy_of_package)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "None"


@pytest.mark.parametrize("missing", [None, "no C++ compiler: 'c++' is not on the PATH"])
def test_without_an_extension_it_runs_on_the_reference_and_says_so_once(
    copy_of_package: Path, missing: str | None
) -> None:
    if missing:
        record = {"torch": str(torch.__version__), "instruction_sets": [], "missing": missing}
        (copy_of_package / "crossvit_kernels" / "_build.json").write_text(json.dumps(record))
    code = """
import json, warnings, torch, crossvit_kernels as k
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x, w = torch.randn(2, 3, 8), torch.randn(4, 8)
    for dtype in (torch.float32, torch.float32, torch.bfloat16):
        a = [t.to(dtype) for t in (x, torch.ones(8), torch.zeros(8), w)]
        assert torch.equal(k.layer_norm_linear(*a), k.layer_norm_linear(*a, kernels="reference"))
        k.linear_residual(a[0], w.new_ones(8, 8).to(dtype), None, a[0])
print(json.dumps([str(c.message) for c in caught if "crossvit_kernels" in str(c.message)]))
"""
    result = python(code, path=copy_of_package)
    assert result.returncode == 0, result.stderr
    (message,) = json.loads(result.stdout)
    assert HOW_TO_INSTALL in message
    assert (missing or "was not built") in message


@source_tree
def test_setup_without_torch_stops_with_a_sentence(tmp_path: Path) -> None:
    """As in an environment that has setuptools and no torch, where isolation was turned off."""
    (tmp_path / "setuptools").symlink_to(Path(setuptools.__file__).parent)
    distutils_hack = find_spec("_distutils_hack")
    assert distutils_hack is not None
    assert distutils_hack.origin is not None
    (tmp_path / "_distutils_hack").symlink_to(Path(distutils_hack.origin).parent)
    result = subprocess.run(
        [sys.executable, "-S", "setup.py", "bdist_wheel"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 1
    (sentence,) = result.stderr.splitlines()
    assert "torch" in sentence
    assert HOW_TO_INSTALL in sentence


@source_tree
@pytest.mark.parametrize("command", ["build", "build_ext"])
def test_without_a_compiler_it_still_installs(tmp_path: Path, command: str) -> None:
    """As part of an installation the extension may be missing; asked for by name it may not."""
    for name in ("crossvit", "crossvit_kernels", "csrc"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", command, "--build-lib", "lib"],
        env=os.environ | {"CXX": "no-such-compiler"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "no C++ compiler: 'no-such-compiler' is not on the PATH" in result.stderr
    assert result.returncode == (0 if command == "build" else 1)
    if command == "build":
        built = tmp_path / "lib" / "crossvit_kernels"
        record = json.loads((built / "_build.json").read_text())
        assert (built / "backends" / "__init__.py").is_file()
        assert (built / "py.typed").is_file()
        assert record["instruction_sets"] == []
        for part in (record, record["cuda"], record["emulation"]):
            assert part["missing"]
        assert "no-such-compiler" in record["missing"]


@source_tree
@compiler
def test_instruction_sets_that_the_compiler_does_not_know_are_left_out(
    setup_py: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.which(os.environ.get("CXX", "c++"))
    old = tmp_path / "c++"
    old.write_text(f'#!/bin/sh\ncase "$*" in *-mavx512bf16*) exit 1;; esac\nexec {real} "$@"\n')
    old.chmod(0o755)
    foreign = tmp_path / "g++"
    foreign.write_text(f'#!/bin/sh\ncase "$*" in *-mavx*|*-march=*) exit 1;; esac\nexec {real} "$@"\n')
    foreign.chmod(0o755)

    def known() -> list[str]:
        return setup_py["build_cpu"].Compiler(tmp_path / "probes").instruction_sets()

    before = known()
    monkeypatch.setenv("CXX", str(old))
    assert known() == [name for name in before if name != "avx512_bf16"]
    monkeypatch.setenv("CXX", str(foreign))
    assert known() == ["generic"]


@source_tree
@compiler
def test_a_compiler_is_asked_once_what_it_knows(
    setup_py: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is another one, of another version say; what it did not know it is asked again, as that may have been
    installed since."""
    real = shutil.which(os.environ.get("CXX", "c++"))
    log, version, spoiled = (tmp_path / name for name in ("log", "version", "spoiled"))
    wrapper = tmp_path / "c++"
    wrapper.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then cat {version}; exit; fi\n'
        f'[ "$1" = -dumpmachine ] || echo "$@" >> {log}\n'
        f'case "$*" in *-mavx512bf16*) [ -e {spoiled} ] && exit 1;; esac\nexec {real} "$@"\n'
    )
    wrapper.chmod(0o755)
    version.write_text("g++ 12.2.0\n")
    monkeypatch.setenv("CXX", str(wrapper))

    def asked() -> tuple[list[str], int]:
        log.write_text("")
        asking = setup_py["build_cpu"].Compiler(tmp_path / "probes")
        assert asking.missing() is None
        return asking.instruction_sets(), len(log.read_text().splitlines())

    known, times = asked()
    sets = len(setup_py["build_cpu"].instruction_sets(setup_py["build_cpu"].target.machine()))
    assert times == 1 + sets
    assert asked() == (known, sets - len(known))
    version.write_text("g++ 13.1.0\n")
    spoiled.touch()
    less = [name for name in known if name != "avx512_bf16"]
    assert asked() == (less, times)
    assert asked() == (less, sets - len(less))
    spoiled.unlink()
    assert asked()[0] == known
    assert asked() == (known, sets - len(known))


@source_tree
def test_nothing_is_compiled_for_this_machine_alone_or_with_loose_arithmetic(setup_py: dict[str, Any]) -> None:
    module = setup_py["build_cpu"]
    baseline = [*module.COMMON_FLAGS, *module.TORCH_FLAGS, *module.instruction_sets("riscv64")["generic"][0]]
    assert not [flag for flag in baseline if flag.startswith("-m")]
    of_sets = {m: [f for flags, _ in module.instruction_sets(m).values() for f in flags] for m in ("x86_64", "aarch64")}
    # Of an aarch64's extensions GCC's only name is that of an architecture which has them.
    assert of_sets.pop("aarch64") == ["-march=armv8.2-a+bf16"]
    flags = [*baseline, *module.ISA_FLAGS, *of_sets["x86_64"]]
    assert not [flag for flag in flags if flag.startswith(("-march", "-mtune", "-mcpu", "-ffast-math", "-Ofast"))]


@source_tree
def test_a_wheel_is_of_this_platform_and_of_every_python(setup_py: dict[str, Any]) -> None:
    distribution = setuptools.Distribution({"ext_modules": [setuptools.Extension("a", [])]})
    command = setup_py["build_kernels"].Wheel(distribution)
    command.ensure_finalized()
    python_tag, abi_tag, platform_tag = command.get_tag()
    assert (python_tag, abi_tag) == ("py3", "none")
    assert platform_tag.startswith("linux_")


@source_tree
def test_a_wheel_has_no_module_that_the_sources_have_no_longer(
    setup_py: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """setuptools packs all that lies in the folder of the last build."""
    monkeypatch.chdir(tmp_path)
    built = {"package/here.py", "package/gone.py", "package/gone/too.py", "package/_cpu.so"}
    for name in ("package/here.py", *(f"lib/{name}" for name in built)):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    module = setup_py["build_kernels"]
    packed: set[str] = set()
    files = (path for path in Path("lib").rglob("*.*"))
    monkeypatch.setattr(module.bdist_wheel, "run", lambda _: packed.update(str(p.relative_to("lib")) for p in files))
    distribution = setuptools.Distribution({"ext_modules": [setuptools.Extension("a", [])]})
    distribution.get_command_obj("build").build_lib = "lib"
    module.Wheel(distribution).run()
    assert packed == {"package/here.py", "package/_cpu.so"}


# The CUDA kernels, in a tree of one small kernel, with a compiler in nvcc's place that hands on to the C++ compiler

NVCC = """#!{python}
import os, subprocess, sys
if sys.argv[1] == "--version":
    print("Cuda compilation tools, release x, V{version}")
    sys.exit()
words, kept = iter(sys.argv[1:]), []
for word in words:
    if word in ("-ccbin", "-Xcompiler", "--threads", "--split-compile", "-cudart", "-Xlinker"):
        next(words)
    elif word == "-shared" or word.startswith(("-std", "-I", "-L", "-l", "-MM")):
        kept.append(word)
    elif word.endswith(".cu"):
        kept += ["-x", "c++", word]
    elif not word.startswith(("-gencode", "-O", "--expt")):
        kept.append(word)
open("log", "a").write(" ".join(sys.argv[1:]) + chr(10))
sys.exit(subprocess.run(["{cxx}", "-fPIC", *kept]).returncode)
"""
TREE = {
    "csrc/cuda/scale.cu": '#include <cuda_runtime.h>\n#include "cuda/scale.h"\n__global__ void scale() {}\n',
    "csrc/cuda/other.cu": "#include <cuda_runtime.h>\n__global__ void other() {}\n",
    "csrc/cuda/scale.h": "",
    "csrc/cuda/scale.cpp": "int scale_of_torch() { return 1; }\n",
    "csrc/cuda_runtime.h": "#define __global__\n",
    "tests/cuda_emulation/include/cuda_runtime.h": "#define __global__\n",
    "tests/cuda_emulation/runtime.cpp": "int emulation() { return 1; }\n",
}


@pytest.fixture
def build(setup_py: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """build() builds the small tree in the current folder and returns what it says of it; build.cuda is the module."""
    module = setup_py["build_cuda"]
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    cxx = shutil.which(os.environ.get("CXX", "c++"))
    version = f"{torch.version.cuda or '13.0'}.1"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text(NVCC.format(python=sys.executable, version=version, cxx=cxx))
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", torch.version.cuda or "13.0")
    monkeypatch.setattr(module, "USUAL_PLACE", str(tmp_path / "nowhere"))

    def run() -> dict[str, Any]:
        libraries = module.Build([cxx], None, ["-O0"], "", Path("build"), Path("package"))
        with ThreadPoolExecutor(2) as pool:
            libraries.start(pool, 2)
        return libraries.finish()

    run.module = module
    return run


def built_libraries() -> set[str]:
    return {path.name for path in Path("package").glob("*.so")}


@source_tree
@compiler
def test_both_libraries_are_built_and_only_what_changed_again(build: Any) -> None:
    record = build()
    assert record["cuda"]["missing"] is record["emulation"]["missing"] is None
    assert record["cuda"]["architectures"] == ["sm_80", "sm_90", "sm_100", "compute_100"]
    assert record["cuda"]["nvcc"].startswith(torch.version.cuda)
    assert built_libraries() == {"_cuda.so", "_emulation.so"}
    before = {path: path.stat().st_mtime_ns for path in Path("build").rglob("*.o")}
    assert len(before) == 2 + 3 + 1
    os.utime("csrc/cuda/scale.h")
    build()
    assert before == {path: path.stat().st_mtime_ns for path in Path("build").rglob("*.o")}
    Path("csrc/cuda/scale.h").write_text("inline int changed;")
    build()
    changed = {str(path.relative_to("build/cuda")) for path in before if path.stat().st_mtime_ns != before[path]}
    assert changed == {"nvcc/scale.o", "emulated/scale.o"}


@source_tree
@compiler
def test_without_cuda_the_emulation_is_there_still(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    build()
    monkeypatch.setenv("CROSSVIT_KERNELS_CUDA", "0")
    record = build()
    assert record == {
        "cuda": {"nvcc": None, "architectures": [], "missing": "CROSSVIT_KERNELS_CUDA=0 left it out"},
        "emulation": {"missing": None},
    }
    assert built_libraries() == {"_emulation.so"}


def no_nvcc(monkeypatch: pytest.MonkeyPatch) -> str:
    tools = Path("bin", "of the C++ compiler").resolve()
    tools.mkdir()
    for name in ("as", "ld"):
        (tools / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setenv("PATH", str(tools))
    return "nvcc was not found"


def no_cuda_in_torch(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(torch.version, "cuda", None)
    return "this torch was built without CUDA"


def another_cuda(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(torch.version, "cuda", "10.2")
    return "this torch of the older CUDA 10.2"


def no_such_architecture(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere")
    return "expected entries like 8.0, 9.0a or 10.0+PTX, got 'Ampere'"


def does_not_compile(monkeypatch: pytest.MonkeyPatch) -> str:
    Path("csrc/cuda/broken.cu").write_text("#include <cuda_runtime.h>\n__global__ void broken() { undeclared(); }\n")
    return "csrc/cuda/broken.cu: it did not compile (csrc/cuda/broken.cu:2:28: error: "


@source_tree
@compiler
@pytest.mark.parametrize(
    "spoil", [no_nvcc, no_cuda_in_torch, another_cuda, no_such_architecture, does_not_compile], ids=lambda f: f.__name__
)
def test_what_keeps_cuda_out_is_said_and_an_error_where_it_was_asked_for(
    build: Any, spoil: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = spoil(monkeypatch)
    record = build()
    assert expected in record["cuda"]["missing"]
    assert record["cuda"]["architectures"] == []
    assert built_libraries() == (set() if spoil is does_not_compile else {"_emulation.so"})
    monkeypatch.setenv("CROSSVIT_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match=re.escape("CROSSVIT_KERNELS_CUDA=1, but ")) as raised:
        build()
    assert expected in str(raised.value)


@source_tree
def test_an_unknown_choice_of_cuda_is_named(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSVIT_KERNELS_CUDA", "yes")
    with pytest.raises(SystemExit, match="CROSSVIT_KERNELS_CUDA: expected 0 or 1, got 'yes'"):
        build()


@source_tree
def test_architectures_are_what_the_list_says(setup_py: dict[str, Any]) -> None:
    module = setup_py["build_cuda"]
    for text, expected in {
        "8.0;9.0+PTX": ["sm_80", "sm_90", "compute_90"],
        "9.0a": ["sm_90a"],
        " 12.0 8.6 10.0+PTX": ["sm_86", "sm_100", "sm_120", "compute_100"],
        "7.5 8.0": ["sm_80"],
    }.items():
        assert module.architectures(text) == expected
    assert module.gencode(["sm_90a", "compute_90"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    for text in ("7.5", "7.0+PTX 7.5"):
        with pytest.raises(module.NotBuiltError, match=r"names nothing from 8\.0 on"):
            module.architectures(text)


def test_what_this_build_is_made_of() -> None:
    """Here nvcc's absence is told as a skip; an emulation or kernels that did not compile fail."""
    record = json.loads((PACKAGE / "_build.json").read_text())
    if (ROOT / "setup.py").is_file() and PACKAGE.parent == ROOT and record["missing"] is None:
        assert record["emulation"]["missing"] is None
    if record["cuda"]["missing"] is None:
        assert record["cuda"]["architectures"]
        assert (PACKAGE / "_cuda.so").is_file()
    else:
        assert "did not compile" not in record["cuda"]["missing"]
        pytest.skip(f"no CUDA kernels in this build: {record['cuda']['missing']}")


def test_models_and_ops_need_torch_alone() -> None:
    """What the other packages are for (weights in .safetensors, data, plots) asks for them when it is used."""
    code = """
import sys
absent = "torchvision timm safetensors PIL tqdm matplotlib huggingface_hub triton"
sys.modules.update(dict.fromkeys(absent.split()))  # None there: importing it raises ModuleNotFoundError
import torch, crossvit
with torch.inference_mode():
    print(tuple(crossvit.create_model("crossvit_9_240").eval()(torch.zeros(1, 3, 240, 240)).shape))
"""
    result = python(code)
    assert result.stdout.strip() == "(1, 1000)", result.stderr
