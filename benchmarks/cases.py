"""What the benchmarks of single ops time: every op as CrossViT-15 calls it, in both branches, with its inputs."""

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import crossvit_kernels
from crossvit_kernels import ops

from .session import dtype_name, where

OPS = (
    "bicubic_resize",
    "cls_cross_attention",
    "cls_fusion",
    "layer_norm_linear",
    "layer_norm_mlp",
    "linear_residual",
    "patch_embed",
    "self_attention",
)
INFERENCE_ONLY = ("cls_fusion",)


@dataclass(frozen=True)
class Branch:
    """A CrossViT's branch: its tokens with the CLS, its width, the other branch's, its patch, its image and heads, and
    the images that the model is given."""

    tokens: int
    width: int
    other_width: int
    patch: int
    image: int
    heads: int = 6
    given: int = 240


BRANCHES = {"small": Branch(401, 192, 384, 12, 240), "large": Branch(197, 384, 192, 16, 224)}  # CrossViT-15's
# Only where they are asked for by name: the narrowest and the widest there are, CrossViT-Tiny's and Base's, and one so
# small that a call takes the time that the host needs to make it.
EXTREMES = {
    "tiny": Branch(401, 96, 192, 12, 240, heads=3),
    "base": Branch(197, 768, 384, 16, 224, heads=12),
    "host": Branch(5, 32, 64, 16, 32, heads=2, given=36),
}


def usual_batch(op: str) -> int:
    """The batch of an op where none is asked for: the ops on the CLS token alone do less per image."""
    return 32 if op.startswith("cls_") else 8


@dataclass(frozen=True)
class Cell:
    """What is compared within: implementations of one op on the same inputs."""

    op: str
    branch: str
    batch: int
    dtype: torch.dtype
    backward: bool
    threads: int
    device: str = "cpu"

    @property
    def sizes(self) -> Branch:
        return (BRANCHES | EXTREMES)[self.branch]

    @property
    def mode(self) -> str:
        return "forward+backward" if self.backward else "forward"

    def __str__(self) -> str:
        branch = self.sizes
        return (
            f"{self.op}, {self.branch} branch ({branch.tokens} × {branch.width}), batch {self.batch},"
            f" {dtype_name(self.dtype)}, {self.mode}, {where(self.device, self.threads)}"
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The op's tensors by argument, as the model calls it in this branch."""
        branch, b = self.sizes, self.batch
        t, d, other, p = branch.tokens, branch.width, branch.other_width, branch.patch
        norm = {"norm_weight": (d,), "norm_bias": (d,)}
        attention = {f"{x}_{part}": (d, d)[: 2 - (part == "bias")] for x in "qkv" for part in ("weight", "bias")}
        cross = {"patches": (b, t - 1, d), **norm, **attention}
        match self.op:
            case "bicubic_resize":
                side = branch.given if branch.given != branch.image else BRANCHES["large"].image
                return {"images": (b, 3, side, side)}
            case "cls_cross_attention":
                return {"cls": (b, d), **cross}
            case "cls_fusion":
                proj = {"norm_weight": (other,), "norm_bias": (other,), "weight": (d, other), "bias": (d,)}
                revert = {**norm, "weight": (other, d), "bias": (other,)}
                around = {f"proj_{k}": v for k, v in proj.items()} | {f"revert_{k}": v for k, v in revert.items()}
                return {"cls": (b, other), **cross, **around, "out_weight": (d, d), "out_bias": (d,)}
            case "layer_norm_linear":
                return {"x": (b, t, d), **norm, "weight": (3 * d, d), "bias": (3 * d,)}
            case "layer_norm_mlp":
                matrices = {"w1": (3 * d, d), "b1": (3 * d,), "w2": (d, 3 * d), "b2": (d,)}
                return {"x": (b, t, d), **norm, **matrices}
            case "linear_residual":
                return {"x": (b, t, d), "weight": (d, d), "bias": (d,), "residual": (b, t, d)}
            case "patch_embed":
                positions = {"cls_token": (1, 1, d), "pos_embed": (1, t, d)}
                return {"images": (b, 3, branch.given, branch.given), "weight": (d, 3, p, p), "bias": (d,), **positions}
            case _:
                return {"qkv": (b, t, 3 * d)}

    def function(self, kernels: str) -> Callable[..., Tensor]:
        """The op on these kernels, as a function of its tensors by name."""
        return functools.partial(getattr(crossvit_kernels, self.op), **self._options(), kernels=kernels)

    def reference(self) -> Callable[..., Tensor]:
        """Its plain PyTorch, as a function of its tensors by name."""
        return functools.partial(getattr(ops, f"{self.op}_reference"), **self._options())

    def _options(self) -> dict[str, int]:
        known = {"num_heads": self.sizes.heads, "image_size": self.sizes.image}
        return {key: known[key] for key in inspect.signature(getattr(ops, self.op)).parameters if key in known}

    def differentiable(self) -> list[str]:
        """The tensors that training wants gradients of; the images where there is nothing else."""
        return [name for name in self.shapes() if name != "images"] or ["images"]


def sdpa(
    cls: Tensor,
    patches: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    num_heads: int,
) -> Tensor:
    """cls_cross_attention as one would write it with torch's fused attention."""
    x = F.layer_norm(torch.cat([cls[:, None], patches], dim=1), norm_weight.shape, norm_weight, norm_bias, 1e-6)
    projected = F.linear(x[:, :1], q_weight, q_bias), F.linear(x, k_weight, k_bias), F.linear(x, v_weight, v_bias)
    q, k, v = (y.unflatten(-1, (num_heads, -1)).transpose(1, 2) for y in projected)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1)


def inputs(cell: Cell, seed: int) -> dict[str, Tensor]:
    """One set of random inputs of a model's magnitudes; patches are a view behind the CLS token, as in the model."""
    generator = torch.Generator(cell.device).manual_seed(seed)
    tensors = {}
    for name, shape in cell.shapes().items():
        if name == "patches":
            tokens = torch.randn(shape[0], shape[1] + 1, shape[2], generator=generator, device=cell.device)
            tensors[name] = tokens.to(cell.dtype)[:, 1:]
            continue
        tensor = torch.randn(shape, generator=generator, device=cell.device)
        if name.endswith("norm_weight"):
            tensor = 1 + 0.1 * tensor
        elif name.endswith("bias"):
            tensor = 0.1 * tensor
        elif name.endswith("weight") or name in ("w1", "w2"):
            tensor = tensor / tensor[0].numel() ** 0.5
        tensors[name] = tensor.to(cell.dtype)
    return tensors


def leaves(cell: Cell, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, those that have a gradient as leaves that require it."""
    with_gradient = set(cell.differentiable())
    return {name: t.detach().requires_grad_(name in with_gradient) for name, t in tensors.items()}


def results(cell: Cell, function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> list[Tensor]:
    """The output and, for a cell with backward, the gradients for a fixed random gradient of the output."""
    if not cell.backward:
        with torch.inference_mode():
            return [function(**tensors)]
    given = leaves(cell, tensors)
    out = function(**given)
    generator = torch.Generator(out.device).manual_seed(1)
    gradient = torch.randn(out.shape, generator=generator, device=out.device).to(cell.dtype).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [given[name] for name in cell.differentiable()], gradient)]


def output_gradient(cell: Cell, function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> Tensor | None:
    """A random gradient of the output, for a cell with backward."""
    return torch.randn_like(results(cell, function, tensors)[0]) if cell.backward else None


def call(
    cell: Cell, function: Callable[..., Tensor], sets: Sequence[dict[str, Tensor]], gradient: Tensor | None
) -> Callable[[], object]:
    """The call to be timed, with the next of the `sets` of inputs each time; its result is the output or, where there
    is a `gradient` of the output, those of the inputs."""
    if gradient is None:
        plain = itertools.cycle(sets)

        def forward() -> Tensor:
            with torch.inference_mode():
                return function(**next(plain))

        return forward
    wanted = cell.differentiable()
    with_leaves = itertools.cycle([leaves(cell, tensors) for tensors in sets])

    def both() -> tuple[Tensor, ...]:
        tensors = next(with_leaves)
        return torch.autograd.grad(function(**tensors), [tensors[name] for name in wanted], gradient)

    return both
