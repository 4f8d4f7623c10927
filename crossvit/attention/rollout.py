"""Attention rollout (Abnar and Zuidema, arXiv 2005.00928) through branches and their fusion.

Every token keeps a distribution over the tokens of the input, of all branches; at first each is itself. An attention
with weights A (mean of its heads) makes it half itself, for the residual, and half what it read: R <- (R + A R) / 2.
Fusions do to the distributions what they do to the tokens:

    cross-attention     R_i,cls <- (R_i,cls + p_0 R_i,cls + Σ_n p_n R_i',n) / 2, once per layer
    all-attention       R <- (R + A R) / 2 over the tokens of all branches
    class token         R_i,cls <- the mean of all branches' CLS
    pairwise            that, and patches the mean of all branches', resized to branch i's grid
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossvit_kernels.nn import AttentionBlock

from ..models.cross_attention_fusion import CrossAttentionFusion
from ..models.fusion import AllAttentionFusion, ClassTokenFusion, PairwiseFusion
from ..models.single_branch import VisionTransformer
from ..models.stage import MultiScaleBlock, resize_tokens
from .maps import cross_maps
from .parts import Grid, crossvit_of, pictures_of, plain_linear, stages_of


@torch.no_grad()
def attention_rollout(model: nn.Module, images: Tensor) -> list[list[Tensor]]:
    """For images (B, in_chans, *image_size), per branch, what the pooled output of that branch is made of, by attention
    rollout: one (B, rows, columns) float32 per branch whose patches it goes back to. With the share of the CLS tokens,
    all that one branch has sum to 1.

    A `VisionTransformer` has one branch. The model computes with its kernels and is left as it is. Raises as
    `attention_maps`.
    """
    if isinstance(model, VisionTransformer):
        grids: list[Grid] = [model.patch_embed.grid_size]
        x = model.embed_images(images)
        shares = _identities([x])
        for block in model.blocks:
            shares = [_attend(shares[0], cast(AttentionBlock, block), x)]
            x = block(x)
    else:
        grids = list(stages_of(model)[0].grids)
        tokens = crossvit_of(model).embed_images(images)
        shares = _identities(tokens)
        for stage in stages_of(model):
            transformed = []
            for b, (x, blocks) in enumerate(zip(tokens, stage.blocks)):
                for block in cast(nn.Sequential, blocks):
                    shares[b] = _attend(shares[b], cast(AttentionBlock, block), x)
                    x = block(x)
                transformed.append(x)
            shares = _fuse(stage, shares, transformed)
            tokens = stage.fuse(transformed, False)
    averaged = cast(str, model.global_pool) == "avg"
    pooled = [share[:, 1:].mean(dim=1) if averaged else share[:, 0] for share in shares]
    return [pictures_of(share, grids) for share in pooled]


def _identities(tokens: Sequence[Tensor]) -> list[Tensor]:
    """Per branch (B, 1 + N_b, T): every token is itself among the T of all branches."""
    lengths = [x.shape[1] for x in tokens]
    eye = torch.eye(sum(lengths), device=tokens[0].device)
    return [own.expand(len(x), -1, -1) for x, own in zip(tokens, eye.split(lengths))]


def _attend(share: Tensor, block: AttentionBlock, x: Tensor) -> Tensor:
    """`share` (B, N, T) behind the attention of `block` over x (B, N, D)."""
    qkv = F.linear(block.norm1(x), plain_linear(block.attn.qkv).weight, plain_linear(block.attn.qkv).bias).float()
    q, k, _ = qkv.unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, d)
    read = torch.zeros_like(share)
    for h in range(block.attn.num_heads):  # one at a time: (B, H, N, N) is large
        read += (q[:, h] @ k[:, h].transpose(1, 2) * q.shape[-1] ** -0.5).softmax(dim=-1) @ share
    return (share + read / block.attn.num_heads) / 2


def _fuse(stage: MultiScaleBlock, shares: list[Tensor], tokens: list[Tensor]) -> list[Tensor]:
    if isinstance(stage, CrossAttentionFusion):
        cls = [share[:, :1] for share in shares]
        for found in cross_maps(stage, tokens, 0):
            p = found.weights.mean(dim=1)[:, None]  # (B, 1, 1 + N) of the mean head
            own, patches = cls[found.branch], shares[found.reads[0]][:, 1:]
            cls[found.branch] = (own + p[..., :1] * own + p[..., 1:] @ patches) / 2
        return [torch.cat((own, share[:, 1:]), dim=1) for own, share in zip(cls, shares)]
    if isinstance(stage, AllAttentionFusion):
        y = torch.cat([f(x) for f, x in zip(stage.projs, tokens)], dim=1)
        lengths = [x.shape[1] for x in tokens]
        return list(_attend(torch.cat(shares, dim=1), stage.fusion, y).split(lengths, dim=1))
    if isinstance(stage, ClassTokenFusion | PairwiseFusion):
        mean = torch.stack([share[:, :1] for share in shares]).mean(dim=0)
        rest = [share[:, 1:] for share in shares]
        if isinstance(stage, PairwiseFusion):
            resized = [
                [resize_tokens(own, theirs, grid) for own, theirs in zip(rest, stage.grids)] for grid in stage.grids
            ]
            rest = [torch.stack(every).mean(dim=0) for every in resized]
        return [torch.cat((mean, own), dim=1) for own in rest]
    return shares
