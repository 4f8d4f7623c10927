"""The backward of cls_cross_attention: at most six launches, a function each, in the order of
docs/design/cls_cross_attention.md."""

from torch import Tensor

from .. import defaults
from ..configs import configuration
from ..kernels.cls_cross_attention_backward import query_gradient, query_input_gradient, value_gradient
from ..kernels.projection_gradients import finish_gradients, projection_gradients
from ..kernels.token_gradient import token_gradient
from ..launch import launch
from ..target import DTYPES, architecture, dot_precision
from ..tiling import cdiv, head_block, power_of_two, reload
from ..views import dense, dense_rows
from .cls_cross_attention_shared import NormParts, Plan, Shared

NAMES = (
    *("cls", "patches", "norm_weight", "norm_bias"),
    *("q_weight", "q_bias", "k_weight", "k_bias", "v_weight", "v_bias"),
)


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
    need = {name for name, needed in zip(NAMES, needs) if needed}
    inputs = (cls, patches, norm_weight, norm_bias, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias)
    grads = {n: t.new_empty(t.shape) for n, t in zip(NAMES, inputs) if n in need and n != "k_bias" and t is not None}
    if "k_bias" in need and k_bias is not None:
        grads["k_bias"] = k_bias.new_zeros(k_bias.shape)

    cls, patches = dense_rows(cls), dense_rows(patches)
    grad_out, norm_weight, norm_bias, q_weight, k_weight, v_weight = dense(
        grad_out, norm_weight, norm_bias, q_weight, k_weight, v_weight
    )
    (batch, width), dtype = cls.shape, q_weight.dtype
    shared = Shared(
        batch=batch,
        tokens=probs.shape[2],
        width=width,
        heads=num_heads,
        dtype=dtype,
        precision=dot_precision(dtype),
        grad_out=grad_out,
        cls=cls,
        patches=patches,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        mean=mean,
        rstd=rstd,
        probs=probs,
        context=context,
        key_query=key_query,
        grads=grads,
    )
    to_query_input = bool(need & {"cls", "norm_weight", "norm_bias"})
    to_query = to_query_input or bool(need & {"q_weight", "q_bias", "k_weight"})
    parts, grad_normalized, grad_u, grad_query, grad_query_input = NormParts(), None, None, None, None
    if to_query or "patches" in need:
        plan = Plan.of(shared)
        parts = NormParts.of(shared, plan)
        stacked, stacked_means, delta = launch_value_gradient(shared, v_weight, parts)
        if "cls" in need:
            grad_normalized = probs.new_empty((batch, width))
        split_grad_u = launch_token_gradient(shared, plan, stacked, stacked_means, delta, grad_normalized)
    if to_query:
        grad_query, grad_u = launch_query_gradient(shared, plan, k_weight, split_grad_u, parts)
    if to_query_input:
        grad_query_input = launch_query_input_gradient(shared, q_weight, grad_query, parts)
    if need & {"q_weight", "k_weight", "v_weight"}:
        launch_projection_gradients(shared, query, grad_u, grad_query)
    if need & {"cls", "norm_weight", "norm_bias", "q_bias", "v_bias"}:
        launch_finish_gradients(shared, parts, grad_query, grad_normalized, grad_query_input)
    return [grads[name] for name in NAMES if name in need]


def launch_value_gradient(shared: Shared, v_weight: Tensor, parts: NormParts) -> tuple[Tensor, Tensor, Tensor]:
    """(stacked, stacked_means, delta), see the kernel."""
    batch, heads, width, dtype = shared.batch, shared.heads, shared.width, shared.dtype
    stacked = v_weight.new_empty((batch, heads, 2, width))
    stacked_means = shared.probs.new_empty((batch, heads, 2))
    delta = shared.probs.new_empty((batch, heads))
    default = defaults.cls_rows(width, shared.head, dtype, shared.precision)
    config = configuration("value_gradient", width, dtype, default)
    launch(
        value_gradient,
        (shared.tiles, heads),
        config,
        grad_out_ptr=shared.grad_out,
        norm_weight_ptr=shared.norm_weight,
        v_weight_ptr=v_weight,
        key_query_ptr=shared.key_query,
        context_ptr=shared.context,
        stacked_ptr=stacked,
        stacked_means_ptr=stacked_means,
        delta_ptr=delta,
        norm_weight_parts_ptr=parts.weight,
        norm_bias_parts_ptr=parts.bias,
        STAGES=config.num_stages,
        **shared.head_sizes(),
    )
    return stacked, stacked_means, delta


def launch_token_gradient(
    shared: Shared, plan: Plan, stacked: Tensor, stacked_means: Tensor, delta: Tensor, grad_normalized: Tensor | None
) -> Tensor:
    """Returns grad_u of every split, (B, splits, H, D), and fills the patches' gradient where it is needed.

    `grad_normalized` (B, D) gets the gradient of the normalized CLS token, as far as it is one of the tokens.
    """
    heads, width, patches = shared.heads, shared.width, shared.patches
    heads_block = max(8, power_of_two(heads))
    again = reload(width, heads_block, shared.dtype)
    grad_u = shared.probs.new_empty((shared.batch, plan.splits, heads, width))
    launch(
        token_gradient,
        (shared.batch, plan.splits),
        plan.config,
        cls_ptr=shared.cls,
        patches_ptr=patches,
        stacked_ptr=stacked,
        stacked_means_ptr=stacked_means,
        delta_ptr=delta,
        context_ptr=shared.context,
        mean_ptr=shared.mean,
        rstd_ptr=shared.rstd,
        probs_ptr=shared.probs,
        grad_patches_ptr=shared.grads.get("patches"),
        grad_normalized_ptr=grad_normalized,
        grad_u_ptr=grad_u,
        patches=shared.tokens - 1,
        cls_stride=shared.cls.stride(0),
        patches_batch=patches.stride(0),
        patches_token=patches.stride(1),
        splits=plan.splits,
        tiles=plan.tiles,
        D=width,
        HEADS=heads,
        HEADS_BLOCK=heads_block,
        HEADS_FIRST=again or architecture() in defaults.EARLY,
        RELOAD=again,
        PRECISION=shared.precision,
    )
    return grad_u


def launch_query_gradient(
    shared: Shared, plan: Plan, k_weight: Tensor, split_grad_u: Tensor, parts: NormParts
) -> tuple[Tensor, Tensor]:
    """(grad_query, grad_u), the latter joined from the splits."""
    batch, heads, width, dtype = shared.batch, shared.heads, shared.width, shared.dtype
    grad_u = split_grad_u if plan.splits == 1 else shared.probs.new_empty((batch, heads, width))
    grad_query = shared.probs.new_empty((batch, width))
    default = defaults.cls_rows(width, shared.head, dtype, shared.precision)
    launch(
        query_gradient,
        (cdiv(batch, plan.images), heads),
        configuration("query_gradient", width, dtype, default),
        split_grad_u_ptr=split_grad_u,
        grad_u_ptr=grad_u,
        norm_weight_ptr=shared.norm_weight,
        k_weight_ptr=k_weight,
        key_query_ptr=shared.key_query,
        grad_query_ptr=grad_query,
        norm_weight_parts_ptr=parts.weight_from_keys,
        splits=plan.splits,
        scale=shared.scale,
        ROWS=plan.images,
        SPLITS_BLOCK=power_of_two(plan.splits),
        **shared.head_sizes(),
    )
    return grad_query, grad_u


def launch_query_input_gradient(
    shared: Shared, q_weight: Tensor, grad_query: Tensor | None, parts: NormParts
) -> Tensor:
    """grad_query_input (B, D)."""
    grad_query_input = shared.probs.new_empty((shared.batch, shared.width))
    config = configuration("query_input_gradient", shared.width, shared.dtype, defaults.QUERY_INPUT_GRADIENT)
    launch(
        query_input_gradient,
        (shared.tiles, cdiv(shared.width, config["BLOCK_E"])),
        config,
        grad_query_ptr=grad_query,
        q_weight_ptr=q_weight,
        grad_query_input_ptr=grad_query_input,
        norm_weight_parts_ptr=parts.weight_from_query,
        norm_bias_parts_ptr=parts.bias_from_query,
        **shared.sizes(),
        **shared.cls_tokens(),
    )
    return grad_query_input


def launch_projection_gradients(
    shared: Shared, query: Tensor, grad_u: Tensor | None, grad_query: Tensor | None
) -> None:
    """Fills those gradients of the three projections' weights that are needed."""
    width, head, dtype = shared.width, shared.head, shared.dtype
    config = configuration("projection_gradients", width, dtype, defaults.projection_gradients(dtype))
    launch(
        projection_gradients,
        (shared.heads * cdiv(head, head_block(head)) * cdiv(width, config["BLOCK_E"]), 3),
        config,
        grad_out_ptr=shared.grad_out,
        context_ptr=shared.context,
        query_ptr=query,
        grad_u_ptr=grad_u,
        grad_query_ptr=grad_query,
        norm_weight_ptr=shared.norm_weight,
        norm_bias_ptr=shared.norm_bias,
        grad_q_ptr=shared.grads.get("q_weight"),
        grad_k_ptr=shared.grads.get("k_weight"),
        grad_v_ptr=shared.grads.get("v_weight"),
        scale=shared.scale,
        DTYPE=DTYPES[dtype],
        **shared.head_sizes(),
        **shared.cls_tokens(),
    )


def launch_finish_gradients(
    shared: Shared,
    parts: NormParts,
    grad_query: Tensor | None,
    grad_normalized: Tensor | None,
    grad_query_input: Tensor | None,
) -> None:
    """Fills those gradients of the norm, of the biases and of cls that are needed."""
    width, grads = shared.width, shared.grads
    config = configuration("finish_gradients", width, shared.dtype, defaults.finish_gradients(width))
    launch(
        finish_gradients,
        (max(cdiv(width, config["BLOCK_E"]), cdiv(shared.batch, 4) if "cls" in grads else 0), 5),
        config,
        norm_weight_parts_ptr=parts.weight,
        norm_bias_parts_ptr=parts.bias,
        grad_query_ptr=grad_query,
        grad_out_ptr=shared.grad_out,
        probs_ptr=shared.probs,
        norm_weight_ptr=shared.norm_weight,
        grad_normalized_ptr=grad_normalized,
        grad_query_input_ptr=grad_query_input,
        grad_norm_weight_ptr=grads.get("norm_weight"),
        grad_norm_bias_ptr=grads.get("norm_bias"),
        grad_q_bias_ptr=grads.get("q_bias"),
        grad_v_bias_ptr=grads.get("v_bias"),
        grad_cls_ptr=grads.get("cls"),
        norm_weight_rows=0 if parts.weight is None else parts.weight.shape[0],
        norm_bias_rows=0 if parts.bias is None else parts.bias.shape[0],
        batch=shared.batch,
        D=width,
        HEAD=shared.head,
        **shared.cls_tokens(),
    )
