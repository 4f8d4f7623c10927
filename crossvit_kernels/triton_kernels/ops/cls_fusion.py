"""cls_fusion on Triton: a direction of CrossViT's fusion in four launches; see kernels/token_pass.py.

Projection, query and absorbed key; one pass over the tokens; every head's value and share of the output; their sum and
the way back. Heads and columns are spread over programs, so that no weight streams through one alone.
"""

import torch
from torch import Tensor

from .. import defaults
from ..configs import configuration
from ..kernels.fusion_rows import fusion_query, fusion_revert, fusion_value
from ..launch import launch
from ..target import dot_precision
from ..tiling import ROWS, cdiv, head_block, power_of_two
from ..views import dense, dense_rows
from .cls_cross_attention import pass_tokens


def forward(
    cls: Tensor,
    patches: Tensor,
    proj_norm_weight: Tensor,
    proj_norm_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    revert_norm_weight: Tensor,
    revert_norm_bias: Tensor | None,
    revert_weight: Tensor,
    revert_bias: Tensor | None,
    num_heads: int,
    eps: float,
    save: bool,
) -> Tensor:
    """The op's forward; `save` has nothing to save."""
    cls, patches = dense_rows(cls), dense_rows(patches)
    proj_norm_weight, proj_norm_bias, proj_weight, proj_bias = dense(
        proj_norm_weight, proj_norm_bias, proj_weight, proj_bias
    )
    norm_weight, norm_bias, q_weight, q_bias, k_weight, v_weight, v_bias = dense(
        norm_weight, norm_bias, q_weight, q_bias, k_weight, v_weight, v_bias
    )
    out_weight, out_bias, revert_weight, revert_bias = dense(out_weight, out_bias, revert_weight, revert_bias)
    revert_norm_weight, revert_norm_bias = dense(revert_norm_weight, revert_norm_bias)
    (batch, own), width, dtype = cls.shape, patches.shape[2], q_weight.dtype
    precision, head = dot_precision(dtype), width // num_heads

    # The CLS stays in float32 between the steps, whatever the model's dtype.
    projected = cls.new_empty((batch, width), dtype=torch.float32)
    key_query = cls.new_empty((batch, num_heads, width), dtype=torch.float32)
    launch(
        fusion_query,
        (cdiv(batch, ROWS), num_heads),
        configuration("fusion_query", width, dtype, defaults.fusion_query(own, width, head, dtype, precision)),
        cls_ptr=cls,
        proj_norm_weight_ptr=proj_norm_weight,
        proj_norm_bias_ptr=proj_norm_bias,
        proj_weight_ptr=proj_weight,
        proj_bias_ptr=proj_bias,
        projected_ptr=projected,
        norm_weight_ptr=norm_weight,
        norm_bias_ptr=norm_bias,
        q_weight_ptr=q_weight,
        q_bias_ptr=q_bias,
        k_weight_ptr=k_weight,
        key_query_ptr=key_query,
        batch=batch,
        cls_stride=cls.stride(0),
        scale=head**-0.5,
        eps=eps,
        OWN=own,
        D=width,
        HEAD=head,
        HEAD_BLOCK=head_block(head),
        PRECISION=precision,
    )
    _, context, softmax, splits = pass_tokens(
        projected, patches, norm_weight, key_query, eps, dtype, (None, None, None)
    )
    shares = torch.empty_like(key_query)
    launch(
        fusion_value,
        (cdiv(batch, ROWS) if splits == 1 else batch, num_heads),
        configuration("fusion_value", width, dtype, defaults.fusion_value(width, head, dtype, precision)),
        context_ptr=context,
        softmax_ptr=softmax,
        norm_weight_ptr=norm_weight,
        norm_bias_ptr=norm_bias,
        v_weight_ptr=v_weight,
        v_bias_ptr=v_bias,
        out_weight_ptr=out_weight,
        shares_ptr=shares,
        batch=batch,
        splits=splits,
        D=width,
        HEAD=head,
        HEAD_BLOCK=head_block(head),
        SPLITS_BLOCK=power_of_two(splits),
        PRECISION=precision,
    )
    out = revert_weight.new_empty((batch, own))
    chosen = configuration("fusion_revert", width, dtype, defaults.fusion_revert(width, dtype))
    launch(
        fusion_revert,
        (cdiv(batch, ROWS), cdiv(own, chosen["BLOCK_E"])),
        chosen,
        shares_ptr=shares,
        projected_ptr=projected,
        out_bias_ptr=out_bias,
        norm_weight_ptr=revert_norm_weight,
        norm_bias_ptr=revert_norm_bias,
        weight_ptr=revert_weight,
        bias_ptr=revert_bias,
        out_ptr=out,
        batch=batch,
        eps=eps,
        OWN=own,
        D=width,
        HEADS=num_heads,
        PRECISION=precision,
    )
    return out
