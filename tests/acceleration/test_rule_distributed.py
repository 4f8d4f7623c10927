"""The rule for when to fuse, as to weights that are spread over processes or are tensors of another class: they are
taken where they are gathered, and else their own modules run."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.two_tensor import TwoTensor

from rule import SITES, assert_close, assert_same_bits, in_turn, ops_of, outcome, watch

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="there is no gloo"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]
BLOCKS = ["nn.Block", "timm Block"]


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """One process that is a group by itself."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def whole(results: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in results.items()}


@in_turn(key=SITES)
def test_fsdp_of_a_whole_module(mesh: DeviceMesh, key: str, kernels: str) -> None:
    """Its weights are gathered while it runs: it fuses as before."""
    where = SITES[key]
    if where.ours is None:
        pytest.skip("its class changes, see test_accelerate_uses")
    ours, untouched = where.pair(kernels)[0], where.pair(kernels)[0]
    expected = outcome(untouched, where.inputs())
    fully_shard(ours, mesh=mesh)
    inputs = where.inputs()
    assert ops_of(ours, inputs) == ops_of(untouched, inputs)
    assert_same_bits(whole(outcome(ours, inputs)), expected)


@in_turn(key=["nn.Block", "timm Block", "CaiT LayerScaleBlockClassAttn", "timm MultiScaleBlock"])
def test_fsdp_of_an_accelerated_module_and_of_its_root(mesh: DeviceMesh, key: str, kernels: str) -> None:
    for inner in (True, False):
        where, inputs = SITES[key], SITES[key].inputs()
        ours, twin = where.pair(kernels)
        expected = ops_of(ours, inputs)
        root = Root(ours)
        if inner:
            fully_shard(ours, mesh=mesh)
        fully_shard(root, mesh=mesh)
        assert ops_of(root, inputs) == expected
        found = {k.removeprefix("module."): v for k, v in whole(outcome(root, inputs)).items()}
        assert_close(found, outcome(twin, inputs))


class Root(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)


@in_turn(key=SITES)
def test_fsdp_of_a_child(mesh: DeviceMesh, key: str, kernels: str) -> None:
    """A Linear that is sharded by itself is gathered only while it is called: so it is called."""
    where, inputs = SITES[key], SITES[key].inputs()
    for child in where.some(where.linears, 0):
        ours, twin = where.pair(kernels)
        fully_shard(ours.get_submodule(child), mesh=mesh)
        assert_close(whole(outcome(ours, inputs)), outcome(twin, inputs))
        if kernels != "reference":
            untouched = where.pair(kernels)[0]
            watch(untouched, re.escape(child))
            assert ops_of(ours, inputs) == ops_of(untouched, inputs)


@in_turn(key=["nn.Block", "timm Block", "CaiT LayerScaleBlock"])
def test_tensor_parallel(mesh: DeviceMesh, key: str, kernels: str) -> None:
    """An MLP split by columns and rows, as `parallelize_module` does it; the attention fuses on."""
    where, inputs = SITES[key], SITES[key].inputs()
    ours, twin = where.pair(kernels)
    for module in (ours, twin):
        parallelize_module(module, mesh, {"mlp.fc1": ColwiseParallel(), "mlp.fc2": RowwiseParallel()})
    assert_close(whole(outcome(ours, inputs)), whole(outcome(twin, inputs)))
    if kernels != "reference" and key != "CaiT LayerScaleBlock":
        untouched = where.pair(kernels)[0]
        watch(untouched, "norm2|mlp")
        assert ops_of(ours, inputs) == ops_of(untouched, inputs) != set()


@in_turn(key=["nn.LayerNormLinear", *BLOCKS])
def test_distributed_weights_and_inputs(mesh: DeviceMesh, key: str, kernels: str) -> None:
    """DTensors throughout, without a hook: plain modules know what to do with them."""
    where = SITES[key]
    ours, twin = where.pair(kernels)

    def spread(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            placement = Shard(0) if parameter.dim() == 2 else Replicate()
            module.register_parameter(key, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement])))

    results = []
    for module in (ours, twin):
        distribute_module(module, mesh, spread)
        inputs = tuple(distribute_tensor(x, mesh, [Replicate()]) for x in where.inputs())
        try:
            with torch.no_grad():
                results.append(module(*inputs))
        except (RuntimeError, NotImplementedError) as error:  # plain PyTorch's own limits
            results.append(error)
    found, expected = results
    if isinstance(expected, Exception):
        assert type(found) is type(expected)
    else:
        assert torch.equal(found.full_tensor(), expected.full_tensor())


@in_turn(key=SITES)
def test_weights_of_another_tensor_class(key: str, kernels: str) -> None:
    """PyTorch's two tensors in one, which know only PyTorch's ops: to the bit what plain modules give."""
    where, inputs = SITES[key], SITES[key].inputs()
    for child in where.some(where.linears, 1) + where.some(where.norms, 0):
        for before in (True, False) if where.ours is None else (False,):
            ours, twin = where.pair(kernels, before=before)
            results = []
            for module in (ours, twin):
                watch(module, where.elsewhere(child))
                weight = module.get_submodule(child).weight
                module.get_submodule(child).weight = nn.Parameter(
                    TwoTensor(weight.detach(), copy.deepcopy(weight.detach())), requires_grad=False
                )
                with torch.no_grad():
                    results.append(torch.utils._pytree.tree_leaves(module(*inputs)))
            for found, expected in zip(*results, strict=True):
                found, expected = (y.a if isinstance(y, TwoTensor) else y for y in (found, expected))
                if where.same_bits(kernels):
                    assert torch.equal(found, expected), child
