"""patch_embed: an image's patches, projected, behind the CLS token, with their positions.

    images (B, C, H, W), resized bicubically to image_size where that differs
    patch  = weight (D, C, P, P) * image at stride P + bias       (H / P) x (W / P) of them, row by row
    out    = [cls_token || patch_1 ... patch_N] + pos_embed        (B, 1 + N, D)
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    return patch_embed_reference(images, weight, bias, cls_token, pos_embed, image_size=image_size)
