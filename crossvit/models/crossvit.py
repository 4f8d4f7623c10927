"""CrossViT (arXiv 2103.14899): branches of transformer blocks over patches of different sizes, fused once per stage."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossvit_kernels.nn import PatchEmbed

from .branch_images import branch_size, centre_crop
from .checks import block_weights, check_branches, check_depth, check_flags, check_sizes
from .classifier import INITIAL_DEVIATION, Classifier, drop_path_rates
from .describe import (
    Description,
    Part,
    attention_multiply_adds,
    count_parameters,
    embed_multiply_adds,
    linear_multiply_adds,
)
from .fusion import FUSIONS, MultiScaleBlock
from .intermediates import Indices, check_format, describe_features, formatted, take_indices
from .stem import conv_stem


class CrossViT(Classifier):
    """Images (B, in_chans, *image_size) -> logits (B, num_classes), the mean of the branches' logits; num_classes=0:
    features (B, Σ embed_dim).

    One entry per branch in img_scale, patch_size, embed_dim, num_heads and mlp_ratio; one row per stage in depth: the
    blocks of every branch, then the layers of the fusion (0, as in all published models, and 1 both mean one). Branch b
    attends into branch b + 1, the last into branch 0. `multi_conv`: the † stem. `crop_scale`: a smaller branch takes
    the centre of the image instead of resizing it. drop_rate is the dropout in front of the head. pos_std: the
    deviation of the initial positions, the authors' 0.02; on few images it takes them epochs to be seen beside the
    patches, and 0.5 learns much sooner. Parameters carry timm's names.

    Raises ValueError or TypeError, naming the argument, for sizes that do not fit.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 240,
        img_scale: Sequence[float] = (1.0, 224 / 240),
        patch_size: Sequence[int] = (12, 16),
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: Sequence[int] = (192, 384),
        depth: Sequence[Sequence[int]] = ((1, 4, 0), (1, 4, 0), (1, 4, 0)),
        num_heads: Sequence[int] = (6, 6),
        mlp_ratio: Sequence[float] = (4.0, 4.0),
        multi_conv: bool = False,
        crop_scale: bool = False,
        qkv_bias: bool = True,
        fusion: str = "cross_attention",
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
        whole = ("patch_size", "embed_dim", "num_heads")
        check_branches(whole=whole, patch_size=patch_size, mlp_ratio=mlp_ratio)
        branches = len(patch_size)
        mlp_ratio = mlp_ratio[:branches]  # the authors' have one more, for a layer that none of their models has
        sizes = dict(img_scale=img_scale, embed_dim=embed_dim, num_heads=num_heads, mlp_ratio=mlp_ratio)
        check_branches(branches, whole, **sizes)
        check_depth(depth, branches)
        if not isinstance(fusion, str) or fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {tuple(FUSIONS)}, got {fusion!r}")
        check_flags(multi_conv=multi_conv, crop_scale=crop_scale, qkv_bias=qkv_bias)
        self._check_sizes(img_scale, patch_size, embed_dim, mlp_ratio, depth)
        self.num_branches = branches
        self.img_scale, self.patch_size, self.embed_dim = tuple(img_scale), tuple(patch_size), tuple(embed_dim)
        self.num_heads = tuple(num_heads)
        self.num_features = self.head_hidden_size = sum(self.embed_dim)
        self.fusion = fusion
        self.crop_scale = crop_scale
        self.pos_drop_rate = pos_drop_rate

        self.patch_embed = nn.ModuleList()
        for scale, patch, dim in zip(img_scale, patch_size, self.embed_dim):
            self.patch_embed.append(
                PatchEmbed(
                    branch_size(self.image_size, scale, patch),
                    patch,
                    in_chans,
                    dim,
                    proj=conv_stem(patch, in_chans, dim) if multi_conv else None,
                    kernels=kernels,
                )
            )
        grids = [cast(PatchEmbed, embed).grid_size for embed in self.patch_embed]
        for b, (dim, (height, width)) in enumerate(zip(self.embed_dim, grids)):
            setattr(self, f"pos_embed_{b}", nn.Parameter(torch.zeros(1, 1 + height * width, dim)))
            setattr(self, f"cls_token_{b}", nn.Parameter(torch.zeros(1, 1, dim)))

        # A stage's rates: as many as its deepest branch and its fusion ask for; that fusion takes the last one.
        steps = [max(row[:-1]) + row[-1] for row in depth]
        rates = drop_path_rates(drop_path_rate, sum(steps))
        self.blocks = nn.ModuleList()
        for k, row in enumerate(depth):
            self.blocks.append(
                FUSIONS[fusion](
                    self.embed_dim,
                    grids,
                    row,
                    num_heads,
                    mlp_ratio,
                    rates[sum(steps[:k]) : sum(steps[: k + 1])],
                    qkv_bias=qkv_bias,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    kernels=kernels,
                )
            )
        reductions = [round(patch / scale) for patch, scale in zip(patch_size, img_scale)]
        self.feature_info = describe_features(self.embed_dim, reductions, len(depth))
        self.norm = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for dim in self.embed_dim)
        self.head = self.build_head()
        self.apply_init(*(getattr(self, f"{name}_{b}") for b in range(branches) for name in ("pos_embed", "cls_token")))

    def _check_sizes(
        self,
        img_scale: Sequence[float],
        patch_size: Sequence[int],
        embed_dim: Sequence[int],
        mlp_ratio: Sequence[float],
        depth: Sequence[Sequence[int]],
    ) -> None:
        """Raises ValueError for weights that do not fit into memory."""
        positions = patches = blocks = heads = 0
        for b, (scale, patch, dim, ratio) in enumerate(zip(img_scale, patch_size, embed_dim, mlp_ratio)):
            height, width = branch_size(self.image_size, scale, patch)
            positions += (height // patch) * (width // patch) * dim
            patches += self.in_chans * patch**2 * dim
            blocks += sum(row[b] for row in depth) * block_weights(dim, ratio)
            heads += dim * self.num_classes
        check_sizes(
            image_size__patch_size=positions,
            in_chans__patch_size=patches,
            embed_dim__mlp_ratio=blocks,
            num_classes=heads,
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the blocks' activations are computed again in the backward instead of kept."""
        super().set_grad_checkpointing(enable)
        for stage in self.blocks:
            cast(MultiScaleBlock, stage).grad_checkpointing = enable

    def build_head(self) -> nn.ModuleList:
        """A new head: a Linear from each branch's width to the classes."""
        return nn.ModuleList(self.new_linear(dim) for dim in self.embed_dim)

    def position_grids(self, image_size: tuple[int, int] | None = None) -> dict[str, tuple[int, int]]:
        """{name of the positions: the rows and columns of their grid}, for images of this size or the model's own."""
        grids = {}
        for b, (scale, patch) in enumerate(zip(self.img_scale, self.patch_size)):
            height, width = branch_size(image_size or self.image_size, scale, patch)
            grids[f"pos_embed_{b}"] = (height // patch, width // patch)
        return grids

    def embed_images(self, images: Tensor) -> list[Tensor]:
        """Images (B, in_chans, *image_size) -> the tokens of every branch, (B, 1 + N_b, D_b), CLS first."""
        self.check_images(images)
        tokens = []
        for b, embed in enumerate(self.patch_embed):
            x = centre_crop(images, self.image_size, cast(PatchEmbed, embed).image_size) if self.crop_scale else images
            # By keyword: torch's module tracker, which the FLOP counter uses, hooks the gradient of positional ones.
            x = embed(x, cls_token=getattr(self, f"cls_token_{b}"), pos_embed=getattr(self, f"pos_embed_{b}"))
            tokens.append(F.dropout(x, self.pos_drop_rate, self.training))
        return tokens

    def _stages(self, images: Tensor, cls_only: bool = False) -> list[Tensor]:
        tokens = self.embed_images(images)
        last = len(self.blocks) - 1
        for k, stage in enumerate(self.blocks):
            tokens = stage(tokens, cls_only and k == last)
        return tokens

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """The normalised tokens of every branch, (B, 1 + N_b, D_b), CLS first."""
        return [norm(x) for norm, x in zip(self.norm, self._stages(images))]

    def forward_head(self, features: list[Tensor], pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) of what `forward_features` returned; `pre_logits` or no head: the pooled features (B,
        Σ embed_dim).
        """
        pooled = [x[:, 1:].mean(dim=1) if self.global_pool == "avg" else x[:, 0] for x in features]
        return self._head(pooled, pre_logits)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, in_chans, *image_size); without a head the pooled features (B, Σ
        embed_dim).
        """
        return self._head(self._pooled(images))

    def forward_branches(self, images: Tensor) -> list[Tensor]:
        """Every branch's own logits, (B, num_classes) each, as the paper's Table 6 rates them; their mean is what
        `forward` returns.
        """
        if self.num_classes == 0:
            raise ValueError("forward_branches needs a head: this model has num_classes=0")
        return self._branch_logits(self._pooled(images))

    def _pooled(self, images: Tensor) -> list[Tensor]:
        if self.global_pool == "avg":
            return [norm(x[:, 1:]).mean(dim=1) for norm, x in zip(self.norm, self._stages(images))]
        return [norm(cls) for norm, cls in zip(self.norm, self._stages(images, cls_only=True))]

    def _branch_logits(self, pooled: list[Tensor]) -> list[Tensor]:
        dropped = [F.dropout(x, self.drop_rate, self.training) for x in pooled]
        return [head(x) for head, x in zip(cast(nn.ModuleList, self.head), dropped)]

    def _head(self, pooled: list[Tensor], pre_logits: bool = False) -> Tensor:
        if pre_logits or self.num_classes == 0:
            return torch.cat([F.dropout(x, self.drop_rate, self.training) for x in pooled], dim=1)
        return torch.stack(self._branch_logits(pooled)).mean(dim=0)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[list[Tensor], list[Tensor]]:
        """What `forward_features` returns, and the patch tokens of every branch behind every stage; timm's arguments
        and order.

        With K stages, feature b * K + k is branch b behind stage k: (B, D_b, rows, columns), or (B, N_b, D_b) with
        output_fmt="NLC". indices: None all, an int the last so many, a sequence those. norm: normalised as that
        branch's last tokens are. stop_early: later stages are not run (the first list then holds the tokens of the last
        one that was). Raises ValueError for indices out of range.
        """
        check_format(output_fmt)
        stages = len(self.blocks)
        taken = set(take_indices(indices, self.num_branches * stages))
        run = 1 + max(i % stages for i in taken) if stop_early else stages
        found: dict[int, Tensor] = {}
        tokens = self.embed_images(images)
        for k in range(run):
            tokens = self.blocks[k](tokens)
            for b, (embed, branch_norm, x) in enumerate(zip(self.patch_embed, self.norm, tokens)):
                if b * stages + k in taken:
                    patches = (branch_norm(x) if norm else x)[:, 1:]
                    found[b * stages + k] = formatted(patches, cast(PatchEmbed, embed).grid_size, output_fmt)
        intermediates = [found[i] for i in sorted(found)]
        if intermediates_only:
            return intermediates
        return [branch_norm(x) for branch_norm, x in zip(self.norm, tokens)], intermediates

    def describe(self) -> Description:
        """Parameters and multiply-adds of every branch's parts, the fusion and the head; `print` it for a table."""
        embeds = [cast(PatchEmbed, embed) for embed in self.patch_embed]
        stages = [cast(MultiScaleBlock, stage) for stage in self.blocks]
        parts = []
        for b, embed in enumerate(embeds):
            height, width = embed.image_size
            name = f"branch {b}: patches {embed.patch_size}×{embed.patch_size} of {height}×{width}"
            parts.append(Part(name, count_parameters(embed), embed_multiply_adds(embed)))
        for b, embed in enumerate(embeds):
            blocks = [block for stage in stages for block in cast(Any, stage.blocks[b])]
            tokens = 1 + embed.num_patches
            attention = attention_multiply_adds(blocks, tokens)
            work = tokens * linear_multiply_adds(*blocks) + attention
            parts.append(Part(f"branch {b}: {len(blocks)} blocks", count_parameters(*blocks), work, attention))
        fusion = [stage.fusion_multiply_adds() for stage in stages]
        in_stages = count_parameters(self.blocks) - sum(count_parameters(*stage.blocks) for stage in stages)
        parts.append(Part(f"fusion: {self.fusion}", in_stages, sum(f[0] for f in fusion), sum(f[1] for f in fusion)))
        positions = sum(p.numel() for name, p in self.named_parameters() if name.startswith(("pos_embed", "cls_token")))
        parts.append(Part("positions and CLS tokens", positions))
        head = linear_multiply_adds(self.head)
        parts.append(Part("norms and heads", count_parameters(self.norm, self.head), head))
        size = "×".join(map(str, self.image_size))
        return Description(f"{self.variant or 'CrossViT'}, image {size}, {self.num_classes} classes", tuple(parts))
