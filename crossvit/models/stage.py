"""A stage of CrossViT, `MultiScaleBlock`: the branches' own blocks, then a fusion, which its subclasses are.

Notation: x_i are the tokens of branch i behind its own transformer blocks, CLS first; f_i and g_i project to another
branch's width and back (LayerNorm, GELU, Linear, as in the authors' code). Parameters keep timm's names: projs.{i} is
f_i, revert_projs.{i} is g_i.
"""

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crossvit_kernels.composition import unseen
from crossvit_kernels.nn import (
    Block,
    KernelModule,
    LayerNormLinear,
)


class MultiScaleBlock(KernelModule):
    """One stage: every branch's own transformer blocks, then a fusion of the branches. Tokens: a list of (B, 1 + N_i,
    D_i), one per branch.

    dim, grids, num_heads, mlp_ratio: one entry per branch (`grids`: its patches' rows and columns); depth: the blocks
    of every branch and, last, the fusion's layers; drop_path: the rates of the blocks in turn, the last one also the
    fusion's.
    """

    def __init__(
        self,
        dim: Sequence[int],
        grids: Sequence[tuple[int, int]],
        depth: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: Sequence[float],
        drop_path: Sequence[float],
        *,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        kernels: str = "auto",
    ) -> None:
        super().__init__(kernels=kernels)
        self.dim, self.grids, self.num_heads = tuple(dim), tuple(grids), tuple(num_heads)
        self.fusion_depth = depth[-1]
        self.grad_checkpointing = False
        options: dict[str, Any] = dict(qkv_bias=qkv_bias, proj_drop=proj_drop, attn_drop=attn_drop, kernels=kernels)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(Block(d, h, r, drop_path=rate, **options) for rate in drop_path[:blocks]))
            for d, h, r, blocks in zip(dim, num_heads, mlp_ratio, depth)
        )
        self.build_fusion(drop_path=drop_path[-1] if drop_path else 0.0, **options)

    def build_fusion(self, **options: Any) -> None:
        """Adds the scheme's own modules; `options` are those of its attention block."""

    def fuse(self, tokens: list[Tensor], cls_only: bool) -> list[Tensor]:
        """The fused tokens (B, 1 + N_i, D_i) of every branch, or with `cls_only` their CLS (B, D_i)."""
        if torch.is_grad_enabled():  # the gradient of a split is one concatenation
            split = [x.split((1, x.shape[1] - 1), dim=1) for x in tokens]
            patches = [parts[1] for parts in split]  # by index: what torch.fx traces with cannot be iterated
            cls = [parts[0].squeeze(1) for parts in split]
        else:
            cls, patches = [x.select(1, 0) for x in tokens], [x.narrow(1, 1, x.shape[1] - 1) for x in tokens]
        fused = self.fuse_cls(cls, patches)
        if cls_only:
            return fused
        for b, (c, own) in enumerate(zip(fused, patches)):
            # Only what this stage's blocks have just made may be overwritten, and nothing that autograd may have saved.
            if torch.is_grad_enabled() or not (isinstance(tokens[b], Tensor) and _makes_new_tokens(self.blocks[b])):
                tokens[b] = torch.cat((c[:, None], own), dim=1)
            else:
                cls[b].copy_(c)
        return tokens

    def fuse_cls(self, cls: Sequence[Tensor], patches: Sequence[Tensor]) -> list[Tensor]:
        """For schemes that leave the patches as they are: the fused CLS (B, D_i) of the CLS (B, D_i) and the patches
        (B, N_i, D_i).
        """
        raise NotImplementedError

    def fusion_multiply_adds(self) -> tuple[int, int]:
        """The fusion's multiply-adds for one image, and how many of them are softmax(q kᵀ) v."""
        raise NotImplementedError

    def forward(self, tokens: list[Tensor], cls_only: bool = False) -> list[Tensor]:
        """One stage; `cls_only` returns the branches' CLS tokens alone, (B, D_i), which is all that a token-pooled head
        reads.
        """
        transformed = []
        for x, branch in zip(tokens, self.blocks):
            if self.grad_checkpointing and torch.is_grad_enabled():
                for block in cast(nn.Sequential, branch):
                    x = cast(Tensor, checkpoint(block, x, use_reentrant=False))
            else:
                x = branch(x)
            transformed.append(x)
        return self.fuse(transformed, cls_only)

    def lengths(self) -> list[int]:
        """The tokens of every branch, CLS included."""
        return [1 + height * width for height, width in self.grids]


def _makes_new_tokens(branch: nn.Module) -> bool:
    """Whether what a branch's blocks return is theirs alone: the last is a `Block`, and nothing has seen its result."""
    if type(branch) is not nn.Sequential or not branch._modules:
        return False
    last = next(reversed(branch._modules.values()))
    return type(last) is Block and unseen(branch) and unseen(last)


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    return functools.reduce(torch.add, tensors)


def resize_tokens(patches: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """(B, h * w, D) of the grid (h, w) = `old_grid` to `new_grid`, bilinear."""
    if old_grid == new_grid:
        return patches
    maps = patches.transpose(1, 2).unflatten(2, old_grid)
    return F.interpolate(maps, new_grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


def projection(in_features: int, out_features: int, kernels: str) -> LayerNormLinear:
    """LayerNorm, GELU and Linear from one width to another, (..., in_features) -> (..., out_features)."""
    return LayerNormLinear(in_features, out_features, pre_activation="gelu", kernels=kernels)
