"""cls_fusion on Triton: a direction of CrossViT's fusion in four launches; see kernels/fusion_rows.py.

Projection, query and absorbed key; one pass over the tokens; every head's value and share of the output; their sum and
the way back. Heads and columns are spread over programs, so that no weight streams through one alone.
"""

from typing import Any

import torch
from torch import Tensor

from .. import defaults
from ..configs import configuration
from ..kernels.fusion_rows import fusion_query, fusion_revert, fusion_value
from ..launch import launch
from ..tiling import ROWS, cdiv, power_of_two
from ..views import Linear, Norm, attention_arguments, contiguous, rows_of
from .cls_cross_attention import pass_tokens


def forward(call: Any) -> Tensor:
    """The op's forward; `save` has nothing to save."""
    (batch, own), width, heads, dtype = call.cls.shape, call.patches.shape[2], call.num_heads, call.q_weight.dtype
    given = attention_arguments(call, dtype) | {"OWN": own}
    given["proj_norm"] = Norm(contiguous(call.proj_norm_weight), contiguous(call.proj_norm_bias))
    given["proj"] = Linear(contiguous(call.proj_weight), contiguous(call.proj_bias))
    given |= {"out_weight_ptr": contiguous(call.out_weight), "out_bias_ptr": contiguous(call.out_bias)}
    given["revert_norm"] = Norm(contiguous(call.revert_norm_weight), contiguous(call.revert_norm_bias))
    given["revert"] = Linear(contiguous(call.revert_weight), contiguous(call.revert_bias))
    head, precision = given["HEAD"], given["PRECISION"]

    # The CLS stays in float32 between the steps, whatever the model's dtype.
    projected = call.cls.new_empty((batch, width), dtype=torch.float32)
    key_query = projected.new_empty((batch, heads, width))
    given |= {"projected_ptr": projected, "key_query_ptr": key_query}
    default = defaults.fusion_query(own, width, head, dtype, precision)
    config = configuration("fusion_query", width, dtype, default)
    launch(fusion_query, (cdiv(batch, ROWS), heads), config, given)

    given["cls"] = rows_of(projected).uncounted()
    pass_tokens(given, dtype, given["norm"], None)
    given |= {"shares_ptr": torch.empty_like(key_query), "SPLITS_BLOCK": power_of_two(given["splits"])}
    config = configuration("fusion_value", width, dtype, defaults.fusion_value(width, head, dtype, precision))
    launch(fusion_value, (cdiv(batch, ROWS) if given["splits"] == 1 else batch, heads), config, given)

    out = call.revert_weight.new_empty((batch, own))
    config = configuration("fusion_revert", width, dtype, defaults.fusion_revert(width, dtype))
    launch(fusion_revert, (cdiv(batch, ROWS), cdiv(own, config["BLOCK_E"])), config, given, out_ptr=out)
    return out
