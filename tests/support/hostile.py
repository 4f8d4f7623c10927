"""Hostile calls of the native ops, torch.ops.crossvit_kernels_cpu and _cuda: valid calls of every op as the public
functions make them, and arguments changed at random."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import crossvit_kernels
import inputs
from crossvit_kernels.dispatch.register import OPS
from inputs import Random

LARGE = 1 << 16  # elements of a tensor that a change may make


@dataclass(frozen=True)
class Call:
    """A call of crossvit_kernels_<backend>::<name> with its arguments in the schema's order."""

    backend: str
    name: str
    arguments: tuple[Any, ...]

    @property
    def op(self) -> Any:
        return getattr(getattr(torch.ops, f"crossvit_kernels_{self.backend}"), self.name).default

    @property
    def named(self) -> dict[str, Any]:
        return {a.name: v for a, v in zip(self.op._schema.arguments, self.arguments)}

    def run(self) -> Any:
        return self.op(*self.arguments)

    def changed(self, **arguments: Any) -> "Call":
        return Call(self.backend, self.name, tuple({**self.named, **arguments}.values()))

    def __str__(self) -> str:
        return f"{self.backend}::{self.name}({', '.join(f'{n}={shown(v)}' for n, v in self.named.items())})"


def shown(value: Any) -> str:
    """An argument in a few words."""
    if not isinstance(value, Tensor):
        return repr(value)
    kind = str(value.dtype).removeprefix("torch.")
    if value.layout is not torch.strided:
        return f"{kind}{tuple(value.shape)} {value.layout}"
    where = "" if value.device.type == "cpu" else f" {value.device}"
    return f"{kind}{tuple(value.shape)} strides {value.stride()}{where}"


# --- valid calls ---


class _Recorder(TorchDispatchMode):
    """Keeps the calls of native ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, backend = func.namespace.rpartition("_")
        if space == "crossvit_kernels" and backend in ("cpu", "cuda"):
            self.calls.append(Call(backend, func._schema.name.partition("::")[2], tuple(args)))
        elif func.namespace == "crossvit_kernels":  # what it calls is seen; it would be again
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


# Every op with its optional arguments and without.
PUBLIC: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "layer_norm_linear": lambda: [
        inputs.layer_norm_linear(Random(), 2, 5, 16, out=12) | {"activation": "gelu"},
        inputs.layer_norm_linear(Random(), 3, 17, out=40, bias=False) | {"pre_activation": "gelu"},
    ],
    "linear_residual": lambda: [
        inputs.linear_residual(Random(), 2, 5, 16, out=12, scale="channel"),
        inputs.linear_residual(Random(), 3, 4, 17, out=17, scale="sample"),
        inputs.linear_residual(Random(), 9, out=9, bias=False, scale="channel"),
    ],
    "layer_norm_mlp": lambda: [
        inputs.layer_norm_mlp(Random(), 2, 5, 16, hidden=24, scale="sample"),
        inputs.layer_norm_mlp(Random(), 3, 17, hidden=20, bias=False),
    ],
    "self_attention": lambda: [inputs.self_attention(Random(), 2, 5, 16, heads=2)],
    "bicubic_resize": lambda: [inputs.bicubic_resize(Random(), 2, 10, 14, (8, 12))],
    "patch_embed": lambda: [
        inputs.patch_embed(Random(), 2, 10, 14, patch=4, embed=16, image_size=(8, 12)),
        inputs.patch_embed(Random(), 2, 6, 9, patch=3, embed=5, bias=False),
    ],
    "cls_cross_attention": lambda: [
        inputs.cls_cross_attention(Random(), 2, 5, 16, heads=2),
        inputs.cls_cross_attention(Random(), 3, 4, 9, heads=3, bias=False),
    ],
    "cls_fusion": lambda: [inputs.cls_fusion(Random(), 2, 5, 12, 16, heads=2)],
}


def dtypes(backend: str) -> tuple[torch.dtype, ...]:
    """What a backend's kernels take, float32 first."""
    return (torch.float32, torch.bfloat16, *((torch.float16,) if backend == "cuda" else ()))


def valid_calls(backend: str) -> dict[str, list[Call]]:
    """Calls of every native op of a backend, forward and backward, as the public functions make them."""
    recorder = _Recorder()
    for name, made in PUBLIC.items():
        for given in made():
            for dtype in dtypes(backend):
                values = {n: v.to(dtype) if isinstance(v, Tensor) else v for n, v in given.items()}
                with recorder:
                    if OPS[name].save is None:
                        getattr(crossvit_kernels, name)(**values, kernels=backend)
                        continue
                    leaves = {n: v.requires_grad_() if isinstance(v, Tensor) else v for n, v in values.items()}
                    out = getattr(crossvit_kernels, name)(**leaves, kernels=backend)
                    out.backward(Random(1).normal(*out.shape).to(out.dtype))
    calls = recorder.calls + (_blocks() if backend == "cpu" else [])
    found: dict[str, list[Call]] = {}
    for call in calls:
        detached = tuple(v.detach() if isinstance(v, Tensor) else v for v in call.arguments)
        found.setdefault(call.name, []).append(Call(call.backend, call.name, detached))
    return found


def _blocks() -> list[Call]:
    """Calls of transformer_block, which is of no public op."""
    calls = []
    for dtype in dtypes("cpu"):
        rng, width = Random(), 16
        x, norms = rng.normal(2, 5, width), [(*rng.norm(width), 1e-6) for _ in range(2)]
        scale = (rng.normal(width), rng.drop_path(2, 3))
        linears = [rng.linear(a, b) for a, b in ((3 * width, width), (width, width), (24, width), (width, 24))]
        given = (
            *(x, *norms[0], *linears[0], 2, *linears[1], scale[0]),
            *(*norms[1], *linears[2], *linears[3], scale[1]),
        )
        values = tuple(v.to(dtype) if isinstance(v, Tensor) else v for v in given)
        calls.append(Call("cpu", "transformer_block", values))
    return calls


# --- changes ---


def _expanded(t: Tensor, rng: random.Random) -> Tensor:
    if t.dim() == 0 or t.numel() == 0:
        return t
    return t.narrow(rng.randrange(t.dim()), 0, 1).expand(t.shape)


def _overlapping(t: Tensor, rng: random.Random) -> Tensor:
    """Every row begins one element behind the one before."""
    memory = torch.arange(sum(t.shape) + 1, dtype=torch.float32).sin().to(t.dtype)
    return memory.as_strided(t.shape, [1] * t.dim())


def _moved(t: Tensor, rng: random.Random) -> Tensor:
    """The same values at an odd place in a larger memory."""
    memory = t.new_zeros(t.numel() + 1)
    memory[1:] = t.reshape(-1)
    return memory[1:].view(t.shape)


def _transposed(t: Tensor, rng: random.Random) -> Tensor:
    order = rng.sample(range(t.dim()), t.dim())
    back = [order.index(d) for d in range(t.dim())]
    return t.permute(order).contiguous().permute(back)


def _spread(t: Tensor, rng: random.Random) -> Tensor:
    return torch.stack([t, t + 1], dim=-1)[..., 0]


def _resized(t: Tensor, rng: random.Random) -> Tensor:
    """One size changed, by values of the same kind."""
    if t.dim() == 0:
        return t.expand(3).clone()
    dim = rng.randrange(t.dim())
    size = t.shape[dim]
    new = rng.choice((0, 1, size - 1, size + 1, 2 * size, 3 * size, 300))
    if t.numel() == 0 or new * (t.numel() // max(size, 1)) > LARGE:
        new = 0
    return t.index_select(dim, torch.arange(max(new, 0)) % max(size, 1)) if size else t.new_zeros(1)


def _reshaped(t: Tensor, rng: random.Random) -> Tensor:
    return rng.choice(
        (
            t.flatten(),
            t[None],
            t[..., None],
            t.sum(),
            t.flatten()[: t.numel() // 2],
            t.transpose(0, -1) if t.dim() else t,
        )
    )


def _shrunk(t: Tensor, rng: random.Random) -> Tensor:
    """A tensor whose memory was given back, as FSDP does between uses."""
    copy = t.clone()
    copy.untyped_storage().resize_(rng.choice((0, copy.untyped_storage().nbytes() // 2)))
    return copy


def _cast(t: Tensor, rng: random.Random) -> Tensor:
    names = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.bool)
    return t.to(rng.choice((*names, torch.complex64, torch.uint8)))


def _elsewhere(t: Tensor, rng: random.Random) -> Any:
    return rng.choice((None, t.to("meta"), t.to_sparse() if t.dim() else None))


SAME_VALUES = (_moved, _transposed, _spread)
CHANGES = (
    *(_resized, _resized, _reshaped, _reshaped, _cast, _cast, _expanded, _overlapping),
    *SAME_VALUES,
)
INTEGERS = (0, -1, -2, 1, 2, 3, 5, 7, 2**31, 2**31 - 1, 2**32, 2**62, -(2**63), 2**63 - 1)


def change(call: Call, rng: random.Random) -> Call:
    """The call with one argument to three changed; now and then all of a dtype."""
    values, schema = list(call.arguments), call.op._schema.arguments
    if rng.random() < 0.05:
        dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16, torch.float64))
        values = [v.to(dtype) if isinstance(v, Tensor) and rng.random() < 0.9 else v for v in values]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        i = rng.randrange(len(values))
        kind, value = str(schema[i].type), values[i]
        if isinstance(value, Tensor):
            tensors = [v for v in values if isinstance(v, Tensor)]
            others = [None] if "Optional" in kind and rng.random() < 0.2 else []
            if rng.random() < 0.1:
                others.append(rng.choice(tensors))
            values[i] = others[-1] if others else rng.choice(CHANGES)(value, rng)
        elif "Tensor" in kind:
            values[i] = rng.choice([v for v in values if isinstance(v, Tensor)])
        elif kind == "List[bool]":
            wanted = [rng.random() < 0.5 for _ in value]
            values[i] = rng.choice(([], wanted, wanted, wanted[:-1], [*wanted, True], [True] * 40))
        elif isinstance(value, bool):
            values[i] = not value
        elif isinstance(value, int):
            values[i] = rng.choice((*INTEGERS, 2 * value, value + 1, -value))
        else:
            values[i] = rng.choice((-1.0, float("nan"), float("inf"), 1e-3, 2.0))
    if rng.random() < 0.1:  # last: PyTorch itself trusts such tensors, or cannot change them further
        i = rng.choice([i for i, v in enumerate(values) if isinstance(v, Tensor)])
        values[i] = rng.choice((_shrunk, _elsewhere))(values[i], rng)
    return Call(call.backend, call.name, tuple(values))
