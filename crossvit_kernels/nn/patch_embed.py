"""Images to tokens: resizing, patches, the CLS token and positions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import blocks
from ..kinds import plain
from ..ops import bicubic_resize
from ..prepared import again
from ..watch import fuses
from .compositions import EMBED
from .module import KernelModule


def resized(images: Tensor, image_size: tuple[int, int], kernels: str) -> Tensor:
    """Images (B, C, H, W) at this size, bicubic; the images themselves where they have it."""
    if plain(images):
        return bicubic_resize(images, image_size, kernels=kernels)
    return interpolated(images, image_size)


def interpolated(images: Tensor, image_size: tuple[int, int]) -> Tensor:
    """`resized` without an op of this package, as TorchScript compiles it too."""
    if images.shape[2] == image_size[0] and images.shape[3] == image_size[1]:
        return images
    return F.interpolate(images, [image_size[0], image_size[1]], mode="bicubic", align_corners=False)


# In a graph that torch.fx traces it stays a call, which looks at shapes when the graph runs.
torch.fx.wrap("interpolated")


class PatchEmbed(KernelModule):
    """Patches, CLS token and positions: images (B, C, H, W), cls_token (1, 1, D), pos_embed (1, 1 + N, D) -> tokens (B,
    1 + N, D).

    Images of another size are resized (bicubic) to `image_size`, which `patch_size` must divide. `proj`, by default the
    convolution of stride `patch_size` that the op computes, may be any module (B, C, H, W) -> (B, D, H / patch_size, W
    / patch_size); parameters proj.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        *,
        proj: nn.Module | None = None,
        kernels: str = "auto",
    ) -> None:
        super().__init__(kernels=kernels)
        height, width = image_size
        if min(height, width) < patch_size or height % patch_size or width % patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size={patch_size}, got {height}×{width}")
        self.image_size = (height, width)
        self.patch_size = patch_size
        self.grid_size = (height // patch_size, width // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = proj or nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor, cls_token: Tensor, pos_embed: Tensor) -> Tensor:
        """images (B, C, H, W), cls_token (1, 1, D), pos_embed (1, 1 + N, D) -> (B, 1 + N, D)."""
        out: Tensor | None = again(self, EMBED, images, cls_token, pos_embed)
        if out is not None:
            return out
        if fuses(self, EMBED):
            place = (self, EMBED, (EMBED,))
            out = blocks.embed(images, self.proj, cls_token, pos_embed, self.image_size, self.kernels, place)
            if out is not None:
                return out
        patches = self.proj(resized(images, self.image_size, self.kernels)).flatten(2).transpose(1, 2)
        return torch.cat((cls_token.expand(patches.shape[0], -1, -1), patches), dim=1) + pos_embed
