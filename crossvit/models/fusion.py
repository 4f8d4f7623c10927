"""A stage of CrossViT, `MultiScaleBlock`, and the paper's five ways to fuse its branches (section 3.3), each a class.

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

from crossvit_kernels import blocks as compositions
from crossvit_kernels.composition import Composition, fuses, unseen
from crossvit_kernels.kinds import GELU, LAYER_NORM, LINEAR, Kind, kind
from crossvit_kernels.nn import (
    CLASS_ATTENTION,
    AttentionBlock,
    Block,
    CrossAttentionBlock,
    KernelModule,
    LayerNormLinear,
)

from .describe import linear_multiply_adds


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
        split = [x.split((1, x.shape[1] - 1), dim=1) for x in tokens]
        patches = [parts[1] for parts in split]  # by index: what torch.fx traces with cannot be iterated
        fused = self.fuse_cls([parts[0].squeeze(1) for parts in split], patches)
        if cls_only:
            return fused
        for b, (c, own) in enumerate(zip(fused, patches)):
            # Only what this stage's blocks have just made may be overwritten, and nothing that autograd may have saved.
            if torch.is_grad_enabled() or not (isinstance(tokens[b], Tensor) and _makes_new_tokens(self.blocks[b])):
                tokens[b] = torch.cat((c[:, None], own), dim=1)
            else:
                tokens[b][:, 0] = c
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
    if type(branch) is not nn.Sequential or not len(branch) or type(branch[-1]) is not Block:
        return False
    return unseen(branch) and unseen(branch[-1])


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


def _resize(patches: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """(B, h * w, D) of the grid (h, w) = `old_grid` to `new_grid`, bilinear."""
    if old_grid == new_grid:
        return patches
    maps = patches.transpose(1, 2).unflatten(2, old_grid)
    return F.interpolate(maps, new_grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


def _projection(in_features: int, out_features: int, kernels: str) -> LayerNormLinear:
    return LayerNormLinear(in_features, out_features, pre_activation="gelu", kernels=kernels)


class NoFusion(MultiScaleBlock):
    """No fusion: z_i = x_i. The branches meet in the mean of their logits only."""

    def fuse(self, tokens: list[Tensor], cls_only: bool) -> list[Tensor]:
        return [x[:, 0] for x in tokens] if cls_only else tokens

    def fusion_multiply_adds(self) -> tuple[int, int]:
        return 0, 0


class AllAttentionFusion(MultiScaleBlock):
    """All-attention (eq. 2): y = [f_1(x_1) ‖ … ‖ f_n(x_n)], o = y + MSA(LN(y)) = [o_1 ‖ … ‖ o_n], z_i = g_i(o_i).

    The tokens meet in the widest branch's width. On CrossViT-S this costs the 7.6 G of the paper's Table 6; of the
    table's parameters (27.7 M) the equation accounts for all but about 0.9 M.
    """

    def build_fusion(self, **options: Any) -> None:
        widest = max(range(len(self.dim)), key=lambda b: self.dim[b])
        width = self.dim[widest]
        self.projs = nn.ModuleList(_projection(d, width, self.kernels) for d in self.dim)
        self.fusion = AttentionBlock(width, self.num_heads[widest], **options)
        self.revert_projs = nn.ModuleList(_projection(width, d, self.kernels) for d in self.dim)

    def fuse(self, tokens: list[Tensor], cls_only: bool) -> list[Tensor]:
        y = torch.cat([f(x) for f, x in zip(self.projs, tokens)], dim=1)
        split = self.fusion(y).split([x.shape[1] for x in tokens], dim=1)
        return [g(split[b][:, 0] if cls_only else split[b]) for b, g in enumerate(self.revert_projs)]

    def fusion_multiply_adds(self) -> tuple[int, int]:
        lengths = self.lengths()
        attention = 2 * sum(lengths) ** 2 * max(self.dim)
        linears = sum(n * linear_multiply_adds(f, g) for n, f, g in zip(lengths, self.projs, self.revert_projs))
        return attention + linears + sum(lengths) * linear_multiply_adds(self.fusion), attention


class _CommonWidthFusion(MultiScaleBlock):
    """Sums over the branches, taken in the narrowest branch's width; f and g are the identity where a branch has that
    width already.
    """

    def build_fusion(self, **options: Any) -> None:
        width = min(self.dim)
        self.projs = nn.ModuleList(
            _projection(d, width, self.kernels) if d != width else nn.Identity() for d in self.dim
        )
        self.revert_projs = nn.ModuleList(
            _projection(width, d, self.kernels) if d != width else nn.Identity() for d in self.dim
        )

    def fuse_cls(self, cls: Sequence[Tensor], patches: Sequence[Tensor]) -> list[Tensor]:
        total = _sum([f(c) for f, c in zip(self.projs, cls)])
        return [g(total) for g in self.revert_projs]


class ClassTokenFusion(_CommonWidthFusion):
    """Class token (eq. 3): z_i = [g_i(Σ_j f_j(x_j,cls)) ‖ x_i,patch]. The CLS tokens are summed, the patches stay."""

    def fusion_multiply_adds(self) -> tuple[int, int]:
        return linear_multiply_adds(self.projs, self.revert_projs), 0


class PairwiseFusion(_CommonWidthFusion):
    """Pairwise (eq. 4): z_i = [g_i(Σ_j f_j(x_j,cls)) ‖ g_i(Σ_j f_j(x_j,patch))].

    Patches are summed by their place in the image: f_j's grid is resized (bilinear) to branch i's.
    """

    def fuse(self, tokens: list[Tensor], cls_only: bool) -> list[Tensor]:
        if cls_only:
            return self.fuse_cls([x[:, 0] for x in tokens], ())
        projected = [f(x) for f, x in zip(self.projs, tokens)]
        cls = _sum([x[:, :1] for x in projected])
        fused = []
        for grid, g in zip(self.grids, self.revert_projs):
            patches = _sum([_resize(x[:, 1:], theirs, grid) for x, theirs in zip(projected, self.grids)])
            fused.append(g(torch.cat((cls, patches), dim=1)))
        return fused

    def fusion_multiply_adds(self) -> tuple[int, int]:
        lengths = self.lengths()
        return sum(n * linear_multiply_adds(f, g) for n, f, g in zip(lengths, self.projs, self.revert_projs)), 0


class CrossAttentionFusion(MultiScaleBlock):
    """Cross-attention (eq. 5 to 7): the CLS of branch i queries the patches of branch i' = i + 1 (the last one's: of
    branch 0), and goes back.

        x'_i = [f_i(x_i,cls) ‖ x_i',patch]
        y_i  = f_i(x_i,cls) + MCA(LN(x'_i)),  MCA(x) = softmax(q kᵀ / sqrt(d)) v,  q = x_cls W_q, k = x W_k, v = x W_v
        z_i  = [g_i(y_i) ‖ x_i,patch]

    All branches read the tokens as they were before the fusion. With depth[-1] = L > 1 the attention is applied L
    times, each time over all patches of branch i' and the CLS that the layer before returned (the authors' code gave
    layers 2 … L that one token alone).
    """

    def build_fusion(self, **options: Any) -> None:
        self.projs, self.fusion, self.revert_projs = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for b, width in enumerate(self.dim):
            other = (b + 1) % len(self.dim)
            self.projs.append(_projection(width, self.dim[other], self.kernels))
            layers = [
                CrossAttentionBlock(self.dim[other], self.num_heads[other], **options)
                for _ in range(max(1, self.fusion_depth))
            ]
            self.fusion.append(nn.Sequential(*layers) if self.fusion_depth else layers[0])
            self.revert_projs.append(_projection(self.dim[other], width, self.kernels))

    def layers(self, branch: int) -> list[CrossAttentionBlock]:
        """The cross-attention layers that the CLS of `branch` goes through."""
        fusion: Any = self.fusion[branch]
        return list(fusion) if self.fusion_depth else [fusion]

    def fuse_cls(self, cls: Sequence[Tensor], patches: Sequence[Tensor]) -> list[Tensor]:
        return [self._direction(b, c, patches[(b + 1) % len(cls)]) for b, c in enumerate(cls)]

    def _direction(self, branch: int, cls: Tensor, patches: Tensor) -> Tensor:
        project, revert = cast(Any, self.projs[branch]), cast(Any, self.revert_projs[branch])
        layers = self.layers(branch)
        if len(layers) == 1 and not torch.is_grad_enabled() and self._is_one_op(branch, layers[0]):
            layer, to, back = layers[0], (project.norm, project.linear), (revert.norm, revert.linear)
            attention = (layer.norm1, layer.linears(), layer.attn.num_heads)
            out = compositions.fusion_direction(cls, patches, to, *attention, back, self.kernels)
            if out is not None:
                return out
        y = project(cls)
        for layer in layers:
            y = layer(y, patches)
        return revert(y)

    def _is_one_op(self, branch: int, layer: CrossAttentionBlock) -> bool:
        if not fuses(self, fusion_composition(branch, self.fusion_depth > 0)):
            return False
        return not layer.attn.drops() and not (layer.training and layer.drop_path > 0)

    def fusion_multiply_adds(self) -> tuple[int, int]:
        linears = attention = 0
        for b in range(len(self.dim)):
            other = (b + 1) % len(self.dim)
            tokens = self.lengths()[other]
            linears += linear_multiply_adds(self.projs[b], self.revert_projs[b])
            for layer in self.layers(b):
                linears += linear_multiply_adds(layer.attn.wq, layer.attn.proj)
                linears += tokens * linear_multiply_adds(layer.attn.wk, layer.attn.wv)
                attention += 2 * tokens * self.dim[other]
        return linears + attention, attention


_PROJECTION: dict[str, Kind] = {
    "": kind("crossvit_kernels.nn:LayerNormLinear", wrong=lambda m: None if len(m) == 3 else f"has {len(m)} steps"),
    ".0": LAYER_NORM,
    ".1": GELU,
    ".2": LINEAR,
}


@functools.cache
def fusion_composition(branch: int, nested: bool) -> Composition:
    """What `cls_fusion` stands for in a `CrossAttentionFusion`: the direction from `branch`, with a single layer;
    `nested`: which is inside a Sequential."""
    layer = f"fusion.{branch}.0" if nested else f"fusion.{branch}"
    parts = {f"projs.{branch}{name}": expected for name, expected in _PROJECTION.items()}
    if nested:
        parts[f"fusion.{branch}"] = kind("torch.nn.modules.container:Sequential")
    parts[layer] = kind("crossvit_kernels.nn:CrossAttentionBlock")
    parts |= {f"{layer}.{name}": expected for name, expected in CLASS_ATTENTION.parts.items()}
    parts |= {f"revert_projs.{branch}{name}": expected for name, expected in _PROJECTION.items()}
    return Composition(f"fusion of branch {branch}", parts)


FUSIONS: dict[str, type[MultiScaleBlock]] = {
    "none": NoFusion,
    "all_attention": AllAttentionFusion,
    "class_token": ClassTokenFusion,
    "pairwise": PairwiseFusion,
    "cross_attention": CrossAttentionFusion,
}
