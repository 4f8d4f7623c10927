"""cls_cross_attention on Triton: three launches forward."""

from typing import Any

import torch
from torch import Tensor

from .. import defaults
from ..configs import configuration
from ..kernels.cls_cross_attention import cls_query, cls_value, token_pass
from ..launch import launch
from ..target import DTYPES
from ..tiling import ROWS, cdiv, images_per_program, power_of_two, split_tiles
from ..views import Arguments, Norm, attention_arguments
from .cls_cross_attention_backward import backward

__all__ = ["backward", "forward"]


def forward(call: Any) -> tuple[Tensor, ...]:
    """The op's forward: (out, mean, rstd, probs, context, query, key_query)."""
    (batch, width), dtype, heads, save = call.cls.shape, call.q_weight.dtype, call.num_heads, call.save
    given = attention_arguments(call, dtype)
    tokens, kept = 1 + call.patches.shape[1], batch if save else 0
    default = defaults.cls_rows(width, given["HEAD"], dtype, given["PRECISION"])
    query = call.cls.new_empty((kept, width), dtype=torch.float32)
    mean, rstd = query.new_empty((kept, tokens)), query.new_empty((kept, tokens))
    probs = query.new_empty((kept, heads, tokens))
    key_query = query.new_empty((batch, heads, width))
    given |= {"key_query_ptr": key_query, "query_ptr": query if save else None}
    config = configuration("cls_query", width, dtype, default)
    launch(cls_query, (cdiv(batch, ROWS), heads), config, given)

    norm, scores = (given["norm"]._replace(mean=mean, rstd=rstd), probs) if save else (given["norm"], None)
    pass_tokens(given, dtype, norm, scores)
    out = call.q_weight.new_empty((batch, width))
    rows = images_per_program(batch, heads, given["splits"])
    given |= {"probs_ptr": scores, "out_ptr": out, "ROWS": rows, "SPLITS_BLOCK": power_of_two(given["splits"])}
    config = configuration("cls_value", width, dtype, default)
    launch(cls_value, (cdiv(batch, rows), heads), config, given)
    context: Tensor = given["context_ptr"]
    if not save:
        context, key_query = context[:0], key_query[:0]
    return out, mean, rstd, probs, context, query, key_query


def pass_tokens(given: Arguments, dtype: torch.dtype, norm: Norm, scores: Tensor | None) -> None:
    """The pass over the tokens, see `token_pass`; adds context, split_context, softmax and splits to what is given.

    `scores` and the norm's statistics are filled where they are kept. With one split both contexts are the same tensor,
    with more the first is yet to be filled.
    """
    key_query: Tensor = given["key_query_ptr"]
    batch, heads, width = key_query.shape
    config = configuration("token_pass", width, dtype, defaults.token_pass(width, dtype, given["PRECISION"]))
    splits, tiles = split_tiles(batch, cdiv(given["patches"].tokens, config["BLOCK_N"]))
    context = torch.empty_like(key_query)
    given["context_ptr"], given["splits"] = context, splits
    given["split_context_ptr"] = context if splits == 1 else key_query.new_empty((batch, splits, heads, width))
    given["softmax_ptr"] = key_query.new_empty((batch, splits, 2, heads))
    options = {"tiles": tiles, "SPLIT": splits > 1, "DTYPE": DTYPES[dtype]}
    launch(token_pass, (batch, splits), config, given, norm=norm, scores_ptr=scores, **options)
