"""The stages of `make gpu`: which commands, how long they are expected to take on an H100, and how to read them.

The build comes first and alone, for this GPU's architecture: the tests and figures of the CUDA kernels need it.
"""

import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from crossvit_kernels import triton_kernels

from ..cases import OPS
from .stages import Stage, Verdict, by_last_line

TEST_WORKERS = 14  # processes of tests at most; each has a context of its own on the GPU
TOGETHER = 210.0  # seconds for all that times nothing, side by side
OURS = "reference,reference-graph,triton,triton-graph,cuda,cuda-graph"
THEIRS = "timm-eager,timm-eager-graph"
COMPILED = "timm-compiled,timm-compiled-graph"
LARGEST = "crossvit_15_dagger_240"
ALL = "reference,triton,cuda"
COMPILED_OP = ("--batch", "256", "--branch", "large", "--kernels", ALL, "--peers", "all")


def planned(root: Path, folder: Path, smoke: bool) -> list[Stage]:
    """All stages, the most worthwhile first; the figures' rows go to `folder`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1", "MAX_JOBS": str(cores)}
    stages = [_build(), *_untimed(smoke, cores), *(_smoke() if smoke else _timed())]
    placed = [replace(s, environment=environment | s.environment) for s in stages]
    return [replace(s, command=[word.replace("{folder}", str(folder)) for word in s.command]) for s in placed]


def _build() -> Stage:
    """Everything that is compiled, the CUDA kernels for this GPU alone."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {}
    if torch.cuda.is_available():
        environment["TORCH_CUDA_ARCH_LIST"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return Stage("build", "build", command, 45.0, environment=environment, judge=by_build)


def _untimed(smoke: bool, cores: int) -> list[Stage]:
    """What runs side by side: the tests, compute-sanitizer, and the Triton kernels of the models compiled ahead."""
    workers = str(max(1, min(TEST_WORKERS, cores - 2)))
    tests = [workers, "-m", "gpu", "-q", "--tb=short", "--durations=2", "--continue-on-collection-errors"]
    stages = [
        Stage(
            "tests",
            "test",
            _python("benchmarks.gpu.shards", *tests, *(["tests/ops/test_linear_residual.py"] if smoke else [])),
            TOGETHER,
            beside=True,
            judge=by_pytest,
        ),
    ]
    if smoke:
        return [*stages, *(_sanitizer("memcheck", "linear_residual", kernels) for kernels in ("cuda", "triton"))]
    written = [op for op in OPS if op in triton_kernels.OPS]  # the others are torch's, on a GPU
    stages += [_sanitizer("memcheck", ",".join(written), "cuda"), *(_sanitizer("memcheck", op) for op in written)]
    ahead = ("benchmarks.gpu.exercise", "--device", "cuda", "--sizes", "model")
    return [
        *stages,
        replace(_sanitizer("racecheck", ",".join(written), "cuda"), optional=True),
        *(replace(_sanitizer("racecheck", op), optional=True) for op in ("cls_cross_attention", "cls_fusion")),
        Stage("compile ops", "build", _python(*ahead, "--model", "none"), TOGETHER, beside=True, optional=True),
        Stage("compile models", "build", _python(*ahead, "--op", "none"), TOGETHER, beside=True, optional=True),
    ]


def _timed() -> list[Stage]:
    """A process per model and per op: an illegal access costs the rest of its own process only."""
    largest = ("--model", LARGEST, "--batch")
    plain = ("--kernels", OURS, "--peers", THEIRS)
    against = ("--kernels", "reference-graph,triton,triton-graph,cuda,cuda-graph", "--peers", f"{THEIRS},{COMPILED}")
    train = ("--train", *largest, "128", "--kernels", ALL, "--peers")
    compiled = [
        _figures("compiled", "throughput", "compiled, batch 256", 110, *largest, "256", *against),
        *(
            _figures("compiled", "ops", f"compiled {op}", 10, "--op", op, *COMPILED_OP)
            for op in ("cls_cross_attention", "layer_norm_mlp")
        ),
        _figures("compiled", "throughput", "compiled, batch 1", 5, *largest, "1", *against),
        _figures("compiled", "throughput", "compiled training", 5, *train, "timm-eager,timm-compiled"),
    ]
    return [
        _figures("models", "throughput", "CrossViT-15†", 50, *largest, "256,32,1", *plain),
        *(_op(op, 20) for op in OPS if op in triton_kernels.OPS),
        _figures("train", "throughput", "training", 32, *train, "timm-eager"),
        _op("self_attention", 10),  # torch's, here
        _figures("models", "throughput", "CrossViT-9", 20, "--model", "crossvit_9_240", "--batch", "32,1,256", *plain),
        _figures("models", "throughput", "CrossViT-B", 20, "--model", "crossvit_base_240", "--batch", "256,32", *plain),
        *(replace(stage, optional=True) for stage in compiled),  # max-autotune may take longer than there is
    ]


def _smoke() -> list[Stage]:
    tiny = ("--model", "crossvit_tiny_240", "--batch")
    few = ("--kernels", ALL)
    op = ("--op", "linear_residual", "--batch", "1", *few, "--branch", "small")
    return [
        _figures("models", "throughput", "models", 40, *tiny, "1", "--kernels", OURS, "--peers", THEIRS),
        _figures("ops", "ops", "ops", 40, *op, "--both", "--peers", "none"),
        _figures("train", "throughput", "training", 40, "--train", *tiny, "8", *few, "--peers", "timm-eager"),
        _figures("compiled", "ops", "compiled", 60, *op, "--peers", "reference-compiled"),
    ]


def _python(module: str, *words: str) -> list[str]:
    return [sys.executable, "-m", module, *words]


def _figures(group: str, module: str, name: str, weight: float, *words: str) -> Stage:
    """A benchmark on the GPU in bfloat16."""
    rows = "{folder}/" + f"{module}_{re.sub(r'[^A-Za-z0-9]+', '_', name)}.json"
    common = ("--device", "cuda", "--dtype", "bfloat16", "--seconds", "{seconds}", "--no-plot", "--json", rows)
    return Stage(name, group, _python(f"benchmarks.{module}", *words, *common), weight, judge=by_rows)


def _op(op: str, weight: float) -> Stage:
    """An op forward, and with its backward, at three batches."""
    words = ("--op", op, "--batch", "256,32,1", "--kernels", ALL, "--peers", "sdpa", "--both")
    return _figures("ops", "ops", op, weight, *words)


def _sanitizer(tool: str, op: str, kernels: str = "triton") -> Stage:
    """A tool of compute-sanitizer over an op, or several, at small sizes."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    flags = ["--tool", tool, "--error-exitcode", "86", "--launch-timeout", "600"]  # until torch is imported
    flags += ["--report-api-errors", "no"] if tool == "memcheck" else []  # torch's probing of the driver is no error
    exercise = _python("benchmarks.gpu.exercise", "--device", "cuda", "--kernels", kernels, "--op", op)
    return Stage(
        f"{tool} {kernels if ',' in op else f'{kernels} {op}'}",
        "sanitize",
        [program or "compute-sanitizer", *flags, "--target-processes", "application-only", *exercise],
        TOGETHER,
        beside=True,
        missing=None if program else "compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin",
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # every tensor an allocation with bounds of its own
        judge=by_sanitizer,
    )


def by_build(status: int, output: str) -> Verdict:
    """That there are no CUDA kernels is no failure where there is no nvcc, but is said."""
    without = re.search(r"^crossvit-kernels: (without _cuda\.so: .*)$", output, re.MULTILINE)
    if status != 0 or without is None:
        return by_last_line(status, output)
    return ("failed" if "did not compile" in without[1] else "unavailable"), without[1]


def by_pytest(status: int, output: str) -> Verdict:
    """Its line of counts; no test at all is a failure."""
    counts = re.findall(
        r"^=* ?(\d+ (?:passed|failed|died|error|skipped|deselected|warning).*?)=*$", output, re.MULTILINE
    )
    if status == 5:
        return "failed", "no test is marked gpu"
    first = re.findall(r"^(?:FAILED|ERROR) .*$", output, re.MULTILINE)[:1]
    if not counts:
        return by_last_line(status, output)
    return ("ok" if status == 0 else "failed"), "; ".join([counts[-1].strip(), *first])


def by_sanitizer(status: int, output: str) -> Verdict:
    """Its summary, or that it does not work with this device, which says nothing of the kernels."""
    refused = re.search(r"^.*device (?:is )?not supported.*$", output, re.MULTILINE | re.IGNORECASE)
    if refused:
        return "unavailable", refused[0]
    lines = re.findall(r"^========= (.*\S)", output, re.MULTILINE)
    summary = [line for line in lines if "SUMMARY" in line][-1:]
    if status == 0:
        return "ok", "; ".join(summary)
    own = [line for line in lines if line.startswith(("Invalid", "Error:", "Warning:", "Race"))][:1]
    return "failed", "; ".join([*own, *summary]) or by_last_line(status, output)[1]


def by_rows(status: int, output: str) -> Verdict:
    """What it left out."""
    left = re.findall(r"^(?:left out|not reached): .*$", output, re.MULTILINE)
    left.sort(key=lambda line: not line.startswith(("left out: triton", "left out: cuda")))
    more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
    if left:
        return ("ok" if status == 0 else "failed"), left[0] + more
    return by_last_line(status, output)
