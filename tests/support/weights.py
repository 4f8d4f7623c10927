"""Models with random weights of which every one matters: biases, norms, positions and CLS tokens too."""

from typing import Any

import timm
import torch
from torch import nn

import crossvit
from crossvit_kernels import backends

TIMM_NAMES = timm.list_models("crossvit*")
# Triton and CUDA kernels take no CPU tensors outside their interpreter and emulation.
CPU_BACKENDS = [name for name in ("reference", "cpu") if backends.available(name)]


def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fills every parameter with fresh random values of a trained model's order of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 0.0
            if "pos_embed" in name or "cls_token" in name:
                spread = 0.5
            elif parameter.dim() == 1:
                mean, spread = float(name.endswith("weight")), 0.2
            else:
                spread = (3 / parameter[0].numel()) ** 0.5
            parameter.uniform_(mean - spread, mean + spread, generator=generator)
    return model


def timm_model(name: str, seed: int = 0, **arguments: Any) -> nn.Module:
    """timm's model in eval mode with perturbed weights."""
    with torch.device("meta"):  # its own initial weights would take seconds
        model = timm.create_model(name, **arguments)
    return perturb(model.to_empty(device="cpu"), seed).eval()


def our_model(name: str, like: nn.Module | None = None, seed: int = 0, **arguments: Any) -> crossvit.CrossViT:
    """Ours in eval mode, with a copy of the weights of `like`, or perturbed ones."""
    with torch.device("meta"):
        model = crossvit.create_model(name, **arguments)
    model.to_empty(device="cpu").eval()
    if like is None:
        perturb(model, seed)
    else:
        model.load_state_dict(like.state_dict())
    return model


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value expected."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
