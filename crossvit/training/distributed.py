"""One process or many: what torchrun says, models wrapped by DDP or FSDP2, and their weights whole again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from crossvit_kernels.nn import Block

from ..models.classifier import Classifier
from ..models.stage import MultiScaleBlock

STRATEGIES = ("auto", "ddp", "fsdp")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. `group`: whether there is a process group (not without torchrun)."""

    rank: int
    world: int
    device: torch.device
    group: bool

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, of a tensor of any shape."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag if self.world == 1 else bool(self.sum(torch.tensor(int(flag))).item())

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            self.sum(torch.zeros(1))


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """The process group that torchrun's environment describes, or this process alone without one.

    device: "cpu", "cuda" (with torchrun the local rank's) or "auto". Raises ValueError for a device that is missing.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and local >= torch.cuda.device_count():
        raise ValueError(f"device='cuda' needs GPU number {local}, there are {torch.cuda.device_count()}")
    cuda = torch.cuda.is_available() and device != "cpu"
    place = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    if "WORLD_SIZE" not in os.environ:
        yield Processes(0, 1, place, group=False)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", device_id=place if cuda else None)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), place, group=True)
    finally:
        dist.destroy_process_group()


def shard(model: Classifier, place: Processes) -> None:
    """Makes `model` an FSDP2 model in place: its blocks and stages, and the rest, each sharded over all processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(place.device.type, (place.world,))
    for kind in (Block, MultiScaleBlock):  # a stage without the blocks in it
        for module in [m for m in model.modules() if isinstance(m, kind)]:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def replicate(model: Classifier, place: Processes) -> nn.Module:
    """`model` in DistributedDataParallel, or itself where it is alone."""
    if place.world == 1:
        return model
    return DistributedDataParallel(model, device_ids=[place.device] if place.device.type == "cuda" else None)


@contextmanager
def local_gradients(model: nn.Module, local: bool) -> Iterator[None]:
    """Inside, with `local`, a backward only adds to this process's own gradients."""
    if hasattr(model, "set_requires_gradient_sync"):
        cast(Any, model).set_requires_gradient_sync(not local)
        yield
        return
    with model.no_sync() if local and isinstance(model, DistributedDataParallel) else nullcontext():
        yield


def whole(value: Any) -> Any:
    """A copy on the CPU of nested dicts, lists and tensors, sharded tensors put together (all processes take part)."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: whole(entry) for key, entry in value.items()}
    return type(value)(whole(entry) for entry in value) if isinstance(value, list | tuple) else value


def load_whole(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Puts a whole state dict into a model that may be sharded."""
    own = model.state_dict()
    if own.keys() != state.keys():
        raise ValueError(f"the checkpoint's weights are of another model: {sorted(own.keys() ^ state.keys())[:8]}")
    with torch.no_grad():
        for name, target in own.items():
            target.copy_(_like(target, state[name]))


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Puts an optimizer's whole state into one over parameters that may be sharded, in the same order. What its groups
    are set to stays. Raises ValueError where the groups are of other sizes.
    """
    sizes = [[len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            "the checkpoint's optimizer groups the parameters in another way: layer_decay cannot be turned on or off "
            "within a run, nor weight_decay"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        index: {
            name: _like(parameters[index], value) if isinstance(value, Tensor) and value.dim() else value
            for name, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def _like(target: Tensor, value: Tensor) -> Tensor:
    if target.shape != value.shape:
        raise ValueError(f"the checkpoint has a tensor of {tuple(value.shape)} for one of {tuple(target.shape)}")
    if isinstance(target, DTensor):
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    return value
