"""What the benchmarks of whole models time: CrossViTs with timm's weights on photographs, held to the reference."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import crossvit

from . import peers
from .photographs import photographs
from .session import DisagreementError, dtype_name, where
from .training import TrainingStep

# Largest difference from the float32 reference's logits over the largest logit. Correct implementations stay at a tenth
# (float32) and a third (the others) of it; logits of two different photographs differ by 0.3.
LOGIT_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2}
# Norm of the difference from the float32 reference's gradients over their norm, all parameters together.
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}


@dataclass(frozen=True)
class Cell:
    """What is compared within: candidates of one cell make the same work."""

    model: str
    batch: int
    dtype: torch.dtype
    threads: int
    train: bool
    device: str = "cpu"

    @property
    def mode(self) -> str:
        return "train" if self.train else "inference"

    def __str__(self) -> str:
        place = where(self.device, self.threads)
        return f"{self.model}, batch {self.batch}, {dtype_name(self.dtype)}, {self.mode}, {place}"


@functools.lru_cache(maxsize=1)
def timm_model(name: str, device: str) -> nn.Module:
    """timm's model on the device, float32, whose weights all candidates have."""
    return peers.timm_model(name).to(device)


def ours(name: str, kernels: str, device: str) -> nn.Module:
    """Ours with timm's weights, float32."""
    model = crossvit.create_model(name, kernels=kernels).to(device)
    model.load_state_dict(timm_model(name, device).state_dict())
    return model


@functools.lru_cache(maxsize=2)
def images(model: str, batch: int, device: str) -> Tensor:
    """Photographs of the model's size on the device, float32."""
    return photographs(batch, timm_model(model, device).default_cfg["input_size"][1:]).to(device)


def our_call(cell: Cell, kernels: str) -> Callable[[], Tensor]:
    """A forward pass of ours on these kernels, cast to the cell's dtype, or a training step under autocast to it."""
    model, pictures = ours(cell.model, kernels, cell.device), images(cell.model, cell.batch, cell.device)
    if cell.train:
        return TrainingStep(model, pictures, cell.dtype)
    return peers.inference(model.eval().to(cell.dtype), pictures.to(cell.dtype))


def check(cell: Cell, run: Callable[[], Tensor]) -> float:
    """By how much a call's logits differ from the float32 reference's, over the largest of these. Raises
    DisagreementError where they, or a training step's gradients, differ by more than the tolerance."""
    expected, expected_gradients = _reference(cell.model, cell.batch, cell.train, cell.device)
    if isinstance(run, TrainingStep):
        logits, gradients = run.logits_and_gradients()
        off, allowed = _gradient_difference(gradients, expected_gradients), GRADIENT_TOLERANCE[cell.dtype]
        if not off <= allowed:
            raise DisagreementError(f"its gradients are {off:.2g} of their norm off, {allowed:g} is allowed")
    else:
        logits = run().float()
    if logits.shape != expected.shape:
        raise DisagreementError(f"its logits are {tuple(logits.shape)}, the reference's {tuple(expected.shape)}")
    off, allowed = ((logits - expected).abs().max() / expected.abs().max()).item(), LOGIT_TOLERANCE[cell.dtype]
    if not off <= allowed:
        raise DisagreementError(f"its logits are {off:.2g} of the largest off, {allowed:g} is allowed")
    return off


@functools.lru_cache(maxsize=2)
def _reference(name: str, batch: int, train: bool, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the float32 reference and, for training, its gradients."""
    call = our_call(Cell(name, batch, torch.float32, torch.get_num_threads(), train, device), "reference")
    return call.logits_and_gradients() if isinstance(call, TrainingStep) else (call(), {})


def _gradient_difference(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    if gradients.keys() != expected.keys():
        missing = sorted(gradients.keys() ^ expected.keys())
        raise DisagreementError(f"only one of it and the reference has gradients of {', '.join(missing[:4])}")
    squares = sum((gradients[name].float() - expected[name]).square().sum().item() for name in expected)
    return math.sqrt(squares / sum(gradient.square().sum().item() for gradient in expected.values()))
