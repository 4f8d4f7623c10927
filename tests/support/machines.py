"""The op tests as on other machines, over many seeds, and how near their results come to their bounds.

    python tests/support/machines.py --seeds 20

ATen, oneDNN and MKL choose other code, the C++ kernels another instruction set, OpenMP another number of threads. Each
setting is a process of pytest; what this CPU lacks, or runs anyway, is skipped, with the reason. Ctrl-C ends it with
what is known by then.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from available import instruction_sets  # before the kernels are loaded: sets how they run here
from crossvit_kernels import backends

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "ops"
OPS = ("layer_norm_linear", "layer_norm_mlp", "linear_residual", "self_attention", "bicubic_resize", "patch_embed",
       "cls_cross_attention", "cls_fusion")  # fmt: skip
NUMBERS = "not nonfinite and not infinite and not gradcheck"  # the tests that ask how large an error is, and a few more
# Triton kernels take seconds each in the interpreter: these tests are those whose errors vary most.
VARYING = "few_tokens or sharp_scores or without_bias or without_biases"


@dataclass(frozen=True)
class Setting:
    """A name, what it sets in the environment, the tests that it is about, and what is missing for it here."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    tests: str = "cpu"
    lacking: Callable[[], str | None] = lambda: None


@dataclass
class Outcome:
    """What came of a setting: tests passed and failed, the end of pytest's output, and the ratios that it wrote."""

    passed: int
    failed: int
    output: str
    ratios: list[tuple[str, str, str, str, str, float]]


SAME = 'the same here as "as it is"'


def without_avx2() -> str | None:
    """Why the CPU cannot run AVX2."""
    return None if torch.cpu._is_avx2_supported() else "this CPU has no AVX2"


def not_avx2() -> str | None:
    """Why there is no run with AVX2 at most: the CPU lacks it, or has nothing beyond it."""
    if (why := without_avx2()) is not None:
        return why
    return None if torch.cpu._is_avx512_supported() else SAME


def not_avx512() -> str | None:
    """Why there is no run with AVX-512: the CPU lacks it, or it is taken without being asked for."""
    if not torch.cpu._is_avx512_supported():
        return "this CPU has no AVX-512"
    return SAME if torch.backends.cpu.get_cpu_capability() == "AVX512" else None


def not_set(name: str) -> Callable[[], str | None]:
    """Why there is no run with this instruction set of the kernels: it is not to be had, or is taken anyway."""

    def lacking() -> str | None:
        if torch.ops.crossvit_kernels_cpu.instruction_set() == name:
            return SAME
        return None if name in instruction_sets() else f"{name!r} was not compiled in, or this CPU lacks it"

    return lacking


def without(backend: str) -> Callable[[], str | None]:
    return lambda: None if backends.available(backend) else backends.reason(backend)


SETTINGS = [
    Setting("as it is"),
    Setting("ATEN_CPU_CAPABILITY=default", {"ATEN_CPU_CAPABILITY": "default"}),
    Setting("ATEN_CPU_CAPABILITY=avx2", {"ATEN_CPU_CAPABILITY": "avx2"}, lacking=not_avx2),
    Setting("ATEN_CPU_CAPABILITY=avx512", {"ATEN_CPU_CAPABILITY": "avx512"}, lacking=not_avx512),
    Setting("ONEDNN_MAX_CPU_ISA=AVX2", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, lacking=not_avx2),
    Setting("MKL_CBWR=COMPATIBLE", {"MKL_CBWR": "COMPATIBLE"}),
    Setting("MKL_CBWR=AVX2", {"MKL_CBWR": "AVX2"}, lacking=without_avx2),
    *(
        Setting(f"CROSSVIT_KERNELS_ISA={name}", {"CROSSVIT_KERNELS_ISA": name}, lacking=not_set(name))
        for name in ("generic", "avx2", "avx512")
    ),
    Setting("1 thread", lacking=lambda: SAME),
    *(Setting(f"{n} threads", {"OMP_NUM_THREADS": str(n)}) for n in (2, 3)),
    Setting("CUDA kernels", tests="cuda", lacking=without("cuda")),
    Setting("Triton kernels", tests=f"triton and ({VARYING})", lacking=without("triton")),
]
# Two machines that could hardly differ more, for `make test`: few seeds, few tests.
QUICK = [
    Setting(
        "nothing but the baseline, 3 threads",
        {
            "ATEN_CPU_CAPABILITY": "default",
            "MKL_CBWR": "COMPATIBLE",
            "CROSSVIT_KERNELS_ISA": "generic",
            "OMP_NUM_THREADS": "3",
        },
        f"cpu and ({VARYING})",
    ),
    Setting("as it is, 1 thread", {"OMP_NUM_THREADS": "1"}, f"cpu and ({VARYING})"),
]


class Run:
    """A setting's pytest, from start to end; `stop` ends it from another thread."""

    def __init__(self, setting: Setting, seeds: int, ops: tuple[str, ...], step: Callable[[int], object]) -> None:
        self.setting, self.seeds, self.ops, self.step = setting, seeds, ops, step
        self.process: subprocess.Popen[str] | None = None
        self.stopped = False

    def __call__(self) -> Outcome | None:
        """The outcome; None if it was stopped."""
        with tempfile.TemporaryDirectory() as folder:
            ratios = Path(folder) / "ratios.json"
            command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "--color=no"]
            command += [
                "-k",
                f"({self.setting.tests}) and {NUMBERS}",
                *(str(HERE / f"test_{op}.py") for op in self.ops),
            ]
            environment = {
                **os.environ,
                "OMP_WAIT_POLICY": "passive",
                "OMP_NUM_THREADS": "1",
                **self.setting.environment,
                "CROSSVIT_TESTS_SEEDS": str(self.seeds),
                "CROSSVIT_TESTS_RATIOS": str(ratios),
                "PYTHONUNBUFFERED": "1",
            }
            if self.stopped:
                return None
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            output = self._follow()
            if self.stopped:
                return None
            found = json.loads(ratios.read_text()) if ratios.exists() else []
        passed, failed = (
            int(m[1]) if (m := re.search(rf"(\d+) {word}", output[-1000:])) else 0 for word in ("passed", "failed")
        )
        if self.process.returncode not in (0, 1):  # it did not get as far as to count
            failed = max(failed, 1)
        return Outcome(passed, failed, output, found)

    def _follow(self) -> str:
        """Reads what pytest says until it ends, and counts the dots that it makes."""
        assert self.process is not None
        assert self.process.stdout is not None
        output, at_the_dots = [], True
        while character := self.process.stdout.read(1):
            output.append(character)
            if character == "=":
                at_the_dots = False
            if at_the_dots and character in ".FEs":
                self.step(1)
        self.process.wait()
        return "".join(output)

    def stop(self) -> None:
        self.stopped = True
        if self.process is not None:
            self.process.terminate()


def worst(outcome: Outcome) -> tuple[float, str]:
    """The largest ratio and whose it is."""
    if not outcome.ratios:
        return 0.0, "nothing was measured"
    test, _, _, _, tensor, ratio = max(outcome.ratios, key=lambda row: row[5])
    return ratio, f"{tensor} of {test.rpartition('::')[2]}"


def table(outcomes: dict[str, Outcome], skipped: dict[str, str], wanted: list[Setting]) -> str:
    """A line for each setting, and one for each op, backend and precision over all of them."""
    lines = ["", f"{'setting':38} {'passed':>7} {'failed':>7} {'worst ratio error / bound':>10}"]
    for setting in wanted:
        name = setting.name
        if name in skipped:
            lines.append(f"{name:38} skipped: {skipped[name]}")
        elif name not in outcomes:
            lines.append(f"{name:38} did not end")
        else:
            ratio, whose = worst(outcomes[name])
            lines.append(f"{name:38} {outcomes[name].passed:7} {outcomes[name].failed:7} {ratio:.2f}  {whose}")
    by_case: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for outcome in outcomes.values():
        for _, op, backend, precision, _, ratio in outcome.ratios:
            by_case[op, backend, precision].append(ratio)
    lines += ["", f"{'op':20} {'backend':7} {'precision':18} {'results':>8} {'median':>7} {'99 %':>6} {'worst':>6}"]
    for (op, backend, precision), found in sorted(by_case.items()):
        found.sort()
        last = found[min(len(found) - 1, int(0.99 * len(found)))]
        lines.append(
            f"{op:20} {backend:7} {precision:18} {len(found):8}"
            f" {statistics.median(found):7.2f} {last:6.2f} {found[-1]:6.2f}"
        )
    return "\n".join(lines)


def write(path: Path, outcomes: dict[str, Outcome]) -> None:
    """Every ratio, by setting, as JSON."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps({name: outcome.ratios for name, outcome in outcomes.items()}))
    part.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """0 where every test passed, 1 where not, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python tests/support/machines.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=20, help="of every test (20)")
    parser.add_argument("--settings", help="those whose names contain one of these, separated by commas")
    parser.add_argument("--ops", default=",".join(OPS), help="of these only: " + ", ".join(OPS))
    parser.add_argument("--quick", action="store_true", help="two settings, the results that vary most, two seeds")
    parser.add_argument("--workers", type=int, default=max(1, len(os.sched_getaffinity(0))), help="processes at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write every ratio")
    options = parser.parse_args(arguments)
    for name in ("seeds", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: expected at least 1, got {getattr(options, name)}")
    ops = tuple(options.ops.split(","))
    if unknown := [op for op in ops if op not in OPS]:
        parser.error(f"argument --ops: unknown {', '.join(unknown)}, expected of {', '.join(OPS)}")
    wanted = QUICK if options.quick else SETTINGS
    if options.settings is not None:
        wanted = [s for s in wanted if any(part in s.name for part in options.settings.split(","))]
        if not wanted:
            parser.error(
                f"argument --settings: none of {', '.join(s.name for s in SETTINGS)} contains {options.settings!r}"
            )
    if not backends.available("cpu"):
        parser.error(f"there are no C++ kernels: {backends.reason('cpu')}")
    return _all(wanted, 2 if options.quick else options.seeds, ops, options.workers, options.json)


def _all(wanted: list[Setting], seeds: int, ops: tuple[str, ...], workers: int, path: Path | None) -> int:
    began = time.monotonic()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # its processes of pytest end with it
    skipped = {s.name: reason for s in wanted if (reason := s.lacking()) is not None}
    outcomes: dict[str, Outcome] = {}
    lock = threading.Lock()
    with tqdm(unit="test", dynamic_ncols=True) as bar, ThreadPoolExecutor(workers) as pool:

        def step(count: int) -> None:
            with lock:
                bar.update(count)

        runs = [Run(setting, seeds, ops, step) for setting in wanted if setting.name not in skipped]
        futures = {run.setting.name: pool.submit(run) for run in runs}
        interrupted = False
        try:
            for name, future in futures.items():
                bar.set_description(name)
                outcome = future.result()
                if outcome is None:
                    continue
                outcomes[name] = outcome
                if outcome.failed:
                    tqdm.write(f"{name}: {outcome.failed} failed\n{outcome.output[-6000:]}")
                else:
                    tqdm.write(f"{name}: {outcome.passed} passed, {worst(outcome)[0]:.2f} of the bound at most")
                sys.stdout.flush()
                if path is not None:
                    write(path, outcomes)
        except KeyboardInterrupt:
            interrupted = True
            for run in runs:
                run.stop()
            for future in futures.values():
                future.cancel()
    print(table(outcomes, skipped, wanted))
    failed = sum(outcome.failed for outcome in outcomes.values())
    print(f"{sum(o.passed for o in outcomes.values())} passed, {failed} failed in {time.monotonic() - began:.0f} s")
    return 130 if interrupted else int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
