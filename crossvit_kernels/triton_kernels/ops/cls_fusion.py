"""cls_fusion on Triton: a direction of CrossViT's fusion in four launches; see kernels/fusion_rows.py.

Projection, query and absorbed key; one pass over the tokens; every head's value and share of the output; their sum and
the way back. Heads and columns are spread over programs, so that no weight streams through one alone.
"""

import torch
from torch import Tensor

from .. import defaults
from ..configs import configuration
from ..kernels.fusion_rows import fusion_query, fusion_revert, fusion_value
from ..launch import launch
from ..tiling import ROWS, cdiv, power_of_two
from ..views import attention_arguments, dense_rows, pointers
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
    (batch, own), width, dtype = cls.shape, patches.shape[2], q_weight.dtype
    given = attention_arguments(cls, patches, num_heads, dtype) | {"eps": eps, "OWN": own}
    given |= pointers(proj_norm_weight=proj_norm_weight, proj_norm_bias=proj_norm_bias)
    given |= pointers(proj_weight=proj_weight, proj_bias=proj_bias)
    given |= pointers(norm_weight=norm_weight, norm_bias=norm_bias, q_weight=q_weight, q_bias=q_bias)
    given |= pointers(k_weight=k_weight, v_weight=v_weight, v_bias=v_bias, out_weight=out_weight, out_bias=out_bias)
    given |= pointers(revert_norm_weight=revert_norm_weight, revert_norm_bias=revert_norm_bias)
    given |= pointers(revert_weight=revert_weight, revert_bias=revert_bias)
    head, precision = given["HEAD"], given["PRECISION"]

    # The CLS stays in float32 between the steps, whatever the model's dtype.
    projected = cls.new_empty((batch, width), dtype=torch.float32)
    key_query = projected.new_empty((batch, num_heads, width))
    given |= {"projected_ptr": projected, "key_query_ptr": key_query}
    default = defaults.fusion_query(own, width, head, dtype, precision)
    config = configuration("fusion_query", width, dtype, default)
    launch(fusion_query, (cdiv(batch, ROWS), num_heads), config, given)

    given |= {"cls_ptr": projected, "cls_stride": width}
    pass_tokens(given, dtype, None, None, None)
    given |= {"shares_ptr": torch.empty_like(key_query), "SPLITS_BLOCK": power_of_two(given["splits"])}
    config = configuration("fusion_value", width, dtype, defaults.fusion_value(width, head, dtype, precision))
    launch(fusion_value, (cdiv(batch, ROWS) if given["splits"] == 1 else batch, num_heads), config, given)

    out = revert_weight.new_empty((batch, own))
    config = configuration("fusion_revert", width, dtype, defaults.fusion_revert(width, dtype))
    launch(fusion_revert, (cdiv(batch, ROWS), cdiv(own, config["BLOCK_E"])), config, given, out_ptr=out)
    return out
