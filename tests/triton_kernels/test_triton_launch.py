"""Launches that skip Triton's preparation: the same kernel with the same arguments as Triton's own path, every time.

There is no GPU here: the driver under Triton is one that keeps what reaches a kernel's launcher, and a compiled kernel
is a number. What Triton makes of the arguments on the way there (binding, specialising, its cache) is Triton's own.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton.compiler
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import crossvit_kernels
from crossvit_kernels.triton_kernels import OPS, direct
from crossvit_kernels.triton_kernels.configs import Config
from crossvit_kernels.triton_kernels.launch import Launch, launch, recording
from inputs import DIFFERENTIABLE, EXAMPLES, Random, layer_norm_linear

HOOKS = ("launch_enter_hook", "launch_exit_hook")


class Driver:
    """Triton's view of a machine with GPUs; `launched` has what came to launchers, as they take it."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.device, self.stream = 0, 7

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 100 * device + self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Kernel(triton.compiler.CompiledKernel):
    """What Triton gets for compiling: a number, and a launcher that calls the hooks it is given."""

    numbers = itertools.count()

    def __init__(self, source: Any, device: Driver) -> None:
        self.src, self.name, self.module = source, "kernel", None
        self.metadata = SimpleNamespace(target=GPUTarget("cuda", 90, 32))
        self.function, self.packed_metadata = next(self.numbers), (4, 1, 0)
        self._device = device

    def _init_handles(self) -> None:
        pass

    @property
    def run(self) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any) -> None:
        metadata, enter, leave = arguments[6:9]
        for hook in (enter, leave):
            if hook is not None:
                hook(metadata)
        self._device.launched.append((*arguments[:6], *arguments[9:]))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(driver, "_active", made)
    monkeypatch.setattr(triton.compiler, "compile", lambda source, **options: Kernel(source, made))
    monkeypatch.setattr(direct, "_kernels", {})
    return made


def add(x_ptr, y_ptr, out_ptr, size, stride, factor, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """A kernel to launch."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = factor
    if y_ptr is not None:
        y += tl.load(y_ptr + index)
    tl.store(out_ptr + index, (tl.load(x_ptr + index * stride, mask=index < size) + y).to(DTYPE))


def copy(x_tiles, out_tiles, BLOCK: tl.constexpr):
    """A kernel to launch."""
    out_tiles.store([0, 0], x_tiles.load([0, BLOCK]))


X = torch.zeros(64)
GIVEN: dict[str, Any] = {"x_ptr": X, "y_ptr": X, "out_ptr": X, "size": 32, "stride": 3, "factor": 2.0}
GIVEN |= {"DTYPE": tl.float32, "BLOCK": 16}
OPTIONS = {"num_warps": 4, "num_stages": 2}


def same(found: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    """Whether both launch the same function on the same arguments, of the same types."""
    return len(found) == len(expected) and all(
        a is b or (type(a) is type(b) and not isinstance(a, Tensor) and a == b) for a, b in zip(found, expected)
    )


def launch_as_triton(device: Driver, kernel: JITFunction, grid: tuple[int, ...], **arguments: Any) -> int:
    """Launches by ours and by Triton's own path, which must not differ, and gives the compiled kernel's number."""
    before = len(device.launched)
    direct.run(kernel, grid, {n: v for n, v in arguments.items() if n not in OPTIONS}, **options_of(arguments))
    kernel[grid](**arguments)
    ours, theirs = device.launched[before:]
    assert same(ours, theirs)
    return ours[4]


def options_of(arguments: dict[str, Any]) -> dict[str, int]:
    return {name: arguments[name] for name in OPTIONS}


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on Triton's own path raises."""
    return lambda: monkeypatch.setattr(JITFunction, "run", lambda *args, **kwargs: pytest.fail("Triton's path"))


@functools.cache
def launches_of_every_op() -> list[Launch]:
    """Forward and backward, and the products that the copy engine feeds."""
    many = layer_norm_linear(Random(), 2, 160, 32, out=48)
    with recording("sm_90") as found:
        for name, example in [*((name, EXAMPLES[name]()) for name in OPS), ("layer_norm_linear", many)]:
            given = {n: v.to(torch.float16) if isinstance(v, Tensor) else v for n, v in example.items()}
            leaves = [v.requires_grad_() for v in given.values() if isinstance(v, Tensor)]
            with torch.set_grad_enabled(name in DIFFERENTIABLE):
                out = getattr(crossvit_kernels, name)(**given, kernels="triton")
            if name in DIFFERENTIABLE:
                torch.autograd.grad(out.sum(), leaves, allow_unused=True)
    return found


def test_the_launch_of_this_triton_is_the_known_one() -> None:
    assert direct.launches_as_known()


def test_every_kernel_of_the_package_is_launched_as_triton_does(device: Driver) -> None:
    launches = launches_of_every_op()
    jitted = {of.name: JITFunction(of.kernel.fn) for of in launches}
    assert {"token_gradient", "linear_tiles", "cls_query", "layer_norm_linear_forward"} <= jitted.keys()
    for _ in range(2):
        for of in launches:
            options = {"num_warps": of.num_warps, "num_stages": of.num_stages}
            launch_as_triton(device, jitted[of.name], of.grid, **of.arguments, **options)


def test_every_kernel_of_the_package_is_launched_directly_again(
    device: Driver, without_triton: Callable[[], None]
) -> None:
    launches = launches_of_every_op()
    jitted = {of.name: JITFunction(of.kernel.fn) for of in launches}

    def run() -> list[tuple[Any, ...]]:
        device.launched.clear()
        for of in launches:
            direct.run(jitted[of.name], of.grid, of.arguments, of.num_warps, of.num_stages)
        return list(device.launched)

    first = run()
    without_triton()
    again = run()
    assert all(same(a, b) for a, b in zip(again, first, strict=True))


# What is to be changed in a launch, and whether Triton compiles anew for it.
CHANGES: dict[str, tuple[dict[str, Any], bool]] = {
    "nothing": ({}, False),
    "another tensor": ({"x_ptr": torch.ones(64)}, False),
    "a parameter": ({"x_ptr": torch.nn.Parameter(torch.ones(64))}, False),
    "an unaligned pointer": ({"x_ptr": X[1:]}, True),
    "an aligned view": ({"x_ptr": X[4:]}, False),
    "another dtype": ({"x_ptr": X.double()}, True),
    "another dtype of the result": ({"out_ptr": X.half()}, True),
    "no tensor": ({"y_ptr": None}, True),
    "another multiple of 16": ({"size": 48}, False),
    "no multiple of 16": ({"size": 33}, True),
    "one": ({"size": 1}, True),
    "a stride of one": ({"stride": 1}, True),
    "zero": ({"size": 0}, False),
    "a stride of 16": ({"stride": 16}, True),
    "the largest of 32 bits": ({"size": 2**31 - 1}, True),
    "more than 32 bits": ({"size": 2**31}, True),
    "more than 32 bits, odd": ({"size": 2**31 + 1}, True),
    "less than 32 bits": ({"size": -(2**31) - 16}, True),
    "64 bits without a sign": ({"size": 2**63}, True),
    "True for 1": ({"stride": True}, True),
    "another number": ({"factor": 0.5}, False),
    "an integer for a number": ({"factor": 2}, True),
    "1.0": ({"factor": 1.0}, False),
    "another constant": ({"BLOCK": 32}, True),
    "another dtype for a constant": ({"DTYPE": tl.float16}, True),
    "other warps": ({"num_warps": 8}, True),
    "other stages": ({"num_stages": 3}, True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_launch_is_compiled_anew_where_triton_does(device: Driver, change: str) -> None:
    """By turns with the launch it differs from, so that each meets what the other left behind."""
    kernel, (changed, anew) = JITFunction(add), CHANGES[change]
    first, second = GIVEN | OPTIONS, GIVEN | OPTIONS | changed
    numbers = [launch_as_triton(device, kernel, (2, 3), **given) for given in (first, second, first, second)]
    assert numbers[:2] == numbers[2:]
    assert (numbers[0] != numbers[1]) == anew


class Pair(NamedTuple):
    """What belongs together, as kernels take it."""

    base: Tensor | None
    stride: int


def add_pairs(x, y, out_ptr, BLOCK: tl.constexpr):
    """A kernel to launch."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x.base + index * x.stride)
    if y is not None:
        value += tl.load(y.base + index * y.stride)
    tl.store(out_ptr + index, value)


# Another second pair than (X, 3), and whether Triton compiles anew for it.
PAIRS: dict[str, tuple[Any, bool]] = {
    "the same": (Pair(X, 3), False),
    "another tensor": (Pair(torch.ones(64), 5), False),
    "an unaligned pointer": (Pair(X[1:], 3), True),
    "another dtype": (Pair(X.double(), 3), True),
    "a stride of one": (Pair(X, 1), True),
    "a stride of 16": (Pair(X, 16), True),
    "no tensor": (Pair(None, 3), True),
    "no pair": (None, True),
}


@pytest.mark.parametrize("change", PAIRS)
def test_fields_of_a_tuple_are_looked_at_as_arguments_are(device: Driver, change: str) -> None:
    kernel, (second, anew) = JITFunction(add_pairs), PAIRS[change]
    given = {"x": Pair(X, 3), "out_ptr": X, "BLOCK": 16, **OPTIONS}
    numbers = [launch_as_triton(device, kernel, (2,), **given, y=y) for y in (Pair(X, 3), second, Pair(X, 3), second)]
    assert numbers[:2] == numbers[2:]
    assert (numbers[0] != numbers[1]) == anew


def test_one_and_true_and_one_point_zero_are_three_kernels(device: Driver) -> None:
    kernel = JITFunction(add)
    values = [1, True, 1.0, 1]
    numbers = [launch_as_triton(device, kernel, (1,), **GIVEN | OPTIONS | {"factor": v}) for v in values]
    assert numbers[0] == numbers[3]
    assert len(set(numbers)) == 3


def test_descriptors_of_tiles(device: Driver) -> None:
    kernel, tensor = JITFunction(copy), torch.zeros(64, 64)

    def run(tile: list[int], tensor: Tensor = tensor, rows: int = 64) -> int:
        """The number of the kernel, which got a descriptor of these rows and tiles."""
        tiles = TensorDescriptor(tensor, [rows, 64], [64, 1], tile)
        number = launch_as_triton(device, kernel, (1,), x_tiles=tiles, out_tiles=tiles, BLOCK=16, **OPTIONS)
        assert device.launched[-2][6] is device.launched[-1][6] is tiles
        return number

    numbers = [run([16, 16]), run([16, 32]), run([16, 16], tensor.half()), run([16, 16], tensor[16:], 48)]
    assert len({*numbers[:3]}) == 3
    assert numbers[3] == numbers[0]
    assert [run([16, 16]), run([16, 32])] == numbers[:2]


def test_arguments_in_another_order(device: Driver) -> None:
    kernel = JITFunction(add)
    number = launch_as_triton(device, kernel, (1,), **GIVEN, **OPTIONS)
    assert launch_as_triton(device, kernel, (1,), **dict(reversed(GIVEN.items())), **OPTIONS) == number


def test_device_and_stream_are_those_of_the_moment(device: Driver, without_triton: Callable[[], None]) -> None:
    kernel = JITFunction(add)
    numbers = []
    for device.device in (0, 1):
        numbers.append(launch_as_triton(device, kernel, (1,), **GIVEN, **OPTIONS))
    assert numbers[0] != numbers[1]
    without_triton()
    device.launched.clear()
    for device.device, device.stream in ((1, 3), (0, 4)):
        direct.run(kernel, (5, 6, 7), {**GIVEN}, **OPTIONS)
    assert [launched[:5] for launched in device.launched] == [(5, 6, 7, 103, numbers[1]), (5, 6, 7, 4, numbers[0])]


def test_modes_of_compiling_are_heeded(device: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = JITFunction(add)
    numbers = {launch_as_triton(device, kernel, (1,), **GIVEN, **OPTIONS)}
    monkeypatch.setattr(knobs.runtime, "debug", True)
    numbers.add(launch_as_triton(device, kernel, (1,), **GIVEN, **OPTIONS))
    monkeypatch.setattr(knobs.compilation, "instrumentation_mode", "fpsan")
    numbers.add(launch_as_triton(device, kernel, (1,), **GIVEN, **OPTIONS))
    assert len(numbers) == 3


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_on_launches_are_called(device: Driver, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As Triton calls them, who watches for as long as it does."""
    kernel, seen = JITFunction(add), []
    direct.run(kernel, (1,), {**GIVEN}, **OPTIONS)
    direct.run(kernel, (1,), {**GIVEN}, **OPTIONS)
    hook = getattr(knobs.runtime, name)
    hook.add(seen.append)
    try:
        direct.run(kernel, (1,), {**GIVEN}, **OPTIONS)
    finally:
        hook.remove(seen.append)
    assert [metadata.get()["name"] for metadata in seen] == ["kernel"]
    monkeypatch.setattr(knobs.runtime, name, lambda metadata: seen.append(metadata))
    direct.run(kernel, (1,), {**GIVEN}, **OPTIONS)
    assert len(seen) == 2


def test_hooks_before_runs_are_called(device: Driver) -> None:
    kernel, seen = JITFunction(add), []
    direct.run(kernel, (1,), {**GIVEN}, **OPTIONS)
    kernel.add_pre_run_hook(lambda *args, **kwargs: seen.append(kwargs["size"]))
    direct.run(kernel, (1,), {**GIVEN}, **OPTIONS)
    assert seen == [32]


@pytest.fixture
def unknown(device: Driver, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A Triton that launches in another way; the sizes that it ran."""
    sizes: list[int] = []

    def run(self: JITFunction, *args: Any, size: int, **kwargs: Any) -> Kernel:
        sizes.append(size)
        return Kernel(None, device)

    direct.launches_as_known.cache_clear()
    monkeypatch.setattr(JITFunction, "run", run)
    yield sizes
    direct.launches_as_known.cache_clear()


def test_a_triton_that_launches_otherwise_launches_itself(device: Driver, unknown: list[int]) -> None:
    kernel = JITFunction(add)
    for size in (1, 2, 2):
        direct.run(kernel, (1,), GIVEN | {"size": size}, **OPTIONS)
    assert unknown == [1, 2, 2]


def test_as_many_launches_are_kept_as_are_said(device: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "MOST", 3)
    kernel = JITFunction(add)
    for size in (*range(8), *range(8)):
        launch_as_triton(device, kernel, (1,), **GIVEN | OPTIONS | {"size": size})
    ((form,),) = [known.forms.values() for known in direct._kernels.values()]
    assert 0 < len(form.compiled) <= 3


def test_launch_gives_blocks_and_options(device: Driver) -> None:
    kernel = JITFunction(add)
    rest = {name: value for name, value in GIVEN.items() if name != "BLOCK"}
    for _ in range(2):
        launch(kernel, (1,), Config({"BLOCK": 64}, num_warps=2, num_stages=1), **rest)
    assert [launched[-1] for launched in device.launched] == [64, 64]
    launch(kernel, (1, 0), Config({"BLOCK": 64}, num_warps=2, num_stages=1), **rest)
    assert len(device.launched) == 2
