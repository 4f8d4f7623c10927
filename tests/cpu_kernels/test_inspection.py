"""The inspection module of source builds: what was built, and how the CPU's kernels divide their work."""

import pytest
import torch

import available
from crossvit_kernels import backends

_C = pytest.importorskip("crossvit_kernels._C", reason="only a build in the source tree has the inspection module")

SIZES = {
    "absorb": {"batch": 3, "heads": 4, "head_width": 24, "width": 96},
    "attention": {"batch": 1, "tokens": 197, "heads": 6, "width": 64},
    "attention_grad": {"batch": 2, "tokens": 197, "heads": 6, "width": 64},
    "linear": {"rows": 394, "in_features": 384, "out_features": 1152},
    "linear_grad": {"rows": 394, "in_features": 384, "out_features": 1152},
    "mlp": {"rows": 394, "width": 384, "hidden": 1152},
    "mlp_grad": {"rows": 394, "width": 384, "hidden": 1152},
    "patch_embed": {"patches": 392, "out_features": 384},
    "project_heads": {"batch": 3, "heads": 4, "head_width": 24, "width": 96},
    "token_gradient": {"batch": 5, "tokens": 196, "width": 96, "heads": 4},
    "token_pass": {"batch": 5, "tokens": 196, "width": 96, "heads": 4},
    "transpose": {"rows": 1152, "columns": 384},
    "weight_grad": {"rows": 394, "out_features": 1152, "in_features": 384},
}
# Kernels whose tasks are the same for any number of threads: partial sums are one for each task.
FIXED = ("linear_grad", "mlp_grad", "token_gradient", "attention_grad", "transpose", "absorb", "project_heads")


@pytest.mark.skipif(not backends.available("cpu"), reason=f"no CPU kernels: {backends.reason('cpu')}")
def test_it_was_built_with_the_library() -> None:
    assert _C.build_info() == {
        "compiler": torch.ops.crossvit_kernels_cpu.compiler(),
        "instruction_sets": available.built_instruction_sets(),
    }


def test_every_kernel_tells_its_plan() -> None:
    assert _C.kernels() == sorted(SIZES)
    for name, sizes in SIZES.items():
        plans = [_C.plan(name, threads, "generic", **sizes) for threads in (1, 2, 16, 64)]
        assert all(plan["tasks"] >= 1 for plan in plans)
        if name in FIXED:
            assert plans == plans[:1] * len(plans)


def test_more_threads_get_more_tasks() -> None:
    for name in ("linear", "mlp", "attention", "token_pass"):
        few, many = (_C.plan(name, threads, "generic", **SIZES[name])["tasks"] for threads in (1, 64))
        assert many > few
    split = _C.plan("attention", 64, "generic", **SIZES["attention"])
    assert split["tasks"] == 6 * split["splits"]
    assert _C.plan("token_pass", 2, "generic", **SIZES["token_pass"]) == {"tasks": 5, "splits": 1}


@pytest.mark.parametrize(
    "arguments, sizes, error, message",
    [
        (("linear", 2, "generic"), {"rows": 3}, TypeError, "linear: the size in_features is missing"),
        (("transpose", 2, "generic"), {"rows": 3, "columns": 2, "x": 1}, TypeError, "transpose: there is no size x"),
        (("transpose", 2, "generic"), {"rows": -3, "columns": 2}, ValueError, "rows: expected at least 0, got -3"),
        (("transpose", 0, "generic"), {"rows": 3, "columns": 2}, ValueError, "threads: expected at least 1, got 0"),
        (("product", 2, "generic"), {}, ValueError, "kernel: expected one of kernels.., got 'product'"),
        (("linear", 2, "sse9"), {}, ValueError, "instruction set 'sse9' was not compiled in"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple, sizes: dict[str, int], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        _C.plan(*arguments, **sizes)
