"""An op, declared once as data: its arguments by name, what each is to the op, and what the op makes of them.

    OpSpec(
        "linear_residual",
        [Argument("x", activation=True, matrix=True), LinearParams("weight", "bias"), ...],
        computes_in="weight",
        reference=..., shapes=..., results=..., flops=...,
    )

From the declaration `OpSpec` works out, once, the schemas of the op's two dispatcher ops,

    crossvit_kernels::<name>(arguments, bool save, str kernels) -> (out, saved...)
    crossvit_kernels::<name>_backward(grad_out, arguments, saved..., bool[] needs, str kernels) -> the needed gradients

and where among the arguments everything stands. `save` says whether a backward will come; without it the saved tensors
have no rows. Every backend saves the same tensors, so that any backend's backward takes any backend's forward.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "crossvit_kernels"

Shapes = dict[str, Sequence[int]]
Result = tuple[Sequence[int], torch.dtype]


@dataclass(frozen=True)
class Argument:
    """An argument of an op and what it is to the op.

    type: in the schema language.
    activation: whether it may be empty or strided.
    matrix: whether it is an operand of a product, which autocast casts.
    promoted: whether the reference concatenates it with others, which brings them to one dtype.
    passed: whether it gets out's gradient unchanged; the backward op does not see it.
    """

    name: str
    type: str = "Tensor"
    activation: bool = False
    matrix: bool = False
    promoted: bool = False
    passed: bool = False


@dataclass(frozen=True)
class NormParams:
    """The names of a LayerNorm's weight and bias, which may be None."""

    weight: str
    bias: str

    @classmethod
    def named(cls, prefix: str) -> "NormParams":
        """The two called <prefix>_weight and <prefix>_bias."""
        return cls(f"{prefix}_weight", f"{prefix}_bias")

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """The two as arguments."""
        return Argument(self.weight), Argument(self.bias, "Tensor?")

    def shapes(self, width: int) -> Shapes:
        """Their shapes."""
        return {self.weight: (width,), self.bias: (width,)}


@dataclass(frozen=True)
class LinearParams:
    """The names of a Linear's weight and bias, which may be None."""

    weight: str
    bias: str

    @classmethod
    def named(cls, prefix: str) -> "LinearParams":
        """The two called <prefix>_weight and <prefix>_bias."""
        return cls(f"{prefix}_weight", f"{prefix}_bias")

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """The two as arguments."""
        return Argument(self.weight, matrix=True), Argument(self.bias, "Tensor?", matrix=True)

    def shapes(self, rows: int, columns: int) -> Shapes:
        """Their shapes."""
        return {self.weight: (rows, columns), self.bias: (rows,)}


@dataclass(frozen=True, eq=False, repr=False)
class OpSpec:
    """What an op is. The functions from `shapes` on name those of the op's arguments that they look at; they are called
    with all of them, (*inputs), and handed those.

    name: the op's.
    declared: its arguments, in order.
    computes_in: the argument whose dtype the op computes in.
    reference: (*inputs) -> out, in plain PyTorch.
    shapes: -> {tensor: the shape that it must have}; ValueError or TypeError where one has another rank than its shape
        is known by, or a number does not go with them.
    results: -> the shapes and dtypes of out and of what is saved.
    flops: (backend, ...) -> the number of floating-point operations.
    saved, save: the saved tensors' names; -> the saved tensors. Without `save` the op has no derivative.
    backward_flops: (backend, {argument: whether its gradient is needed}, ...) -> their number.
    takes_out: whether the backward sees out.
    fits: {a backend whose kernels do not take every size: -> whether they take these}; others go to the reference.
    """

    name: str
    declared: Sequence[Argument | NormParams | LinearParams]
    computes_in: str
    reference: Callable[..., Tensor]
    shapes: Callable[..., Shapes]
    results: Callable[..., tuple[Result, ...]]
    flops: Callable[..., int]
    saved: tuple[str, ...] = ()
    save: Callable[..., tuple[Tensor, ...]] | None = None
    backward_flops: Callable[..., int] | None = None
    takes_out: bool = False
    fits: Mapping[str, Callable[..., bool]] = field(default_factory=dict)

    # What follows from it. The numbers are positions among the inputs, which are the arguments in their order.
    arguments: tuple[Argument, ...] = field(init=False)
    inputs: list[str] = field(init=False)  # their names
    compute: int = field(init=False)  # the input whose dtype the op computes in
    tensors: list[int] = field(init=False)
    matrices: list[int] = field(init=False)
    activations: list[int] = field(init=False)
    parameters: list[int] = field(init=False)  # the matrices that are no activations
    promoted: list[int] = field(init=False)
    passed: int | None = field(init=False)
    kept: list[int] = field(init=False)  # the inputs that the backward sees: all but the passed one
    differentiated: list[int] = field(init=False)  # the tensors among them, in the order of `needs`
    numbers: list[int] = field(init=False)  # the others among them
    backward_saved: list[str] = field(init=False)  # what the backward sees of the forward's results

    def __post_init__(self) -> None:
        groups = [(d,) if isinstance(d, Argument) else d.arguments for d in self.declared]
        arguments = tuple(argument for group in groups for argument in group)
        inputs = [argument.name for argument in arguments]

        def where(wanted: Callable[[Argument], bool]) -> list[int]:
            return [i for i, argument in enumerate(arguments) if wanted(argument)]

        tensors = where(lambda a: a.type.startswith("Tensor"))
        kept, passed = where(lambda a: not a.passed), where(lambda a: a.passed)
        named = partial(_by_name, inputs=inputs)
        worked_out = {
            "arguments": arguments,
            "inputs": inputs,
            "compute": inputs.index(self.computes_in),
            "tensors": tensors,
            "matrices": where(lambda a: a.matrix),
            "activations": where(lambda a: a.activation),
            "parameters": where(lambda a: a.matrix and not a.activation),
            "promoted": where(lambda a: a.promoted),
            "passed": passed[0] if passed else None,
            "kept": kept,
            "differentiated": [i for i in kept if i in tensors],
            "numbers": [i for i in kept if i not in tensors],
            "backward_saved": [*(["out"] if self.takes_out else []), *self.saved],
            "shapes": named(self.shapes),
            "results": named(self.results),
            "flops": named(self.flops, given=("backend",)),
            "save": None if self.save is None else named(self.save),
            "backward_flops": self.backward_flops and named(self.backward_flops, given=("backend", "needs")),
            "fits": {backend: named(function) for backend, function in self.fits.items()},
        }
        for name, value in worked_out.items():
            object.__setattr__(self, name, value)

    @property
    def schema(self) -> str:
        """The schema of the forward's dispatcher op."""
        inputs = ", ".join(f"{a.type} {a.name}" for a in self.arguments)
        returns = ", ".join(f"Tensor {name}" for name in ("out", *self.saved))
        return f"{self.name}({inputs}, bool save, str kernels) -> ({returns})"

    @property
    def backward_schema(self) -> str:
        """The schema of the backward's dispatcher op."""
        kept = ", ".join(f"{self.arguments[i].type} {self.inputs[i]}" for i in self.kept)
        tensors = "".join(f", Tensor {name}" for name in self.backward_saved)
        return f"{self.name}_backward(Tensor grad_out, {kept}{tensors}, bool[] needs, str kernels) -> Tensor[]"

    @property
    def op(self) -> Any:
        """The forward's dispatcher op, once it is registered."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    @property
    def backward_op(self) -> Any:
        """The backward's dispatcher op, once it is registered."""
        return getattr(getattr(torch.ops, NAMESPACE), f"{self.name}_backward").default

    def split(self, args: Sequence[Any]) -> tuple[Tensor, list[Any], Sequence[Tensor], Sequence[bool]]:
        """grad_out, the op's inputs, what was saved and `needs`, from the arguments of its backward but `kernels`. In
        the place of the input that the backward does not see stands grad_out, which has its shape."""
        grad_out, *others, needs = args
        inputs: list[Any] = [grad_out] * len(self.inputs)
        for i, value in zip(self.kept, others):
            inputs[i] = value
        return grad_out, inputs, others[len(self.kept) :], needs

    def outputs(self, inputs: Sequence[Any]) -> list[Tensor]:
        """Fresh tensors for out and for what is saved."""
        like = inputs[self.compute]
        return [like.new_empty(shape, dtype=dtype) for shape, dtype in self.results(*inputs)]

    def cast(self, inputs: Sequence[Any], dtype: torch.dtype, which: Sequence[int]) -> list[Any]:
        """The inputs, with these of them as autocast to this dtype has them."""
        result = list(inputs)
        for i in which:
            # What is no matrix may stay in float32. Kernels do not know float16 beside bfloat16: it becomes float32.
            wanted = (dtype,) if self.arguments[i].matrix else (dtype, torch.float32)
            if result[i] is not None and result[i].dtype not in (*wanted, torch.float64):
                result[i] = result[i].to(wanted[-1])
        for i in self.promoted:
            for j in self.promoted:
                result[i] = result[i].to(torch.promote_types(result[i].dtype, result[j].dtype))
        return result


def _by_name(function: Callable, *, inputs: Sequence[str], given: Sequence[str] = ()) -> Callable:
    """`function`, to be called with the values of all of `inputs` behind those of `given`: it is handed the latter and
    those of the former that it has parameters for."""
    asked = list(inspect.signature(function).parameters)
    first, names = asked[: len(given)], asked[len(given) :]
    if first != list(given) or not set(names) <= set(inputs):
        raise TypeError(f"{function}: expected parameters {(*given, '...')} of {inputs}, got {asked}")
    positions = [len(given) + inputs.index(name) for name in names]

    def call(*values: Any) -> Any:
        return function(*values[: len(given)], *[values[i] for i in positions])

    return call
