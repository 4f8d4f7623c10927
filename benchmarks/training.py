"""A whole training step, as `--train` times it: forward, cross entropy, backward and AdamW on fixed images."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from .session import UnsupportedError


class TrainingStep:
    """One step per call of a float32 model in training mode; bfloat16 and float16 mean autocast, as training does it.

    The learning rate is tiny: the thousandth step then works on numbers of the same kind as the first.
    """

    def __init__(self, model: nn.Module, images: Tensor, dtype: torch.dtype, *, compiled: bool = False) -> None:
        self.parameters = dict(model.named_parameters())
        if compiled:
            torch.compiler.reset()
        self.model: Callable[[Tensor], Tensor] = (
            torch.compile(model.train(), dynamic=False) if compiled else model.train()
        )
        self.images = images
        self.labels = torch.arange(len(images), device=images.device) * 37 % 1000
        self.dtype = dtype
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7, weight_decay=0.05, fused=True)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        logits, loss = self._forward()
        loss.backward()
        self.optimizer.step()
        return logits

    def logits_and_gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits and every parameter's gradient at the weights as they are; no step is made."""
        self.optimizer.zero_grad()
        logits, loss = self._forward()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None}
        return logits.detach().float(), gradients

    def _forward(self) -> tuple[Tensor, Tensor]:
        half = self.dtype != torch.float32
        context: AbstractContextManager = torch.autocast(self.images.device.type, self.dtype) if half else nullcontext()
        with context:
            logits = self.model(self.images)
            return logits, nn.functional.cross_entropy(logits.float(), self.labels)


def peer_step(peer: str, model: nn.Module, images: Tensor, dtype: torch.dtype) -> TrainingStep:
    """The step of timm's model, eager or compiled; the inference engines raise UnsupportedError."""
    if peer not in ("timm-eager", "timm-compiled"):
        raise UnsupportedError("an inference engine, it does not train")
    return TrainingStep(copy.deepcopy(model), images, dtype, compiled=peer == "timm-compiled")
