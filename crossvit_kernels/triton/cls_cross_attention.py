"""cls_cross_attention on Triton: three launches forward; see _token_pass.py."""

from typing import Any

import torch
from torch import Tensor

from ._cls_rows import ROWS, absorb_query, cls_default, cls_value, dense, dense_rows, head_block, power_of_two
from ._launch import cdiv, configuration, dot_precision, launch, multiprocessors
from ._token_pass import pass_tokens


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
    kept = batch if save else 0
    query = cls.new_empty((kept, width), dtype=torch.float32)
    mean, rstd = query.new_empty((kept, tokens)), query.new_empty((kept, tokens))
    probs = query.new_empty((kept, num_heads, tokens))
    key_query = absorb_query(
        cls, norm_weight, norm_bias, q_weight, q_bias, k_weight, num_heads, eps, query if save else None
    )
    context, partial, softmax, splits = pass_tokens(
        cls, patches, norm_weight, key_query, eps, dtype, (mean, rstd, probs) if save else (None, None, None)
    )
    out = q_weight.new_empty((batch, width))
    # With few images a program takes fewer, and all of the splits that it joins.
    rows = ROWS if splits == 1 else min(ROWS, power_of_two(cdiv(batch * num_heads, 2 * multiprocessors())))
    launch(
        cls_value,
        (cdiv(batch, rows), num_heads),
        configuration("cls_value", width, dtype, cls_default(width, dtype)),
        context_ptr=context,
        partial_ptr=partial,
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
        PRECISION=dot_precision(dtype),
    )
    if not save:
        context, key_query = context[:0], key_query[:0]
    return out, mean, rstd, probs, context, query, key_query


def backward(grad_out: Tensor, *args: Any) -> list[Tensor]:
    """The op's backward."""
    raise NotImplementedError
