"""patch_embed: an image's patches, projected, behind the CLS token, with their positions.

    image_n = the n-th P × P patch of images, row by row             images (B, C, H, W), N = (H / P) (W / P)
    patch_n = Σ weight ∘ image_n + bias                              weight (D, C, P, P), the sum over C, P, P
    out     = [cls_token ‖ patch_1 … patch_N] + pos_embed            (B, 1 + N, D)

Where image_size is another size than the images', they are first resized to it bicubically.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch.call import call, needs_reference
from ..dispatch.register import register
from ..dispatch.spec import Argument, LinearParams, OpSpec, Result, Shapes
from . import validate


def patch_embed_reference(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor,
    pos_embed: Tensor,
    *,
    image_size: int | tuple[int, int] | None = None,
) -> Tensor:
    """patch_embed in plain PyTorch."""
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size or images.shape[-2:])
    if size != tuple(images.shape[-2:]):
        images = F.interpolate(images, size, mode="bicubic", align_corners=False)
    patches = F.conv2d(images, weight, bias, stride=weight.shape[-2:]).flatten(2).transpose(1, 2)
    return torch.cat([cls_token.expand(images.shape[0], -1, -1), patches], dim=1) + pos_embed


def _reference(*inputs: Any) -> Tensor:
    *given, height, width = inputs
    return patch_embed_reference(*given, image_size=(height, width))


def _shapes(images: Tensor, weight: Tensor, height: int, width: int) -> Shapes:
    validate.tensor("images", images, "(B, C, H, W)")
    validate.tensor("weight", weight, "(D, C, P, P)")
    embed, _, _, patch = weight.shape
    validate.positive("weight's smallest side", min(embed, patch))
    for name, side in ("height", height), ("width", width):
        if side <= 0 or side % patch:
            raise ValueError(f"{name}: expected a multiple of the patch's {patch}, got {side}")
    return {
        "images": images.shape,
        "weight": (embed, images.shape[1], patch, patch),
        "bias": (embed,),
        "cls_token": (1, 1, embed),
        "pos_embed": (1, 1 + (height // patch) * (width // patch), embed),
    }


def _results(images: Tensor, weight: Tensor, cls_token: Tensor, pos_embed: Tensor) -> tuple[Result, ...]:
    dtype = torch.promote_types(torch.promote_types(weight.dtype, cls_token.dtype), pos_embed.dtype)
    return (((images.shape[0], *pos_embed.shape[1:]), dtype),)


def _flops(backend: str, images: Tensor, weight: Tensor, height: int, width: int) -> int:
    return 2 * images.shape[0] * height * width * weight.shape[0] * weight.shape[1]


def _backward_flops(
    backend: str, needs: dict[str, bool], images: Tensor, weight: Tensor, height: int, width: int
) -> int:
    return (needs["images"] + needs["weight"]) * _flops(backend, images, weight, height, width)


_op = register(
    OpSpec(
        "patch_embed",
        [
            Argument("images", activation=True),  # no matrix: they are resized in their own dtype first
            LinearParams("weight", "bias"),
            Argument("cls_token"),
            Argument("pos_embed"),
            Argument("height", "SymInt"),
            Argument("width", "SymInt"),
        ],
        computes_in="weight",
        reference=_reference,
        shapes=_shapes,
        results=_results,
        flops=_flops,
        backward_flops=_backward_flops,
        save=lambda: (),
    )
)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor,
    pos_embed: Tensor,
    *,
    image_size: int | tuple[int, int] | None = None,
    kernels: str = "auto",
) -> Tensor:
    """[cls_token ‖ patches of the resized images, projected] + pos_embed.

    Args:
        images: (B, C, H, W), floating point, any strides.
        weight, bias: (D, C, P, P) and (D,), as nn.Conv2d holds them; the bias may be None.
        cls_token: (1, 1, D), any floating dtype but float64 beside others.
        pos_embed: (1, 1 + N, D), N the number of patches, likewise.
        image_size: the size that the images are resized to first, an int or (height, width), as
            torch.nn.functional.interpolate does with mode="bicubic", align_corners=False; None: as they come. Multiples
            of P.
        kernels: the backend, see `crossvit_kernels.backends`.

    Returns:
        (B, 1 + N, D), patches row by row, in the dtype to which the projection, cls_token and pos_embed promote.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is wrong; RuntimeError: the backend
            asked for is not there.
    """
    validate.tensor("images", images, "(B, C, H, W)")
    _, channels, height, width = images.shape
    validate.positive("images' smallest side", min(channels, height, width))
    validate.tensor("weight", weight, "(D, C, P, P)")
    embed, _, patch, _ = weight.shape
    validate.beside("weight", weight, (embed, channels, patch, patch), "images", images)
    validate.positive("weight's smallest side", min(embed, patch))
    if bias is not None:
        validate.beside("bias", bias, (embed,), "images", images)
    if image_size is not None:
        height, width = validate.size("image_size", image_size)
    if height % patch or width % patch:
        name = "images" if image_size is None else "image_size"
        raise ValueError(
            f"{name}: expected a height and width that are multiples of the patch's {patch}, got {height} x {width}"
        )
    validate.beside("cls_token", cls_token, (1, 1, embed), "images", images, any_dtype=True)
    tokens = 1 + (height // patch) * (width // patch)
    validate.beside("pos_embed", pos_embed, (1, tokens, embed), "images", images, any_dtype=True)
    if needs_reference(_op, (images, weight, bias, cls_token, pos_embed, height, width), kernels):
        return patch_embed_reference(images, weight, bias, cls_token, pos_embed, image_size=(height, width))
    if not (cls_token.dtype is pos_embed.dtype is weight.dtype) and not validate.autocast(images):
        dtype = torch.promote_types(torch.promote_types(weight.dtype, cls_token.dtype), pos_embed.dtype)
        cls_token, pos_embed = cls_token.to(dtype), pos_embed.to(dtype)
    return call(_op, (images, weight, bias, cls_token, pos_embed, height, width), kernels)
