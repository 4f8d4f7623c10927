"""The rule for when to fuse, as to what the children are: a child of another class, or one whose call does more than
its class's forward, is called as a module, with the bits that plain PyTorch modules give."""

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rule import SITES, assert_close, assert_same_bits, at, in_turn, ops_of, outcome, watch


def put(module: nn.Module, path: str, child: nn.Module) -> None:
    """Another child in the place of the one at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, child)


def check(site: str, child: str, change: Callable[[nn.Module], Any], kernels: str, **options: Any) -> None:
    """What `change` did to `child` shows in outputs and gradients as it does in the plain twin: to the bit in its part,
    whose ops no longer run; the other parts fuse as before."""
    where = SITES[site]
    gradients = options.pop("gradients", True)
    tolerance = options.pop("tolerance", 1e-5)
    for before in (True, False) if where.ours is None else (False,):
        inputs = where.inputs()
        ours, twin = where.pair(kernels, change, before=before)
        assert_close(outcome(ours, inputs, gradients), outcome(twin, inputs, gradients), tolerance)
        untouched = where.pair(kernels)[0]
        if kernels != "reference":
            assert_only_that_part_is_left(site, child, ours, untouched, inputs)
        ours, twin = where.pair(kernels, change, before=before)
        for module in (ours, twin):
            watch(module, where.elsewhere(child))
        if where.same_bits(kernels):
            assert_same_bits(outcome(ours, inputs, gradients), outcome(twin, inputs, gradients))
        assert ops_of(ours, inputs) <= where.keeps, "a disturbed part has fused"


def assert_only_that_part_is_left(site: str, child: str, ours: nn.Module, untouched: nn.Module, inputs: Any) -> None:
    """The other parts fuse as they do where that part has a hook."""
    where = SITES[site]
    watch(untouched, re.escape(child))
    assert ops_of(ours, inputs) == ops_of(untouched, inputs)
    if len(where.parts) > 1 and where.part(child) not in where.alone:
        assert ops_of(ours, inputs), "the undisturbed part does not fuse"


def like(linear: nn.Module, kind: type[nn.Module], *arguments: Any, **options: Any) -> nn.Module:
    """A module of another class with the same weights."""
    made = kind(*arguments, **options).train(linear.training)
    made.load_state_dict(linear.state_dict())
    return made


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Shifted(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Same(nn.Linear):
    """Nothing of its own but what `torch.nn.Module` calls first."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) + 1


def twice(module: nn.Module, path: str, kind: type[nn.Linear] = Twice) -> None:
    old: Any = module.get_submodule(path)
    put(module, path, like(old, kind, old.in_features, old.out_features, old.bias is not None))


@in_turn(site=SITES)
def test_a_subclass_of_linear_runs_its_own_forward(site: str, kernels: str) -> None:
    for turn in range(2):
        for child in SITES[site].some(SITES[site].linears, turn):
            check(site, child, lambda module, child=child: twice(module, child), kernels)
    for child in SITES[site].some(SITES[site].linears, 0)[:1]:
        check(site, child, lambda module, child=child: twice(module, child, Same), kernels)


@in_turn(site=SITES)
def test_a_subclass_of_layer_norm_runs_its_own_forward(site: str, kernels: str) -> None:
    def change(module: nn.Module, path: str) -> None:
        old: Any = module.get_submodule(path)
        put(module, path, like(old, Shifted, old.normalized_shape, old.eps))

    for child in SITES[site].some(SITES[site].norms, 0):
        check(site, child, lambda module, child=child: change(module, child), kernels)


@in_turn(site=SITES)
def test_a_module_around_a_child_is_called(site: str, kernels: str) -> None:
    """Sequentials of one are the least of such wrappers."""
    for child in SITES[site].some(SITES[site].linears, 1) + SITES[site].some(SITES[site].norms, 1):
        check(
            site,
            child,
            lambda m, child=child: put(m, child, nn.Sequential(m.get_submodule(child), nn.Softsign())),
            kernels,
        )


def scaled(module: nn.Module, inputs: Any, output: Any) -> Any:
    return tuple(2 * y for y in output) if isinstance(output, tuple) else 2 * output


def doubled_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (2 * inputs[0], *inputs[1:])


def own_forward(module: nn.Module) -> None:
    run = module.forward
    module.forward = lambda *args, **options: scaled(module, args, run(*args, **options))  # type: ignore[assignment]


def own_call(module: nn.Module) -> None:
    run = module._call_impl
    module._call_impl = lambda *args, **options: scaled(module, args, run(*args, **options))


CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "forward hook": lambda child: child.register_forward_hook(scaled),
    "forward hook with keywords": lambda child: child.register_forward_hook(
        lambda module, inputs, options, output: scaled(module, inputs, output), with_kwargs=True
    ),
    "forward pre-hook": lambda child: child.register_forward_pre_hook(doubled_input),
    "backward hook": lambda child: child.register_full_backward_hook(lambda module, inputs, outputs: (2 * inputs[0],)),
    "backward pre-hook": lambda child: child.register_full_backward_pre_hook(
        lambda module, outputs: tuple(2 * y for y in outputs)
    ),
    "forward of its own": own_forward,
    "call of its own": own_call,
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@in_turn(call=CALLS, site=SITES)
def test_what_sees_or_changes_a_childs_call_does(site: str, call: str, kernels: str) -> None:
    for child in SITES[site].some(SITES[site].children(), list(CALLS).index(call)):
        check(site, child, at(child, CALLS[call]), kernels)


@functools.cache
def compiles_its_own_modules() -> bool:
    """Whether this PyTorch compiles a module of its own that was told to by `compile()`; 2.11 runs it as it is."""
    runs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        runs.append("run")
        return graph.forward

    linear = nn.Linear(2, 2)
    linear.compile(backend=backend)
    linear(torch.ones(1, 2))
    return bool(runs)


@in_turn(site=SITES)
def test_a_compiled_child_is_called_compiled(site: str, kernels: str) -> None:
    """`child.compile()`, by a backend that counts how often its code runs."""
    for child in SITES[site].some(SITES[site].linears, 0) + SITES[site].some(SITES[site].norms, 0):
        runs: list[str] = []

        def backend(graph: torch.fx.GraphModule, inputs: Any, runs: list[str] = runs) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                runs.append("run")
                return graph.forward(*args)

            return run

        torch._dynamo.reset()
        ours, twin = SITES[site].pair(kernels)
        ours.get_submodule(child).compile(backend=backend)
        inputs = SITES[site].inputs()
        assert_close(outcome(ours, inputs), outcome(twin, inputs))
        assert runs or not compiles_its_own_modules(), f"{child} was not called"


@in_turn(call=["forward hook", "backward pre-hook"], site=SITES)
def test_a_call_that_is_plain_again_fuses_again(site: str, call: str, kernels: str) -> None:
    """Hooks that were removed leave nothing behind."""
    where = SITES[site]
    ours, untouched = where.pair(kernels)[0], where.pair(kernels)[0]
    handles = [CALLS[call](ours.get_submodule(child)) for child in where.children()]
    outcome(ours, where.inputs())
    for handle in handles:
        handle.remove()
    assert ops_of(ours, where.inputs()) == ops_of(untouched, where.inputs())
    assert_same_bits(outcome(ours, where.inputs()), outcome(untouched, where.inputs()))
