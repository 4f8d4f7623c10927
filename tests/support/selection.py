"""Which cases of the tests a run leaves out, and why: every run ends with the list.

Without a GPU, interpreted and emulated kernels take seconds a case. So a test over several cases runs each of them in
one precision, which takes turns over the cases: every case and every precision is met, in a fraction of the time.
CROSSVIT_TESTS_ALL=1 has the emulation run them all; on a GPU all run. Four markers say more of a test:

    one_in(n)          without a GPU one in n of its variants runs
    compiled_only      it shows nothing in the interpreter, which runs one kernel at a time
    not_interpreted    it is the same for every backend, and slow without a GPU
    several_threads    it is of the C++ kernels, which share out their work
"""

import math
import os
from collections import Counter
from typing import Any

import pytest

from available import GPU, NATIVE, computes, interpreted
from crossvit_kernels import backends
from crossvit_kernels.dispatch.register import OPS
from numerics import AUTOCAST, AUTOCAST16, BFLOAT16, FLOAT16, FLOAT32, PRECISIONS

# float16 is run through the interpreter, where bfloat16 is not to be had; a GPU compiles its kernels as bfloat16's.
INTERPRETED = (FLOAT16, AUTOCAST16)
# Over these lists Triton does without autocast: interpreting, or compiling for each width and dtype, takes seconds.
LISTS = {"shape", "kind", "where", "value"}
# Without a GPU a test over several cases runs each in one of these precisions: over the lists, and over other cases.
TURNS = {
    "triton": ((FLOAT32, FLOAT16), (FLOAT32, FLOAT16, AUTOCAST16)),
    "cuda": ((FLOAT32, BFLOAT16, FLOAT16, AUTOCAST), PRECISIONS),
}
LARGE = 4_000_000  # of the product of a case's sizes: from here in float16 alone, from five times that not at all
# Resizes and shapes that take the interpreter many seconds each, where others show the same.
SLOW = {
    *((60, 60), (28, 28), (240, 240), (1, 1), (45, 70)),
    *((1, 240, 240, 12, 32), (1, 224, 224, 16, 32)),
    *((1, 196, 384, 6), (1, 1156, 192, 6), (9, 64, 224, 7), (1, 40, 768, 12), (5, 30, 448, 7), (2, 30, 384, 768, 12)),
    *((2, 400, 256, 128, 4), (9, 17, 448, 224, 7), (2, 768), (5, 448), (1, 196, 224)),
}
MARKERS = (
    "gpu: needs a CUDA device (skipped with the reason where there is none)",
    "one_in(n): without a GPU one in n of its variants runs",
    "compiled_only: shows nothing in Triton's interpreter",
    "not_interpreted: is the same for every backend, and slow without a GPU",
    "several_threads: is of the C++ kernels, whatever it is called with",
)

ITSELF = "the reference serves the op, which would be compared with itself"
NO_BACKEND = "only the reference is there"
NOT_HERE = "the CPU's kernels do not compute in this precision on this machine"
FOR_THE_INTERPRETER = "the precision is the interpreter's stand-in for one that the GPU has"
COMPILING = "Triton would compile for every width and dtype, under autocast too"
SAME = "the same for every backend, and slow without a GPU"
TOO_SLOW = "too slow in the interpreter, and another case shows the same"
ONE_IN = "one of several variants runs without a GPU"
ANOTHER_PRECISION = "this case's turn is in another precision"


def mark(item: pytest.Item) -> None:
    """Marks what needs a GPU as such, and as skipped where there is none."""
    parameters = parameters_of(item)
    backend, precision = parameters.get("backend"), parameters.get("precision")
    if backend is None:
        pass
    elif precision is not None and not computes(backend, precision):
        if backend != "cpu":
            item.add_marker("gpu")
    elif (backend == "triton" and not GPU and item.get_closest_marker("compiled_only")) or (
        GPU and backend in ("triton", "cuda")
    ):
        item.add_marker("gpu")
    if item.get_closest_marker("gpu") and not GPU:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def why_left_out(item: pytest.Item) -> str | None:
    """Why this case does not run here; None where it does, or is skipped."""
    parameters = parameters_of(item)
    backend, precision = parameters.get("backend"), parameters.get("precision")
    op = parameters.get("name", item.module.__name__.removeprefix("test_"))
    if "backend" in getattr(item, "fixturenames", ()) and not NATIVE:
        return NO_BACKEND
    if backend is not None and op in OPS and not backends.serves(backend, op):
        return ITSELF
    if backend is not None and precision is not None and not computes(backend, precision):
        return NOT_HERE if backend == "cpu" else None
    if item.get_closest_marker("compiled_only") and backend == "triton" and not GPU:
        return None
    if GPU and backend in ("triton", "cuda"):
        if backend == "triton" and precision in INTERPRETED:
            return FOR_THE_INTERPRETER
        if backend == "triton" and precision == AUTOCAST and parameters.keys() & LISTS:
            return COMPILING
        return None
    return why_without_gpu(item, parameters)


def why_without_gpu(item: pytest.Item, parameters: dict[str, Any]) -> str | None:
    """Why this case of an interpreted or emulated backend does not run; None where it does."""
    backend = parameters.get("backend", parameters.get("kernels"))
    if not interpreted(backend) or (backend == "cuda" and os.environ.get("CROSSVIT_TESTS_ALL")):
        return None
    if item.get_closest_marker("not_interpreted"):
        return SAME
    if backend == "triton" and parameters.get("size", parameters.get("shape")) in SLOW:
        return TOO_SLOW
    steps = []
    for parametrized in item.iter_markers("parametrize"):
        names = [name.strip() for name in parametrized.args[0].split(",")]
        if names[0] not in ("kernels", "precision"):
            here = [parameters[name] for name in names]
            cases = [list(case) if len(names) > 1 else [case] for case in parametrized.args[1]]
            steps.append(cases.index(here))
    if not steps:
        return None
    marker = item.get_closest_marker("one_in")
    every = 4 if parameters.get("image_size") == (24, 40) else marker.args[0] if marker else 1
    turn, left = divmod(sum(steps), every if len(steps) > 1 else 1)
    if left:
        return ONE_IN
    if "precision" not in parameters:
        return None
    cost = math.prod(parameters.get("shape", ())) * parameters.get("out", parameters.get("hidden", 0))
    if backend == "triton" and cost > LARGE:
        return None if parameters["precision"] == FLOAT16 and cost < 5 * LARGE else TOO_SLOW
    turns = TURNS[backend][0 if parameters.keys() & LISTS else 1]
    return None if parameters["precision"] == turns[turn % len(turns)] else ANOTHER_PRECISION


def parameters_of(item: pytest.Item) -> dict[str, Any]:
    """The values of a case's parameters, by name."""
    return item.callspec.params if hasattr(item, "callspec") else {}


class LeftOut:
    """A plugin that leaves cases out, counts them by backend and reason, and prints the counts at the end."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leaves out what `why_left_out` names, and says so to pytest."""
        left_out = []
        for item in items:
            mark(item)
            if (why := why_left_out(item)) is not None:
                backend = parameters_of(item).get("backend", parameters_of(item).get("kernels", "every backend"))
                self.counts[f"{backend}: {why}"] += 1
                left_out.append(item)
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Hands a worker's counts to the process that started it."""
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["left_out"] = dict(self.counts)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Takes them; all workers collect the same."""
        self.counts = Counter(getattr(node, "workeroutput", {}).get("left_out", {})) or self.counts

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Prints what was left out and why."""
        if self.counts:
            terminalreporter.section(f"{self.counts.total()} cases left out (tests/support/selection.py)", sep="-")
            for why, count in sorted(self.counts.items()):
                terminalreporter.line(f"{count:5d}  {why}")
