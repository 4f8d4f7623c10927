"""The single-branch transformer that the paper compares with: DeiT (arXiv 2012.12877), of the same blocks, without
distillation.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crossvit_kernels.nn import Block, PatchEmbed

from .branch_images import branch_size
from .checks import block_weights, check_blocks, check_flags, check_integer, check_number, check_sizes, shown
from .classifier import INITIAL_DEVIATION, Classifier, drop_path_rates
from .describe import (
    Description,
    Part,
    attention_multiply_adds,
    count_parameters,
    embed_multiply_adds,
    linear_multiply_adds,
)
from .intermediates import Indices, check_format, describe_features, formatted, take_indices
from .stem import conv_stem


class VisionTransformer(Classifier):
    """Images (B, in_chans, *image_size) -> logits (B, num_classes); num_classes=0: features (B, embed_dim). Parameters
    carry timm's names.

    The image is resized to the nearest multiple of `patch_size` where that does not divide it. `multi_conv`: the †
    models' stem. pos_std: as in `CrossViT`.

    Raises ValueError or TypeError, naming the argument, for sizes that do not fit.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        multi_conv: bool = False,
        qkv_bias: bool = True,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        pos_std: float = INITIAL_DEVIATION,
        kernels: str = "auto",
    ) -> None:
        super().__init__(
            image_size,
            in_chans,
            num_classes,
            global_pool,
            kernels=kernels,
            pos_std=pos_std,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
        )
        sizes = dict(patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool):  # two branches have a tuple of each
                raise TypeError(f"{name} must be an int for a model of one branch, got {shown(value)}")
            check_integer(name, value, 1)
        check_number("mlp_ratio", mlp_ratio)
        check_flags(multi_conv=multi_conv, qkv_bias=qkv_bias)
        check_blocks(depth)
        height, width = branch_size(self.image_size, 1.0, patch_size)
        check_sizes(
            image_size__patch_size=(height // patch_size) * (width // patch_size) * embed_dim,
            in_chans__patch_size=in_chans * patch_size**2 * embed_dim,
            embed_dim__mlp_ratio=depth * block_weights(embed_dim, mlp_ratio),
            num_classes=embed_dim * num_classes,
        )
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.patch_size, self.num_heads = patch_size, num_heads
        self.pos_drop_rate = pos_drop_rate
        self.patch_embed = PatchEmbed(
            branch_size(self.image_size, 1.0, patch_size),
            patch_size,
            in_chans,
            embed_dim,
            proj=conv_stem(patch_size, in_chans, embed_dim) if multi_conv else None,
            kernels=kernels,
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=rate,
                    kernels=kernels,
                )
                for rate in drop_path_rates(drop_path_rate, depth)
            )
        )
        self.feature_info = describe_features([embed_dim], [patch_size], depth)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = self.build_head()
        self.apply_init(self.pos_embed, self.cls_token)

    def build_head(self) -> nn.Module:
        """A new head: a Linear from the width to the classes."""
        return self.new_linear(self.embed_dim)

    def position_grids(self, image_size: tuple[int, int] | None = None) -> dict[str, tuple[int, int]]:
        """{name of the positions: the rows and columns of their grid}, for images of this size or the model's own."""
        patch = self.patch_embed.patch_size
        height, width = branch_size(image_size or self.image_size, 1.0, patch)
        return {"pos_embed": (height // patch, width // patch)}

    def embed_images(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, *image_size) -> tokens (B, 1 + N, D), CLS first."""
        self.check_images(images)
        # By keyword: torch's module tracker, which the FLOP counter uses, hooks the gradient of positional ones.
        tokens = self.patch_embed(images, cls_token=self.cls_token, pos_embed=self.pos_embed)
        return F.dropout(tokens, self.pos_drop_rate, self.training)

    def _block(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(block, x, use_reentrant=False))
        return cast(Tensor, block(x))

    def _tokens(self, images: Tensor) -> Tensor:
        x = self.embed_images(images)
        for block in self.blocks:
            x = self._block(block, x)
        return x

    def forward_features(self, images: Tensor) -> Tensor:
        """The normalised tokens (B, 1 + N, D), CLS first."""
        return cast(Tensor, self.norm(self._tokens(images)))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) of what `forward_features` returned; `pre_logits` or no head: the pooled features (B,
        D).
        """
        return self._head(features[:, 1:].mean(dim=1) if self.global_pool == "avg" else features[:, 0], pre_logits)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, in_chans, *image_size); without a head the pooled features (B, D)."""
        x = self._tokens(images)
        return self._head(self.norm(x[:, 1:]).mean(dim=1) if self.global_pool == "avg" else self.norm(x[:, 0]))

    def _head(self, pooled: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = F.dropout(pooled, self.drop_rate, self.training)
        return pooled if pre_logits else cast(Tensor, self.head(pooled))

    def forward_intermediates(
        self,
        images: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """What `forward_features` returns, and the patch tokens behind every block; timm's arguments, as in
        `CrossViT.forward_intermediates`.
        """
        check_format(output_fmt)
        taken = set(take_indices(indices, len(self.blocks)))
        intermediates = []
        x = self.embed_images(images)
        for k in range(1 + max(taken) if stop_early else len(self.blocks)):
            x = self._block(self.blocks[k], x)
            if k in taken:
                patches = (self.norm(x) if norm else x)[:, 1:]
                intermediates.append(formatted(patches, self.patch_embed.grid_size, output_fmt))
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def describe(self) -> Description:
        """Parameters and multiply-adds of the embedding, the blocks and the head; `print` it for a table."""
        embed, tokens = self.patch_embed, 1 + self.patch_embed.num_patches
        blocks = [cast(Block, block) for block in self.blocks]
        attention = attention_multiply_adds(blocks, tokens)
        work = tokens * linear_multiply_adds(self.blocks) + attention
        height, width = embed.image_size
        parts = (
            Part(
                f"patches {embed.patch_size}×{embed.patch_size} of {height}×{width}",
                count_parameters(embed),
                embed_multiply_adds(embed),
            ),
            Part(f"{len(blocks)} blocks", count_parameters(self.blocks), work, attention),
            Part("positions and CLS token", self.pos_embed.numel() + self.cls_token.numel()),
            Part("norm and head", count_parameters(self.norm, self.head), linear_multiply_adds(self.head)),
        )
        size = "×".join(map(str, self.image_size))
        return Description(f"{self.variant or 'VisionTransformer'}, image {size}, {self.num_classes} classes", parts)
