"""timm's models that `accelerate` knows, small and with weights that all matter, and what the tests ask of them."""

from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from crossvit_kernels.swaps import Swap

CROSSVITS = timm.list_models("crossvit_*")
# SigLIP's: "siglip" has the attention pooling of the models of that name in front of its head.
OTHERS = ["cait_xxs24_224", "deit_tiny_patch16_224", "siglip"]
SHALLOW: dict[str, Any] = {"crossvit": ((1, 1, 0), (1, 2, 0)), "cait": 3, "deit": 3}


def build(name: str, seed: int = 0, *, whole: bool = False, **options: Any) -> nn.Module:
    """One of timm's models with all its parameters random, so that biases, norms and positions count; for small images,
    and with few blocks unless `whole`."""
    family = name.partition("_")[0]
    if family in SHALLOW and not whole:
        options.setdefault("depth", SHALLOW[family])
    with torch.device("meta"):  # initialising as timm does takes far longer than a forward
        if family == "siglip":
            options |= {"img_size": 48, "embed_dim": 96, "depth": 2, "num_heads": 3, "global_pool": "map"}
            model = VisionTransformer(class_token=False, num_classes=10, **options)
        else:
            size = 120 if family == "crossvit" else 64
            model = timm.create_model(name, img_size=size, num_classes=10, **options)
    generator = torch.Generator().manual_seed(seed)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            vector = parameter.dim() not in (2, 4)
            mean = 1.0 if vector and key.endswith("weight") else 0.0  # of a norm
            parameter.normal_(mean, 0.2 if vector else parameter[0].numel() ** -0.5, generator=generator)
    return model


def tiny(name: str) -> nn.Module:
    """The least of `build` that has every kind of module of its family: for what compiles it."""
    family = name.partition("_")[0]
    if family == "crossvit":
        return build(name, embed_dim=(32, 48), num_heads=(2, 2), depth=((1, 1, 0),))
    if family == "cait":
        return build(name, embed_dim=48, num_heads=2, depth=1, depth_token_only=1)
    return build(name)


def images(model: nn.Module, batch: int = 2) -> Tensor:
    size = getattr(model, "img_size", None) or model.patch_embed.img_size
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1)) - 0.5


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Logits and the gradients of the images and of every parameter."""
    x = x.clone().requires_grad_()
    logits = model(x)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits)
    leaves = {"images": x} | {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((logits * weights).sum(), leaves.values(), allow_unused=True)
    return {"logits": logits.detach()} | {n: g for n, g in zip(leaves, gradients) if g is not None}


def swapped(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Swap)]
