"""The backward of cls_cross_attention: at most six launches, a function each, in the order of
docs/design/cls_cross_attention.md.

What is `given` are the kernels' arguments by name, to which each launch adds what it makes.
"""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from ..views import Arguments, attention_arguments, contiguous

NAMES = (
    *("cls", "patches", "norm_weight", "norm_bias"),
    *("q_weight", "q_bias", "k_weight", "k_bias", "v_weight", "v_bias"),
)


# The gradients that `projection_gradients` and `finish_gradients` fill, each None where it is not needed.
Weights = namedtuple("Weights", ("q", "k", "v"))
Rest = namedtuple("Rest", ("norm_weight", "norm_bias", "q_bias", "v_bias", "cls"))


class Parts(NamedTuple):
    """Rows whose sums are the gradients of the norm's weight and of its bias, where these are needed."""

    weight: Tensor | None
    bias: Tensor | None

    def behind(self, weight_row: int, bias_row: int) -> "Parts":
        """The rows from these on."""
        weight, bias = self
        return Parts(None if weight is None else weight[weight_row:], None if bias is None else bias[bias_row:])


def backward(call: Any) -> list[Tensor]:
    """The op's backward: the gradients that `needs` asks for, of cls to v_bias."""
    need = {name for name, needed in zip(NAMES, call.needs) if needed}
    inputs = {name: getattr(call, name) for name in NAMES if name in need}
    grads = {n: t.new_empty(t.shape) for n, t in inputs.items() if n != "k_bias" and t is not None}
    if inputs.get("k_bias") is not None:
        grads["k_bias"] = call.k_bias.new_zeros(call.k_bias.shape)

    dtype = call.q_weight.dtype
    given = attention_arguments(call, dtype)
    given |= {f"{name}_weight_ptr": given[name].weight for name in ("norm", "q", "v")}
    given["norm"] = given["norm"]._replace(mean=call.mean, rstd=call.rstd)
    saved = {"probs_ptr": call.probs, "context_ptr": call.context, "key_query_ptr": call.key_query}
    given |= saved | {"query_ptr": call.query, "grad_out_ptr": contiguous(call.grad_out)}
    given["grad_patches_ptr"] = grads.get("patches")
    given["grad_weights"] = Weights(*(grads.get(f"{name}_weight") for name in Weights._fields))
    given["grads"] = Rest(*map(grads.get, Rest._fields))
    given |= dict.fromkeys(("grad_normalized_ptr", "grad_u_ptr", "grad_query_ptr", "grad_query_input_ptr"))
    plan = Plan.of(given, dtype)
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
        splits, tiles = split_tiles(batch, cdiv(given["patches"].tokens, config["BLOCK_N"]))
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
    rows = {"weight_rows": weight_rows, "bias_rows": bias_rows}
    parts = (given["probs_ptr"].new_empty((count, plan.width)) if count else None for count in rows.values())
    given |= rows | {"parts": Parts(*parts)}


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
        parts=given["parts"].behind(plan.parts_of_values, 0),
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
        parts=given["parts"].behind(plan.parts_of_values + plan.parts_of_keys, plan.parts_of_values),
    )


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
    if given["grads"].cls is not None:
        blocks = max(blocks, cdiv(plan.batch, 4))
    launch(finish_gradients, (blocks, 5), config, given)
