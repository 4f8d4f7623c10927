"""The backward of cls_cross_attention."""

import torch
from torch import Tensor

from .. import defaults
from ..configs import Config, configuration
from ..kernels.cls_gradients import query_gradient, query_input_gradient, value_gradient
from ..kernels.projection_gradients import finish_gradients, projection_gradients
from ..kernels.token_gradient import token_gradient
from ..launch import launch
from ..target import DTYPES, architecture, dot_precision
from ..tiling import ROWS, cdiv, head_block, images_per_program, power_of_two, reload, split_tiles
from ..views import dense, dense_rows


def backward(
    grad_out: Tensor,
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
    mean: Tensor,
    rstd: Tensor,
    probs: Tensor,
    context: Tensor,
    query: Tensor,
    key_query: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """The op's backward: the gradients that `needs` asks for, of cls to v_bias."""
    names = ("cls", "patches", "norm_weight", "norm_bias")
    names += ("q_weight", "q_bias", "k_weight", "k_bias", "v_weight", "v_bias")
    need = {name for name, needed in zip(names, needs) if needed}
    inputs = (cls, patches, norm_weight, norm_bias, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias)
    grads = {n: t.new_empty(t.shape) for n, t in zip(names, inputs) if n in need and n != "k_bias" and t is not None}
    if "k_bias" in need and k_bias is not None:
        grads["k_bias"] = k_bias.new_zeros(k_bias.shape)

    cls, patches = dense_rows(cls), dense_rows(patches)
    grad_out, norm_weight, norm_bias, q_weight, k_weight, v_weight = dense(
        grad_out, norm_weight, norm_bias, q_weight, k_weight, v_weight
    )
    (batch, width), tokens = cls.shape, probs.shape[2]
    head, dtype = width // num_heads, q_weight.dtype
    scale, precision = head**-0.5, dot_precision(dtype)
    # Of the launches, which work on 16 images and all heads, or a few images where their tokens were split.
    tiles = cdiv(batch, ROWS)
    shape = {"batch": batch, "D": width, "PRECISION": precision}
    of_heads = {**shape, "HEAD": head, "HEAD_BLOCK": head_block(head)}
    cls_arguments = {"cls_ptr": cls, "mean_ptr": mean, "rstd_ptr": rstd, "cls_stride": cls.stride(0), "tokens": tokens}

    to_query_input = bool(need & {"cls", "norm_weight", "norm_bias"})
    to_query = to_query_input or bool(need & {"q_weight", "q_bias", "k_weight"})
    norm_weight_parts = norm_bias_parts = grad_normalized = grad_u = grad_query = grad_query_input = None
    norm_weight_rows = norm_bias_rows = 0
    if to_query or "patches" in need:
        plan = plan_tokens(batch, tokens - 1, width, num_heads, dtype)
        splits = plan[1]
        rows = images_per_program(batch, num_heads, splits)
        # Rows whose sums are the norm's gradients: of every tile and head, from values and keys, and of every tile.
        from_values, from_keys = tiles * num_heads, cdiv(batch, rows) * num_heads
        norm_weight_rows, norm_bias_rows = from_values + from_keys + tiles, from_values + tiles
        if "norm_weight" in need:
            norm_weight_parts = probs.new_empty((norm_weight_rows, width))
        if "norm_bias" in need:
            norm_bias_parts = probs.new_empty((norm_bias_rows, width))
        stacked = q_weight.new_empty((batch, num_heads, 2, width))
        stacked_means = probs.new_empty((batch, num_heads, 2))
        delta = probs.new_empty((batch, num_heads))
        chosen = configuration("value_gradient", width, dtype, defaults.cls_rows(width, head, dtype, precision))
        launch(
            value_gradient,
            (tiles, num_heads),
            chosen,
            grad_out_ptr=grad_out,
            norm_weight_ptr=norm_weight,
            v_weight_ptr=v_weight,
            key_query_ptr=key_query,
            context_ptr=context,
            stacked_ptr=stacked,
            stacked_means_ptr=stacked_means,
            delta_ptr=delta,
            norm_weight_parts_ptr=norm_weight_parts,
            norm_bias_parts_ptr=norm_bias_parts,
            STAGES=chosen.num_stages,
            **of_heads,
        )
        if "cls" in need:
            grad_normalized = probs.new_empty((batch, width))
        split_grad_u = launch_token_gradient(
            cls,
            patches,
            stacked,
            stacked_means,
            delta,
            context,
            mean,
            rstd,
            probs,
            grads.get("patches"),
            grad_normalized,
            plan,
        )
    if to_query:
        grad_u = split_grad_u if splits == 1 else probs.new_empty((batch, num_heads, width))
        grad_query = probs.new_empty((batch, width))
        launch(
            query_gradient,
            (cdiv(batch, rows), num_heads),
            configuration("query_gradient", width, dtype, defaults.cls_rows(width, head, dtype, precision)),
            split_grad_u_ptr=split_grad_u,
            grad_u_ptr=grad_u,
            norm_weight_ptr=norm_weight,
            k_weight_ptr=k_weight,
            key_query_ptr=key_query,
            grad_query_ptr=grad_query,
            norm_weight_parts_ptr=None if norm_weight_parts is None else norm_weight_parts[from_values:],
            splits=splits,
            scale=scale,
            ROWS=rows,
            SPLITS_BLOCK=power_of_two(splits),
            **of_heads,
        )
    if to_query_input:
        grad_query_input = probs.new_empty((batch, width))
        chosen = configuration("query_input_gradient", width, dtype, defaults.QUERY_INPUT_GRADIENT)
        launch(
            query_input_gradient,
            (tiles, cdiv(width, chosen["BLOCK_E"])),
            chosen,
            grad_query_ptr=grad_query,
            q_weight_ptr=q_weight,
            grad_query_input_ptr=grad_query_input,
            norm_weight_parts_ptr=None if norm_weight_parts is None else norm_weight_parts[from_values + from_keys :],
            norm_bias_parts_ptr=None if norm_bias_parts is None else norm_bias_parts[from_values:],
            **shape,
            **cls_arguments,
        )
    if need & {"q_weight", "k_weight", "v_weight"}:
        chosen = configuration("projection_gradients", width, dtype, defaults.projection_gradients(dtype))
        blocks = num_heads * cdiv(head, head_block(head)) * cdiv(width, chosen["BLOCK_E"])
        launch(
            projection_gradients,
            (blocks, 3),
            chosen,
            grad_out_ptr=grad_out,
            context_ptr=context,
            query_ptr=query,
            grad_u_ptr=grad_u,
            grad_query_ptr=grad_query,
            norm_weight_ptr=norm_weight,
            norm_bias_ptr=norm_bias,
            grad_q_ptr=grads.get("q_weight"),
            grad_k_ptr=grads.get("k_weight"),
            grad_v_ptr=grads.get("v_weight"),
            scale=scale,
            DTYPE=DTYPES[dtype],
            **of_heads,
            **cls_arguments,
        )
    if need & {"cls", "norm_weight", "norm_bias", "q_bias", "v_bias"}:
        chosen = configuration("finish_gradients", width, dtype, defaults.finish_gradients(width))
        launch(
            finish_gradients,
            (max(cdiv(width, chosen["BLOCK_E"]), cdiv(batch, 4) if "cls" in need else 0), 5),
            chosen,
            norm_weight_parts_ptr=norm_weight_parts,
            norm_bias_parts_ptr=norm_bias_parts,
            grad_query_ptr=grad_query,
            grad_out_ptr=grad_out,
            probs_ptr=probs,
            norm_weight_ptr=norm_weight,
            grad_normalized_ptr=grad_normalized,
            grad_query_input_ptr=grad_query_input,
            grad_norm_weight_ptr=grads.get("norm_weight"),
            grad_norm_bias_ptr=grads.get("norm_bias"),
            grad_q_bias_ptr=grads.get("q_bias"),
            grad_v_bias_ptr=grads.get("v_bias"),
            grad_cls_ptr=grads.get("cls"),
            norm_weight_rows=norm_weight_rows,
            norm_bias_rows=norm_bias_rows,
            batch=batch,
            D=width,
            HEAD=head,
            **cls_arguments,
        )
    return [grads[name] for name in names if name in need]


Plan = tuple[Config, int, int]


def plan_tokens(batch: int, patches: int, width: int, heads: int, dtype: torch.dtype) -> Plan:
    """The pass's configuration, splits of an image's tokens, and tiles in each."""
    default = defaults.token_gradient(width, heads, dtype, dot_precision(dtype), architecture())
    chosen = configuration("token_gradient", width, dtype, default)
    return chosen, *split_tiles(batch, cdiv(patches, chosen["BLOCK_N"]))


def launch_token_gradient(
    cls: Tensor,
    patches: Tensor,
    stacked: Tensor,
    stacked_means: Tensor,
    delta: Tensor,
    context: Tensor,
    mean: Tensor,
    rstd: Tensor,
    probs: Tensor,
    grad_patches: Tensor | None,
    grad_normalized: Tensor | None,
    plan: Plan,
) -> Tensor:
    """Returns grad_u of every split, (B, splits, H, D), and fills the gradients' tensors that are given.

    `grad_normalized` (B, D) gets the gradient of the normalized CLS token, as far as it is one of the tokens.
    """
    batch, heads, tokens = probs.shape
    width, dtype = patches.shape[2], stacked.dtype
    chosen, splits, tiles = plan
    heads_block = max(8, power_of_two(heads))
    again = reload(width, heads_block, dtype)
    grad_u = probs.new_empty((batch, splits, heads, width))
    launch(
        token_gradient,
        (batch, splits),
        chosen,
        cls_ptr=cls,
        patches_ptr=patches,
        stacked_ptr=stacked,
        stacked_means_ptr=stacked_means,
        delta_ptr=delta,
        context_ptr=context,
        mean_ptr=mean,
        rstd_ptr=rstd,
        probs_ptr=probs,
        grad_patches_ptr=grad_patches,
        grad_normalized_ptr=grad_normalized,
        grad_u_ptr=grad_u,
        patches=tokens - 1,
        cls_stride=cls.stride(0),
        patches_batch=patches.stride(0),
        patches_token=patches.stride(1),
        splits=splits,
        tiles=tiles,
        D=width,
        HEADS=heads,
        HEADS_BLOCK=heads_block,
        HEADS_FIRST=again or architecture() in defaults.EARLY,
        RELOAD=again,
        PRECISION=dot_precision(dtype),
    )
    return grad_u
