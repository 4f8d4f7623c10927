"""The fusion that CrossViT is named after: the CLS token of one branch queries the patches of another."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from crossvit_kernels import blocks as compositions
from crossvit_kernels.composition import Composition, Family
from crossvit_kernels.kinds import GELU, LAYER_NORM, LINEAR, Kind, kind
from crossvit_kernels.nn import CLASS_ATTENTION, CrossAttentionBlock
from crossvit_kernels.prepared import again
from crossvit_kernels.watch import fuses

from .describe import linear_multiply_adds
from .stage import MultiScaleBlock, projection


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
        """Makes the modules of the fusion."""
        self.projs, self.fusion, self.revert_projs = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for b, width in enumerate(self.dim):
            other = (b + 1) % len(self.dim)
            self.projs.append(projection(width, self.dim[other], self.kernels))
            layers = [
                CrossAttentionBlock(self.dim[other], self.num_heads[other], **options)
                for _ in range(max(1, self.fusion_depth))
            ]
            self.fusion.append(nn.Sequential(*layers) if self.fusion_depth else layers[0])
            self.revert_projs.append(projection(self.dim[other], width, self.kernels))

    def layers(self, branch: int) -> list[CrossAttentionBlock]:
        """The cross-attention layers that the CLS of `branch` goes through."""
        fusion: Any = self.fusion[branch]
        return list(fusion) if self.fusion_depth else [fusion]

    def fuse_cls(self, cls: Sequence[Tensor], patches: Sequence[Tensor]) -> list[Tensor]:
        """The branches' CLS tokens (B, D_b), and their patches (B, N_b, D_b) -> the fused CLS tokens (B, D_b)."""
        return [self._direction(b, c, patches[(b + 1) % len(cls)]) for b, c in enumerate(cls)]

    def _direction(self, branch: int, cls: Tensor, patches: Tensor) -> Tensor:
        out: Tensor | None = again(self, branch, cls, patches)
        if out is not None:
            return out
        project, revert = cast(Any, self.projs[branch]), cast(Any, self.revert_projs[branch])
        layers = self.layers(branch)
        if len(layers) == 1 and not torch.is_grad_enabled() and self._is_one_op(branch, layers[0]):
            layer, to, back = layers[0], (project.norm, project.linear), (revert.norm, revert.linear)
            attention = (layer.norm1, layer.linears(), layer.attn)
            place = (self, branch, (fusion_composition(branch, self.fusion_depth > 0),))
            out = compositions.fusion_direction(cls, patches, to, *attention, back, self.kernels, place)
            if out is not None:
                return out
        y = project(cls)
        for layer in layers:
            y = layer(y, patches)
        return revert(y)

    def _is_one_op(self, branch: int, layer: CrossAttentionBlock) -> bool:
        if not fuses(self, fusion_composition, branch, self.fusion_depth > 0):
            return False
        return not layer.attn.drops() and not (layer.training and layer.drop_path > 0)

    def fusion_multiply_adds(self) -> tuple[int, int]:
        """(multiply-adds of the fusion for one image, those of them in attention)."""
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
    "": kind(
        "crossvit_kernels.nn.layers:LayerNormLinear",
        wrong=lambda m: None if len(m) == 3 else f"has {len(m)} steps",
        settings=("pre_activation", "activation"),
    ),
    ".0": LAYER_NORM,
    ".1": GELU,
    ".2": LINEAR,
}


@Family
def fusion_composition(branch: int, nested: bool) -> Composition:
    """What `cls_fusion` stands for in a `CrossAttentionFusion`: the direction from `branch`, with a single layer;
    `nested`: which is inside a Sequential."""
    layer = f"fusion.{branch}.0" if nested else f"fusion.{branch}"
    parts = {f"projs.{branch}{name}": expected for name, expected in _PROJECTION.items()}
    if nested:
        parts[f"fusion.{branch}"] = kind("torch.nn.modules.container:Sequential")
    parts[layer] = kind("crossvit_kernels.nn.cross_attention:CrossAttentionBlock")
    parts |= {f"{layer}.{name}": expected for name, expected in CLASS_ATTENTION.parts.items()}
    parts |= {f"revert_projs.{branch}{name}": expected for name, expected in _PROJECTION.items()}
    return Composition(f"fusion of branch {branch}", parts, settings=("fusion_depth",))
