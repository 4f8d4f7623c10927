"""The paper's five ways to fuse the branches of a stage (section 3.3), each a class.

Notation: x_i are the tokens of branch i behind its own transformer blocks, CLS first; f_i and g_i project to another
branch's width and back (LayerNorm, GELU, Linear, as in the authors' code). Parameters keep timm's names: projs.{i} is
f_i, revert_projs.{i} is g_i.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crossvit_kernels.nn import AttentionBlock

from .cross_attention_fusion import CrossAttentionFusion
from .describe import linear_multiply_adds
from .stage import MultiScaleBlock, projection, resize_tokens, sum_of


class NoFusion(MultiScaleBlock):
    """No fusion: z_i = x_i. The branches meet in the mean of their logits only."""

    def fuse(self, tokens: list[Tensor], cls_only: bool) -> list[Tensor]:
        """The branches' tokens (B, 1 + N_b, D_b) -> the same fused; with `cls_only` the CLS tokens alone, (B, D_b)."""
        return [x[:, 0] for x in tokens] if cls_only else tokens

    def fusion_multiply_adds(self) -> tuple[int, int]:
        """(multiply-adds of the fusion for one image, those of them in attention)."""
        return 0, 0


class AllAttentionFusion(MultiScaleBlock):
    """All-attention (eq. 2): y = [f_1(x_1) ‖ … ‖ f_n(x_n)], o = y + MSA(LN(y)) = [o_1 ‖ … ‖ o_n], z_i = g_i(o_i).

    The tokens meet in the widest branch's width. On CrossViT-S this costs the 7.6 G of the paper's Table 6; of the
    table's parameters (27.7 M) the equation accounts for all but about 0.9 M.
    """

    def build_fusion(self, **options: Any) -> None:
        """Makes the modules of the fusion."""
        widest = max(range(len(self.dim)), key=lambda b: self.dim[b])
        width = self.dim[widest]
        self.projs = nn.ModuleList(projection(d, width, self.kernels) for d in self.dim)
        self.fusion = AttentionBlock(width, self.num_heads[widest], **options)
        self.revert_projs = nn.ModuleList(projection(width, d, self.kernels) for d in self.dim)

    def fuse(self, tokens: list[Tensor], cls_only: bool) -> list[Tensor]:
        """The branches' tokens (B, 1 + N_b, D_b) -> the same fused; with `cls_only` the CLS tokens alone, (B, D_b)."""
        y = torch.cat([f(x) for f, x in zip(self.projs, tokens)], dim=1)
        split = self.fusion(y).split([x.shape[1] for x in tokens], dim=1)
        return [g(split[b][:, 0] if cls_only else split[b]) for b, g in enumerate(self.revert_projs)]

    def fusion_multiply_adds(self) -> tuple[int, int]:
        """(multiply-adds of the fusion for one image, those of them in attention)."""
        lengths = self.lengths()
        attention = 2 * sum(lengths) ** 2 * max(self.dim)
        linears = sum(n * linear_multiply_adds(f, g) for n, f, g in zip(lengths, self.projs, self.revert_projs))
        return attention + linears + sum(lengths) * linear_multiply_adds(self.fusion), attention


class _CommonWidthFusion(MultiScaleBlock):
    """Sums over the branches, taken in the narrowest branch's width; f and g are the identity where a branch has that
    width already.
    """

    def build_fusion(self, **options: Any) -> None:
        """Makes the modules of the fusion."""
        width = min(self.dim)
        self.projs = nn.ModuleList(
            projection(d, width, self.kernels) if d != width else nn.Identity() for d in self.dim
        )
        self.revert_projs = nn.ModuleList(
            projection(width, d, self.kernels) if d != width else nn.Identity() for d in self.dim
        )

    def fuse_cls(self, cls: Sequence[Tensor], patches: Sequence[Tensor]) -> list[Tensor]:
        """The branches' CLS tokens (B, D_b), and their patches (B, N_b, D_b) -> the fused CLS tokens (B, D_b)."""
        total = sum_of([f(c) for f, c in zip(self.projs, cls)])
        return [g(total) for g in self.revert_projs]


class ClassTokenFusion(_CommonWidthFusion):
    """Class token (eq. 3): z_i = [g_i(Σ_j f_j(x_j,cls)) ‖ x_i,patch]. The CLS tokens are summed, the patches stay."""

    def fusion_multiply_adds(self) -> tuple[int, int]:
        """(multiply-adds of the fusion for one image, those of them in attention)."""
        return linear_multiply_adds(self.projs, self.revert_projs), 0


class PairwiseFusion(_CommonWidthFusion):
    """Pairwise (eq. 4): z_i = [g_i(Σ_j f_j(x_j,cls)) ‖ g_i(Σ_j f_j(x_j,patch))].

    Patches are summed by their place in the image: f_j's grid is resized (bilinear) to branch i's.
    """

    def fuse(self, tokens: list[Tensor], cls_only: bool) -> list[Tensor]:
        """The branches' tokens (B, 1 + N_b, D_b) -> the same fused; with `cls_only` the CLS tokens alone, (B, D_b)."""
        if cls_only:
            return self.fuse_cls([x[:, 0] for x in tokens], ())
        projected = [f(x) for f, x in zip(self.projs, tokens)]
        cls = sum_of([x[:, :1] for x in projected])
        fused = []
        for grid, g in zip(self.grids, self.revert_projs):
            patches = sum_of([resize_tokens(x[:, 1:], theirs, grid) for x, theirs in zip(projected, self.grids)])
            fused.append(g(torch.cat((cls, patches), dim=1)))
        return fused

    def fusion_multiply_adds(self) -> tuple[int, int]:
        """(multiply-adds of the fusion for one image, those of them in attention)."""
        lengths = self.lengths()
        return sum(n * linear_multiply_adds(f, g) for n, f, g in zip(lengths, self.projs, self.revert_projs)), 0


FUSIONS: dict[str, type[MultiScaleBlock]] = {
    "none": NoFusion,
    "all_attention": AllAttentionFusion,
    "class_token": ClassTokenFusion,
    "pairwise": PairwiseFusion,
    "cross_attention": CrossAttentionFusion,
}
"""{name: the class of the fusion scheme}, what `create_model` takes as `fusion`"""
