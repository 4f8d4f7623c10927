"""docs/design/cls_cross_attention.md names each step of the op; in every backend a function has that name. What a page
names once stands once."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "design" / "cls_cross_attention.md").read_text()
STEPS = re.findall(r"\*\*`(\w+)`\*\*", PAGE)
# Where the functions of each backend are, and how one begins.
BACKENDS = {
    "cpu": ("csrc/cpu/cls_cross_attention.cpp", r"^\w[\w:<>, ]* {step}\("),
    "cuda": ("csrc/cuda/*.h", r"^Error {step}\("),
    "triton": ("crossvit_kernels/triton_kernels/kernels/*.py", r"^def {step}\("),
}
# Names that the page replaced: none of them is a word of a backend's sources any more.
REPLACED = ("t_h", "w_h", "grad_scores_tokens")


def sources(pattern: str) -> str:
    found = sorted(ROOT.glob(pattern))
    assert found, pattern
    return "\n".join(path.read_text() for path in found)


def test_the_page_names_the_steps() -> None:
    assert STEPS == [
        "cls_query",
        "token_pass",
        "cls_value",
        "value_gradient",
        "token_gradient",
        "query_gradient",
        "query_input_gradient",
        "projection_gradients",
        "finish_gradients",
    ]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("language", BACKENDS)
def test_every_backend_has_the_step(language: str, step: str) -> None:
    pattern, beginning = BACKENDS[language]
    assert re.search(beginning.format(step=step), sources(pattern), re.MULTILINE), f"{step} in {pattern}"


@pytest.mark.parametrize("name", REPLACED)
def test_no_other_name_is_left(name: str) -> None:
    everything = sources("csrc/cpu/*.[ch]*") + sources("csrc/cuda/*.c*") + sources("csrc/cuda/*.h")
    everything += sources("crossvit_kernels/triton_kernels/**/*.py")
    assert not re.search(rf"\b{name}\b", everything)


def test_triton_takes_the_statistics_of_layer_norm_in_one_place() -> None:
    """`row_statistics` of docs/design/layer_norm_linear.md: no other kernel computes 1 / deviation by itself."""
    kernels = sources("crossvit_kernels/triton_kernels/kernels/*.py")
    assert len(re.findall(r"^def row_statistics\(", kernels, re.MULTILINE)) == 1
    assert kernels.count("rsqrt(") == 1
