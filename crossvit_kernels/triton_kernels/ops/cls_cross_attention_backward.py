"""The backward of cls_cross_attention: at most six launches, a function each, in the order of
docs/design/cls_cross_attention.md.

What is `given` are the kernels' arguments by name, to which each launch adds what it makes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import defaults
from ..configs import Config, configuration
from ..kernels.cls_cross_attention_backward import (
    finish_gradients,
    projection_gradients,
    query_gradient,
    query_input_gradient,
    value_gradient,
)
from ..kernels.token_gradient import token_gradient
from ..launch import launch
from ..target import architecture
from ..tiling import ROWS, cdiv, head_block, heads_block, images_per_program, power_of_two, reload, split_tiles
from ..views import Arguments, attention_arguments, dense_rows, pointers

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

    given = attention_arguments(dense_rows(cls), dense_rows(patches), num_heads, q_weight.dtype)
    given |= pointers(**dict(zip(NAMES[2:], inputs[2:])), grad_out=grad_out)
    given |= pointers(mean=mean, rstd=rstd, probs=probs, context=context, query=query, key_query=key_query)
    given |= {f"grad_{name}_ptr": grads.get(name) for name in NAMES}
    given |= dict.fromkeys(("grad_normalized_ptr", "grad_u_ptr", "grad_query_ptr", "grad_query_input_ptr"))
    plan = Plan.of(given, q_weight.dtype)
    add_norm_parts(given, plan, "norm_weight" in grads, "norm_bias" in grads)
    to_query_input = bool(need & {"cls", "norm_weight", "norm_bias"})
    to_query = to_query_input or bool(need & {"q_weight", "q_bias", "k_weight"})
    if to_query or "patches" in need:
        launch_value_gradient(given, plan)
        launch_token_gradient(given, plan, "cls" in need)
    if to_query:
        launch_query_gradient(given, plan)
    if to_query_input:
        launch_query_input_gradient(given, plan)
    if need & {"q_weight", "k_weight", "v_weight"}:
        launch_projection_gradients(given, plan)
    if need & {"cls", "norm_weight", "norm_bias", "q_bias", "v_bias"}:
        launch_finish_gradients(given, plan)
    return [grads[name] for name in NAMES if name in need]


@dataclass(frozen=True)
class Plan:
    """Sizes, and how the work is cut up: the configuration of the pass over the tokens, splits of an image's tokens,
    tiles in each of them, and the images of one program behind the pass."""

    batch: int
    heads: int
    width: int
    dtype: torch.dtype
    precision: str
    config: Config
    splits: int
    tiles: int
    images: int

    @classmethod
    def of(cls, given: Arguments, dtype: torch.dtype) -> "Plan":
        batch, heads, width, precision = (given[name] for name in ("batch", "HEADS", "D", "PRECISION"))
        default = defaults.token_gradient(width, heads, dtype, precision, architecture())
        config = configuration("token_gradient", width, dtype, default)
        splits, tiles = split_tiles(batch, cdiv(given["patches"], config["BLOCK_N"]))
        images = images_per_program(batch, heads, splits)
        return cls(batch, heads, width, dtype, precision, config, splits, tiles, images)

    def configuration(self, kernel: str, default: Config | None = None) -> Config:
        """Of a kernel; the default is that of kernels that stream weights past 16 images."""
        if default is None:
            default = defaults.cls_rows(self.width, self.width // self.heads, self.dtype, self.precision)
        return configuration(kernel, self.width, self.dtype, default)

    @property
    def image_tiles(self) -> int:
        """Tiles of images."""
        return cdiv(self.batch, ROWS)

    @property
    def parts_of_values(self) -> int:
        """How many rows of the norm's gradients come from the values: one of every tile of images and head."""
        return self.image_tiles * self.heads

    @property
    def parts_of_keys(self) -> int:
        """How many come from the keys, of norm_weight alone; they follow those from the values. Last is one of every
        tile of images, from the query."""
        return cdiv(self.batch, self.images) * self.heads


def add_norm_parts(given: Arguments, plan: Plan, weight: bool, bias: bool) -> None:
    """Adds the rows whose sums are the gradients of norm_weight and norm_bias, and how many they are."""
    bias_rows = plan.parts_of_values + plan.image_tiles if bias else 0
    weight_rows = plan.parts_of_values + plan.parts_of_keys + plan.image_tiles if weight else 0
    new_empty = given["probs_ptr"].new_empty
    given["norm_weight_parts_ptr"] = new_empty((weight_rows, plan.width)) if weight else None
    given["norm_bias_parts_ptr"] = new_empty((bias_rows, plan.width)) if bias else None
    given["norm_weight_rows"], given["norm_bias_rows"] = weight_rows, bias_rows


def launch_value_gradient(given: Arguments, plan: Plan) -> None:
    """Adds stacked, stacked_means and delta, see the kernel."""
    shape, config = (plan.batch, plan.heads), plan.configuration("value_gradient")
    given["stacked_ptr"] = given["v_weight_ptr"].new_empty((*shape, 2, plan.width))
    given["stacked_means_ptr"] = given["probs_ptr"].new_empty((*shape, 2))
    given["delta_ptr"] = given["probs_ptr"].new_empty(shape)
    launch(value_gradient, (plan.image_tiles, plan.heads), config, given, STAGES=config.num_stages)


def launch_token_gradient(given: Arguments, plan: Plan, cls_needed: bool) -> None:
    """Adds grad_u of every split, (B, splits, H, D), and, where needed, the normalized CLS token's gradient (B, D), as
    far as it is one of the tokens; fills the patches' gradient where that is needed."""
    batch, heads, width, probs = plan.batch, plan.heads, plan.width, given["probs_ptr"]
    given["splits"], given["split_grad_u_ptr"] = plan.splits, probs.new_empty((batch, plan.splits, heads, width))
    if cls_needed:
        given["grad_normalized_ptr"] = probs.new_empty((batch, width))
    again = reload(width, heads_block(heads, 8), plan.dtype)
    options = {"HEADS_FIRST": again or architecture() in defaults.EARLY, "RELOAD": again}
    launch(token_gradient, (batch, plan.splits), plan.config, given, tiles=plan.tiles, **options)


def launch_query_gradient(given: Arguments, plan: Plan) -> None:
    """Adds grad_query (B, D) and grad_u (B, H, D), the latter joined from the splits."""
    split_grad_u, shape = given["split_grad_u_ptr"], (plan.batch, plan.heads, plan.width)
    given["grad_query_ptr"] = split_grad_u.new_empty((plan.batch, plan.width))
    given["grad_u_ptr"] = split_grad_u if plan.splits == 1 else split_grad_u.new_empty(shape)
    launch(
        query_gradient,
        (cdiv(plan.batch, plan.images), plan.heads),
        plan.configuration("query_gradient"),
        given,
        norm_weight_parts_ptr=rows_from(given["norm_weight_parts_ptr"], plan.parts_of_values),
        ROWS=plan.images,
        SPLITS_BLOCK=power_of_two(plan.splits),
    )


def launch_query_input_gradient(given: Arguments, plan: Plan) -> None:
    """Adds grad_query_input (B, D)."""
    given["grad_query_input_ptr"] = given["probs_ptr"].new_empty((plan.batch, plan.width))
    config = plan.configuration("query_input_gradient", defaults.QUERY_INPUT_GRADIENT)
    launch(
        query_input_gradient,
        (plan.image_tiles, cdiv(plan.width, config["BLOCK_E"])),
        config,
        given,
        norm_weight_parts_ptr=rows_from(given["norm_weight_parts_ptr"], plan.parts_of_values + plan.parts_of_keys),
        norm_bias_parts_ptr=rows_from(given["norm_bias_parts_ptr"], plan.parts_of_values),
    )


def rows_from(parts: Tensor | None, row: int) -> Tensor | None:
    """The rows from this one on, if there are any parts."""
    return None if parts is None else parts[row:]


def launch_projection_gradients(given: Arguments, plan: Plan) -> None:
    """Fills those gradients of the three projections' weights that are needed."""
    config = plan.configuration("projection_gradients", defaults.projection_gradients(plan.dtype))
    head = given["HEAD"]
    blocks = plan.heads * cdiv(head, head_block(head)) * cdiv(plan.width, config["BLOCK_E"])
    launch(projection_gradients, (blocks, 3), config, given)


def launch_finish_gradients(given: Arguments, plan: Plan) -> None:
    """Fills those gradients of the norm, of the biases and of cls that are needed."""
    config = plan.configuration("finish_gradients", defaults.finish_gradients(plan.width))
    blocks = cdiv(plan.width, config["BLOCK_E"])
    if given["grad_cls_ptr"] is not None:
        blocks = max(blocks, cdiv(plan.batch, 4))
    launch(finish_gradients, (blocks, 5), config, given)
