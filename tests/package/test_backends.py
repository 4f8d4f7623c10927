"""Which backends exist, what is said about those that do not, and which one serves a call."""

import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import crossvit_kernels
from available import NATIVE
from crossvit_kernels import backends
from crossvit_kernels.backends import availability, build_record, choice, reporting
from crossvit_kernels.dispatch.register import OPS
from inputs import EXAMPLES

CPU = torch.device("cpu")
needs_cpu_kernels = pytest.mark.skipif("cpu" not in NATIVE, reason=f"no CPU kernels: {backends.reason('cpu')}")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """backends as after an import: nothing resolved yet, no warning given."""
    monkeypatch.setattr(choice, "_resolved", {})
    for function in (choice.environment, choice._fallback_warning):
        function.cache_clear()
    yield monkeypatch
    for function in (choice.environment, choice._fallback_warning):
        function.cache_clear()


def test_the_reference_is_always_there() -> None:
    assert backends.available("reference")
    assert backends.resolve("reference", CPU, torch.float32, "patch_embed") == "reference"


def test_every_absent_backend_says_why_when_asked_for() -> None:
    for name in backends.BACKENDS:
        why = backends.reason(name)
        assert backends.available(name) == (why is None)
        if why is not None:
            given = EXAMPLES["self_attention"]()
            with pytest.raises(RuntimeError) as raised:
                crossvit_kernels.self_attention(**given, kernels=name)
            assert why in str(raised.value)
            assert name in str(raised.value)


def test_what_is_tested_here() -> None:
    """One skip that names the backends whose kernels no test of this run has touched."""
    absent = [f"{name} ({backends.reason(name)})" for name in backends.BACKENDS if not backends.available(name)]
    if absent:
        pytest.skip("not tested here: " + "; ".join(absent))


@pytest.mark.parametrize("name", ["", "cpp", "CPU", "none", None, 3])
def test_an_unknown_name_raises_and_lists_the_choices(name: str) -> None:
    for op, example in EXAMPLES.items():
        with pytest.raises(
            ValueError, match=r"^kernels: expected 'auto' or one of 'reference', 'cpu', 'triton', 'cuda', got"
        ):
            getattr(crossvit_kernels, op)(**example(), kernels=name)
    with pytest.raises(ValueError, match="kernels: expected"):
        backends.available(name)


@needs_cpu_kernels
def test_auto_takes_the_kernels_and_leaves_other_dtypes_to_the_reference() -> None:
    for op in EXAMPLES:
        for dtype in (torch.float32, torch.bfloat16):
            for kernels in ("auto", "cpu"):
                assert backends.resolve(kernels, CPU, dtype, op) == (
                    "cpu" if backends.serves("cpu", op) else "reference"
                )
        for dtype in (torch.float16, torch.float64):
            for kernels in ("auto", "cpu"):
                assert backends.resolve(kernels, CPU, dtype, op) == "reference"


def test_every_backend_has_kernels_of_its_own_for_every_op(backend: str) -> None:
    """On a GPU self-attention is torch's scaled_dot_product_attention, resizing its interpolate, as the reference's."""
    for op in EXAMPLES:
        if backend in ("triton", "cuda") and op in ("self_attention", "bicubic_resize"):
            assert not backends.serves(backend, op)
            continue
        assert backends.serves(backend, op)
        if op != "cls_fusion":
            assert backends.serves(backend, f"{op}_backward")


@needs_cpu_kernels
def test_a_backend_for_another_device_raises() -> None:
    with pytest.raises(ValueError, match="kernels='cpu' takes tensors on cpu, got tensors on cuda:1"):
        backends.resolve("cpu", torch.device("cuda", 1), torch.float32, "self_attention")


def test_the_environment_variable_is_the_default(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("CROSSVIT_KERNELS", "reference")
    assert backends.resolve("auto", CPU, torch.float32, "patch_embed") == "reference"
    assert "kernels='auto' means reference, from CROSSVIT_KERNELS" in backends.report()
    for name in NATIVE:
        if backends.serves(name, "layer_norm_linear"):
            assert backends.resolve(name, CPU, torch.float32, "layer_norm_linear") == name


def test_an_unknown_name_in_the_environment_names_the_variable(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("CROSSVIT_KERNELS", "fast")
    with pytest.raises(
        ValueError, match=r"environment variable CROSSVIT_KERNELS: expected 'auto' or one of .* got 'fast'"
    ):
        crossvit_kernels.self_attention(**EXAMPLES["self_attention"]())


def test_an_absent_backend_in_the_environment_raises(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(availability, "cpu_missing", "it was not built")
    fresh.setenv("CROSSVIT_KERNELS", "cpu")
    with pytest.raises(RuntimeError, match="kernels='cpu' is not there: it was not built"):
        crossvit_kernels.self_attention(**EXAMPLES["self_attention"]())


def test_what_serves_a_flag() -> None:
    """By name for programs and in words for people: what "auto" means is a backend, never "auto"."""
    here = ("cpu",) if backends.available("cpu") else ("reference",)
    assert backends.served_by("auto", "cpu") == here
    assert backends.served_by("auto", "cpu", torch.float64) == ("reference",)
    assert backends.served_by("reference", "cuda") == ("reference",)
    assert backends.served_by("cpu", "cuda") == ("reference",)
    assert backends.in_words("auto", "cpu") == {"cpu": "C++", "reference": "plain PyTorch"}[here[0]]
    assert f"kernels='auto' means {here[0]} on the CPU" in backends.report()
    with pytest.raises(ValueError, match=r"expected 'auto' or one of .* got 'fast'"):
        backends.served_by("fast", "cpu")


def test_report_lists_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    text = backends.report()
    assert capsys.readouterr().out == text + "\n"
    for name in backends.BACKENDS:
        line = next(line for line in text.splitlines() if line.startswith(f"{name}: "))
        assert (backends.reason(name) or "available") in line


def test_the_report_knows_every_op() -> None:
    assert set(reporting.OPS) == set(OPS)


def test_report_names_architectures_and_what_auto_was_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"cuda": {"architectures": ["sm_80", "compute_90"], "nvcc": "13.0.88", "missing": None}}
    monkeypatch.setattr(build_record, "read_record", lambda what: (record, None))
    monkeypatch.setattr(reporting, "cuda_ops", lambda: ["cls_fusion", "patch_embed"])
    monkeypatch.setattr(choice, "environment", lambda: "auto")
    monkeypatch.setitem(choice.MEASURED, "patch_embed", ("cuda", "an H100, bfloat16"))
    text = backends.report()
    assert "(built for sm_80, compute_90 by nvcc 13.0.88: cls_fusion, patch_embed)" in text
    assert "on a GPU, cls_fusion: triton, unmeasured against cuda" in text
    assert "on a GPU, patch_embed: cuda, an H100, bfloat16" in text


def test_on_a_gpu_auto_takes_what_measured_faster_and_else_triton(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("CROSSVIT_KERNELS", "")
    fresh.setattr(availability, "reason", lambda name: None)
    fresh.setattr(availability, "serves", lambda name, op: True)
    fresh.setitem(choice.MEASURED, "patch_embed", ("cuda", "an H100"))
    gpu = torch.device("cuda", 0)
    assert backends.resolve("auto", gpu, torch.float16, "patch_embed") == "cuda"
    assert backends.resolve("auto", gpu, torch.float16, "linear_residual") == "triton"
    fresh.setattr(choice, "_resolved", {})
    fresh.setattr(availability, "reason", lambda name: "absent" if name == "cuda" else None)
    assert backends.resolve("auto", gpu, torch.float16, "patch_embed") == "triton"


@pytest.mark.parametrize(
    "built, capability, fits",
    [
        (["sm_80", "sm_90"], (9, 0), True),
        (["sm_80"], (8, 6), True),
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["sm_90", "compute_90"], (12, 0), True),
        (["sm_90a"], (9, 0), True),
        (["compute_90a"], (10, 0), False),
    ],
)
def test_architectures_that_a_gpu_can_run(
    built: list[str], capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    why = availability._not_built_for(built)
    assert (why is None) == fits
    if why is not None:
        assert f"compute capability {capability[0]}.{capability[1]}" in why


# How the library is found, or not

RECORD = {"torch": str(torch.__version__), "missing": None}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that the record and the libraries are looked for in."""
    for module in (build_record, availability):
        monkeypatch.setattr(module, "__file__", str(tmp_path / "backends" / "module.py"))
    availability.load_library.cache_clear()
    yield tmp_path
    availability.load_library.cache_clear()


@pytest.mark.parametrize(
    "record, expected",
    [
        (None, "was not built; to build it, type"),
        ("{", "cannot be read"),
        (json.dumps(RECORD | {"missing": "no C++ compiler"}), "was not built: no C++ compiler"),
    ],
)
def test_a_library_that_was_not_built_is_not_loaded(
    record: str | None, expected: str, monkeypatch: pytest.MonkeyPatch, elsewhere: Path
) -> None:
    monkeypatch.setattr(torch.ops, "load_library", pytest.fail)
    if record is not None:
        (elsewhere / "_build.json").write_text(record)
    why = availability._load_cpu()
    assert why is not None
    assert expected in why
    assert "pip install --no-build-isolation ." in why


@pytest.mark.parametrize("built", [True, False])
def test_nobody_is_sent_to_an_emulation_that_was_not_built(
    built: bool, monkeypatch: pytest.MonkeyPatch, elsewhere: Path
) -> None:
    """A wheel has none, and what builds one is an installation in place."""
    missing = None if built else "only a build in the source tree has it"
    record = RECORD | {"cuda": {"missing": None, "architectures": ["sm_80"]}, "emulation": {"missing": missing}}
    (elsewhere / "_build.json").write_text(json.dumps(record))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(availability, "emulated", lambda: False)
    why = availability.cuda_missing.__wrapped__()
    assert why is not None
    assert why.startswith("no CUDA device was found")
    assert ("CROSSVIT_KERNELS_EMULATE=1" in why) == built
    monkeypatch.setattr(availability, "emulated", lambda: True)
    monkeypatch.setattr(availability, "load_library", functools.cache(lambda name: None))
    asked = availability.cuda_missing.__wrapped__()
    if built:
        assert asked is None
    else:
        assert asked == (
            "crossvit_kernels/_emulation.so was not built: only a build in the source tree has it; "
            "to build it, type `pip install --no-build-isolation -e .` in the source folder"
        )


def test_a_library_that_fails_to_load_is_told_in_a_sentence(elsewhere: Path) -> None:
    (elsewhere / "_build.json").write_text(json.dumps(RECORD))
    (elsewhere / "_cpu.so").write_bytes(b"not a library")
    why = availability._load_cpu()
    assert why is not None
    assert why.startswith("crossvit_kernels/_cpu.so cannot be loaded (")
    assert "file too short" in why or "invalid ELF header" in why


def test_without_the_extension_auto_runs_on_the_reference_and_says_so_once(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(availability, "cpu_missing", "it was not built")
    given = EXAMPLES["self_attention"]()
    with pytest.warns(RuntimeWarning, match="runs on its PyTorch reference: it was not built") as caught:
        out = crossvit_kernels.self_attention(**given)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crossvit_kernels.layer_norm_linear(**EXAMPLES["layer_norm_linear"]())
    assert torch.equal(out, crossvit_kernels.self_attention(**given, kernels="reference"))
    with pytest.raises(RuntimeError, match="kernels='cpu' is not there: it was not built"):
        crossvit_kernels.self_attention(**given, kernels="cpu")


def test_the_package_imports_and_runs_where_the_library_does_not_load(tmp_path: Path) -> None:
    """In a fresh interpreter, from a copy of the package whose library is garbage."""
    source = Path(crossvit_kernels.__file__).parent
    copy = tmp_path / "crossvit_kernels"
    for path in source.rglob("*.py"):
        target = copy / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (copy / "_build.json").write_text(json.dumps(RECORD))
    (copy / "_cpu.so").write_bytes(b"not a library")
    call = "k.self_attention(torch.ones(1, 2, 6), 1).shape"
    code = f"import torch, crossvit_kernels as k; print({call}); k.backends.report()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "CROSSVIT_KERNELS": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 2, 2])" in done.stdout
    assert "cpu: crossvit_kernels/_cpu.so cannot be loaded" in done.stdout
    assert done.stderr.count("RuntimeWarning") == 1
