"""cls_cross_attention on Triton: three launches forward."""

import torch
from torch import Tensor

from .. import defaults
from ..configs import configuration
from ..kernels.cls_cross_attention import cls_query, cls_value, token_pass
from ..launch import launch
from ..target import DTYPES
from ..tiling import ROWS, cdiv, images_per_program, power_of_two, split_tiles
from ..views import Arguments, attention_arguments, dense_rows, pointers
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
    (batch, width), tokens, dtype = cls.shape, 1 + patches.shape[1], q_weight.dtype
    given = attention_arguments(cls, patches, num_heads, dtype) | {"eps": eps}
    given |= pointers(norm_weight=norm_weight, norm_bias=norm_bias, q_weight=q_weight, q_bias=q_bias)
    given |= pointers(k_weight=k_weight, v_weight=v_weight, v_bias=v_bias)
    default = defaults.cls_rows(width, given["HEAD"], dtype, given["PRECISION"])
    kept = batch if save else 0
    query = cls.new_empty((kept, width), dtype=torch.float32)
    mean, rstd = query.new_empty((kept, tokens)), query.new_empty((kept, tokens))
    probs = query.new_empty((kept, num_heads, tokens))
    key_query = query.new_empty((batch, num_heads, width))
    given |= {"key_query_ptr": key_query, "query_ptr": query if save else None}
    config = configuration("cls_query", width, dtype, default)
    launch(cls_query, (cdiv(batch, ROWS), num_heads), config, given)

    statistics = (mean, rstd, probs) if save else (None, None, None)
    pass_tokens(given, dtype, *statistics)
    out = q_weight.new_empty((batch, width))
    rows = images_per_program(batch, num_heads, given["splits"])
    given |= {"probs_ptr": statistics[2], "out_ptr": out, "ROWS": rows, "SPLITS_BLOCK": power_of_two(given["splits"])}
    config = configuration("cls_value", width, dtype, default)
    launch(cls_value, (cdiv(batch, rows), num_heads), config, given)
    context: Tensor = given["context_ptr"]
    if not save:
        context, key_query = context[:0], key_query[:0]
    return out, mean, rstd, probs, context, query, key_query


def pass_tokens(
    given: Arguments, dtype: torch.dtype, mean: Tensor | None, rstd: Tensor | None, scores: Tensor | None
) -> None:
    """The pass over the tokens, see `token_pass`; adds context, split_context, softmax and splits to what is given.

    mean, rstd and scores are filled where they are kept. With one split both contexts are the same tensor, with more
    the first is yet to be filled.
    """
    key_query: Tensor = given["key_query_ptr"]
    batch, heads, width = key_query.shape
    config = configuration("token_pass", width, dtype, defaults.token_pass(width, dtype, given["PRECISION"]))
    splits, tiles = split_tiles(batch, cdiv(given["patches"], config["BLOCK_N"]))
    context = torch.empty_like(key_query)
    given["context_ptr"], given["splits"] = context, splits
    given["split_context_ptr"] = context if splits == 1 else key_query.new_empty((batch, splits, heads, width))
    given["softmax_ptr"] = key_query.new_empty((batch, splits, 2, heads))
    statistics = {"mean_ptr": mean, "rstd_ptr": rstd, "scores_ptr": scores}
    options = {"tiles": tiles, "SPLIT": splits > 1, "DTYPE": DTYPES[dtype]}
    launch(token_pass, (batch, splits), config, given, **statistics, **options)
