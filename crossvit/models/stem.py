"""The stem of the † models: three convolutions instead of one of stride `patch_size` (section 4.1 of the paper,
`multi_conv` in the code).
"""

import torch
from torch import Tensor, nn

# (kernel, stride, padding) of the three convolutions, by the patch size they replace
CONVOLUTIONS = {12: ((7, 4, 3), (3, 3, 0), (3, 1, 1)), 16: ((7, 4, 3), (3, 2, 1), (3, 2, 1))}


class ConvStem(nn.Sequential):
    """Convolutions and ReLUs in a row. On a GPU in channels-last memory: cuDNN's matrix kernels read nothing else, and
    the tokens (B, N, D) are then a view of the result. In training on a CPU too: their gradients come in that order."""

    def forward(self, images: Tensor) -> Tensor:
        """images (B, in_chans, H, W) -> (B, embed_dim, H / patch_size, W / patch_size)."""
        if isinstance(images, Tensor) and (images.is_cuda or self.training):  # torch.fx traces with something else
            images = images.contiguous(memory_format=torch.channels_last)
        return super().forward(images)


def conv_stem(patch_size: int, in_chans: int, embed_dim: int) -> ConvStem:
    """(B, in_chans, H, W) -> (B, embed_dim, H / patch_size, W / patch_size), a ReLU between convolutions; weights under
    0, 2 and 4.

    Raises ValueError for a patch size that the authors give no convolutions for (12 and 16 they do).
    """
    if patch_size not in CONVOLUTIONS:
        raise ValueError(f"patch_size with multi_conv=True must be one of {tuple(CONVOLUTIONS)}, got {patch_size}")
    widths = (in_chans, embed_dim // 4, embed_dim // 2, embed_dim)
    layers: list[nn.Module] = []
    for i, (kernel, stride, padding) in enumerate(CONVOLUTIONS[patch_size]):
        layers += [nn.Conv2d(widths[i], widths[i + 1], kernel, stride, padding), nn.ReLU(inplace=True)]
    return ConvStem(*layers[:-1])
