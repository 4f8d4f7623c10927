"""What the CLS tokens look at: the weights of their attention, and attention rollout.

With one query the keys need not be formed (the absorbed form of `crossvit_kernels.ops.cls_cross_attention`): of the
tokens x (CLS first), γ and β LayerNorm's and x̂ the tokens without them,

    q_h = W_q,h (γ∘x̂_0 + β) + b_q,h ;  u_h = γ ∘ (W_k,hᵀ q_h) / sqrt(d) ;  p_h = softmax_n(u_h · x̂_n)

which is softmax(q kᵀ / sqrt(d)): b_k and β add the same to every token's score.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossvit_kernels.nn import AttentionBlock, Block, LayerNormLinear

from ..models.cross_attention_fusion import CrossAttentionFusion
from ..models.fusion import AllAttentionFusion
from ..models.single_branch import VisionTransformer
from .parts import Grid, crossvit_of, pictures_of, plain_linear, stages_of


@dataclass(frozen=True)
class AttentionMap:
    """The weights with which the CLS token of one branch read tokens.

    kind: "self" (the last block of a branch in a stage, over the branch's own tokens), "cross" (a cross-attention, over
    the CLS and another branch's patches) or "joint" (all-attention, over all branches' tokens). weights: (B, H, T),
    float32, where a sum over T is 1. The T tokens are, for each branch in `reads`, a CLS and the branch's patches row
    by row, whose (rows, columns) are in `grids`; in a cross-attention that CLS is the asking branch's own, projected.
    layer counts the layers of a cross-attention (L in the paper), else it is 0.
    """

    kind: str
    stage: int
    branch: int
    layer: int
    reads: tuple[int, ...]
    grids: tuple[Grid, ...]
    weights: Tensor

    def pictures(self) -> list[Tensor]:
        """The weights of the patches as (B, H, rows, columns), one per branch in `reads`; with the weights of the CLS
        tokens they sum to 1.
        """
        return pictures_of(self.weights, self.grids)


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor) -> list[AttentionMap]:
    """Every attention of a CLS token in `model` for images (B, in_chans, *image_size), in the order in which they are
    computed: of a CrossViT, per stage, each branch's last block ("self"), then the fusion's ("cross" per branch and
    layer, or "joint" per branch; class-token, pairwise and no fusion have none); of a `VisionTransformer` every block.

    The model computes as it does in inference, with its kernels, and is left as it is. Raises TypeError for another
    kind of model or a block whose norm or projection was replaced, and as the model for unfit images.
    """
    if isinstance(model, VisionTransformer):
        grid = model.patch_embed.grid_size
        found, x = [], model.embed_images(images)
        for k, block in enumerate(model.blocks):
            found.append(_self_map(cast(Block, block), x, k, 0, grid))
            x = block(x)
        return found
    found = []
    tokens = crossvit_of(model).embed_images(images)
    for k, stage in enumerate(stages_of(model)):
        transformed = []
        for b, (x, blocks) in enumerate(zip(tokens, stage.blocks)):
            for block in cast(nn.Sequential, blocks):
                if block is cast(nn.Sequential, blocks)[-1]:
                    found.append(_self_map(cast(Block, block), x, k, b, stage.grids[b]))
                x = block(x)
            transformed.append(x)
        if isinstance(stage, CrossAttentionFusion):
            found += cross_maps(stage, transformed, k)
        elif isinstance(stage, AllAttentionFusion):
            found += _joint_maps(stage, transformed, k)
        tokens = stage.fuse(transformed, False)
    return found


def cls_attention(
    cls: Tensor, patches: Tensor, norm: nn.Module, q: tuple[Tensor, Tensor | None], k_weight: Tensor, num_heads: int
) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) of the CLS token's query, (B, H, 1 + N) float32, without keys.

    cls (B, D) and patches (B, N, D) as LayerNorm `norm` takes them; q: weight (D, D) and bias; k_weight (D, D).
    """
    if not isinstance(norm, nn.LayerNorm):
        raise TypeError(f"attention maps need nn.LayerNorm in front of an attention, got {type(norm).__name__}")
    x = F.layer_norm(torch.cat((cls[:, None], patches), dim=1).float(), norm.normalized_shape, eps=norm.eps)
    gamma, beta = norm.weight.float(), norm.bias.float()
    query = F.linear(gamma * x[:, 0] + beta, q[0].float(), None if q[1] is None else q[1].float())
    heads = query.unflatten(-1, (num_heads, -1))  # (B, H, d)
    u = torch.einsum("bhd,hdc->bhc", heads, k_weight.float().unflatten(0, (num_heads, -1)))
    return (u * (gamma * heads.shape[-1] ** -0.5) @ x.transpose(1, 2)).softmax(dim=-1)


def _self_map(block: AttentionBlock, x: Tensor, stage: int, branch: int, grid: Grid) -> AttentionMap:
    return AttentionMap("self", stage, branch, 0, (branch,), (grid,), _packed_cls_attention(block, x, 0))


def cross_maps(stage: CrossAttentionFusion, tokens: Sequence[Tensor], k: int) -> list[AttentionMap]:
    """The maps of stage `k`, a cross-attention, of tokens (B, 1 + N_b, D_b) behind the branches' own blocks."""
    found = []
    for b, x in enumerate(tokens):
        other = (b + 1) % len(tokens)
        patches = tokens[other][:, 1:]
        y = stage.projs[b](x[:, 0])
        for layer, block in enumerate(stage.layers(b)):
            q, key = plain_linear(block.attn.wq), plain_linear(block.attn.wk)
            weights = cls_attention(y, patches, block.norm1, (q.weight, q.bias), key.weight, block.attn.num_heads)
            found.append(AttentionMap("cross", k, b, layer, (other,), (stage.grids[other],), weights))
            if layer < len(stage.layers(b)) - 1:
                y = block(y, patches)
    return found


def _joint_maps(stage: AllAttentionFusion, tokens: Sequence[Tensor], k: int) -> list[AttentionMap]:
    y = torch.cat([cast(LayerNormLinear, f)(x) for f, x in zip(stage.projs, tokens)], dim=1)
    found, first = [], 0
    for b, x in enumerate(tokens):
        weights = _packed_cls_attention(stage.fusion, y, first)
        found.append(AttentionMap("joint", k, b, 0, tuple(range(len(tokens))), stage.grids, weights))
        first += x.shape[1]
    return found


def _packed_cls_attention(block: AttentionBlock, x: Tensor, index: int) -> Tensor:
    """(B, H, N): the attention of token `index` in a block of self-attention over x (B, N, D)."""
    qkv, width = plain_linear(block.attn.qkv), x.shape[-1]
    q = qkv.weight[:width], None if qkv.bias is None else qkv.bias[:width]
    rest = torch.cat((x[:, :index], x[:, index + 1 :]), dim=1)
    weights = cls_attention(x[:, index], rest, block.norm1, q, qkv.weight[width : 2 * width], block.attn.num_heads)
    # The token asked for stands first: back to its place.
    return torch.cat((weights[..., 1 : index + 1], weights[..., :1], weights[..., index + 1 :]), dim=-1)
