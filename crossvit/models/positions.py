"""Position embeddings for another image size."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resample_positions(pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resamples pos_embed (1, 1 + h * w, D) of the patch grid (h, w) = `old_grid` bicubically to `new_grid`; the CLS
    slot stays as it is.

    As DeiT's fine-tuning at a higher resolution does it (`interpolate(mode="bicubic", align_corners=False)`), which the
    paper follows for 384. Computed in float32, returned in the dtype given. Raises ValueError if the shape does not fit
    `old_grid`.
    """
    height, width = old_grid
    if pos_embed.dim() != 3 or pos_embed.shape[:2] != (1, 1 + height * width):
        raise ValueError(
            f"pos_embed must be (1, {1 + height * width}, D) for a grid of {height}×{width}, "
            f"got {tuple(pos_embed.shape)}"
        )
    if old_grid == new_grid:
        return pos_embed
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    grid = patches.float().unflatten(1, old_grid).permute(0, 3, 1, 2)  # (1, D, h, w)
    grid = F.interpolate(grid, new_grid, mode="bicubic", align_corners=False)
    return torch.cat((cls, grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)), dim=1)
