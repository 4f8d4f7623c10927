"""cls_cross_attention on Triton: three launches forward."""

import torch
from torch import Tensor

from .. import defaults
from ..configs import configuration
from ..kernels.cls_cross_attention import cls_query, cls_value
from ..kernels.token_pass import token_pass
from ..launch import launch
from ..target import DTYPES, dot_precision
from ..tiling import ROWS, cdiv, head_block, heads_block, images_per_program, power_of_two, split_tiles
from ..views import dense, dense_rows
from .cls_cross_attention_backward import backward

__all__ = ["backward", "forward"]


def forward(
    cls: Tensor,
    patches: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    num_heads: int,
    eps: float,
    save: bool,
) -> tuple[Tensor, ...]:
    """The op's forward: (out, mean, rstd, probs, context, query, key_query)."""
    cls, patches = dense_rows(cls), dense_rows(patches)
    norm_weight, norm_bias, q_weight, q_bias, k_weight, v_weight, v_bias = dense(
        norm_weight, norm_bias, q_weight, q_bias, k_weight, v_weight, v_bias
    )
    (batch, width), tokens = cls.shape, 1 + patches.shape[1]
    head, dtype = width // num_heads, q_weight.dtype
    precision = dot_precision(dtype)
    kept = batch if save else 0
    query = cls.new_empty((kept, width), dtype=torch.float32)
    mean, rstd = query.new_empty((kept, tokens)), query.new_empty((kept, tokens))
    probs = query.new_empty((kept, num_heads, tokens))
    key_query = launch_cls_query(
        cls, norm_weight, norm_bias, q_weight, q_bias, k_weight, num_heads, eps, query if save else None
    )
    context, split_context, softmax, splits = pass_tokens(
        cls, patches, norm_weight, key_query, eps, dtype, (mean, rstd, probs) if save else (None, None, None)
    )
    out = q_weight.new_empty((batch, width))
    rows = images_per_program(batch, num_heads, splits)
    launch(
        cls_value,
        (cdiv(batch, rows), num_heads),
        configuration("cls_value", width, dtype, defaults.cls_rows(width, head, dtype, precision)),
        context_ptr=context,
        split_context_ptr=split_context,
        softmax_ptr=softmax,
        probs_ptr=probs if save else None,
        norm_weight_ptr=norm_weight,
        norm_bias_ptr=norm_bias,
        v_weight_ptr=v_weight,
        v_bias_ptr=v_bias,
        out_ptr=out,
        batch=batch,
        tokens=tokens,
        splits=splits,
        D=width,
        HEAD=head,
        HEAD_BLOCK=head_block(head),
        ROWS=rows,
        SPLITS_BLOCK=power_of_two(splits),
        SAVE=save,
        PRECISION=precision,
    )
    if not save:
        context, key_query = context[:0], key_query[:0]
    return out, mean, rstd, probs, context, query, key_query


def launch_cls_query(
    cls: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    num_heads: int,
    eps: float,
    query: Tensor | None,
) -> Tensor:
    """Each head's W_k^T query / sqrt(d), (B, H, D); the query too, into `query` where that is given."""
    batch, width = cls.shape
    head = width // num_heads
    key_query = cls.new_empty((batch, num_heads, width), dtype=torch.float32)
    dtype = q_weight.dtype
    precision = dot_precision(dtype)
    launch(
        cls_query,
        (cdiv(batch, ROWS), num_heads),
        configuration("cls_query", width, dtype, defaults.cls_rows(width, head, dtype, precision)),
        cls_ptr=cls,
        norm_weight_ptr=norm_weight,
        norm_bias_ptr=norm_bias,
        q_weight_ptr=q_weight,
        q_bias_ptr=q_bias,
        k_weight_ptr=k_weight,
        query_ptr=query,
        key_query_ptr=key_query,
        batch=batch,
        cls_stride=cls.stride(0),
        scale=head**-0.5,
        eps=eps,
        D=width,
        HEAD=head,
        HEAD_BLOCK=head_block(head),
        PRECISION=precision,
    )
    return key_query


def pass_tokens(
    cls: Tensor,
    patches: Tensor,
    norm_weight: Tensor,
    key_query: Tensor,
    eps: float,
    dtype: torch.dtype,
    statistics: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The pass over the tokens: (contexts, contexts of the splits, softmax, splits); see `token_pass`.

    `statistics`: mean, rstd and scores, where they are kept. With one split both contexts are the same tensor, with
    more the first is yet to be filled.
    """
    (batch, heads, width), patch_count = key_query.shape, patches.shape[1]
    precision = dot_precision(dtype)
    chosen = configuration("token_pass", width, dtype, defaults.token_pass(width, dtype, precision))
    splits, tiles = split_tiles(batch, cdiv(patch_count, chosen["BLOCK_N"]))
    context = torch.empty_like(key_query)
    split_context = context if splits == 1 else key_query.new_empty((batch, splits, heads, width))
    softmax = key_query.new_empty((batch, splits, 2, heads))
    mean, rstd, scores = statistics
    launch(
        token_pass,
        (batch, splits),
        chosen,
        cls_ptr=cls,
        patches_ptr=patches,
        norm_weight_ptr=norm_weight,
        key_query_ptr=key_query,
        mean_ptr=mean,
        rstd_ptr=rstd,
        scores_ptr=scores,
        context_ptr=split_context,
        softmax_ptr=softmax,
        patches=patch_count,
        cls_stride=cls.stride(0),
        patches_batch=patches.stride(0),
        patches_token=patches.stride(1),
        splits=splits,
        tiles=tiles,
        eps=eps,
        D=width,
        HEADS=heads,
        HEADS_BLOCK=heads_block(heads),
        SPLIT=splits > 1,
        SAVE=mean is not None,
        DTYPE=DTYPES[dtype],
        PRECISION=precision,
    )
    return context, split_context, softmax, splits
