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
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

NAMESPACE = "crossvit_kernels"
_KEYWORD = inspect.Parameter.KEYWORD_ONLY

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
    matrix: ClassVar[bool] = False

    @classmethod
    def named(cls, prefix: str) -> Self:
        """The two called <prefix>_weight and <prefix>_bias."""
        return cls(f"{prefix}_weight", f"{prefix}_bias")

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """The two as arguments."""
        return Argument(self.weight, matrix=self.matrix), Argument(self.bias, "Tensor?", matrix=self.matrix)

    def shapes(self, *sizes: int) -> Shapes:
        """Their shapes: of the weight these sizes, of the bias its rows."""
        return {self.weight: sizes, self.bias: sizes[:1]}


class LinearParams(NormParams):
    """The names of a Linear's, or a convolution's, weight and bias, which may be None."""

    matrix = True


@dataclass(eq=False, repr=False)
class OpSpec:
    """What an op is. Its functions name those of the op's arguments that they look at; they are called with all of
    them, (*inputs), and handed those.

    name: the op's.
    declared: its arguments, in order.
    computes_in: the argument whose dtype the op computes in.
    reference: -> out, in plain PyTorch.
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
    declared: Sequence[Argument | NormParams]
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

    def __post_init__(self) -> None:
        groups = [(d,) if isinstance(d, Argument) else d.arguments for d in self.declared]
        self.arguments = tuple(argument for group in groups for argument in group)
        self.inputs = [argument.name for argument in self.arguments]

        def where(wanted: Callable[[Argument], bool]) -> list[int]:
            return [i for i, argument in enumerate(self.arguments) if wanted(argument)]

        # Positions among the inputs, which are the arguments in their order.
        self.compute = self.inputs.index(self.computes_in)
        self.tensors = where(lambda a: a.type.startswith("Tensor"))
        self.matrices = where(lambda a: a.matrix)
        self.activations = where(lambda a: a.activation)
        self.parameters = where(lambda a: a.matrix and not a.activation)
        self.promoted = where(lambda a: a.promoted)
        self.passed = next(iter(where(lambda a: a.passed)), None)
        self.kept = where(lambda a: not a.passed)  # the inputs that the backward sees
        self.differentiated = [i for i in self.kept if i in self.tensors]  # in the order of `needs`
        self.numbers = [i for i in self.kept if i not in self.tensors]
        # What the backward sees of the forward's results.
        self.backward_saved = [*(["out"] if self.takes_out else []), *self.saved]

        named = partial(_by_name, inputs=self.inputs)
        self.reference, self.shapes, self.results = named(self.reference), named(self.shapes), named(self.results)
        self.flops = named(self.flops, given=("backend",))
        self.save = self.save and named(self.save)
        self.backward_flops = self.backward_flops and named(self.backward_flops, given=("backend", "needs"))
        self.fits = {backend: named(function) for backend, function in self.fits.items()}

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
    those of the former that it has parameters for. One with starred parameters takes all of them."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        return function
    first, names = list(parameters)[: len(given)], list(parameters)[len(given) :]
    if first != list(given) or not set(names) <= set(inputs):
        raise TypeError(f"{function}: expected parameters {(*given, '...')} of {inputs}, got {[*parameters]}")
    positions = [len(given) + inputs.index(name) for name in names if parameters[name].kind is not _KEYWORD]
    keywords = {name: len(given) + inputs.index(name) for name in names if parameters[name].kind is _KEYWORD}

    def call(*values: Any) -> Any:
        options = {name: values[i] for name, i in keywords.items()}
        return function(*values[: len(given)], *[values[i] for i in positions], **options)

    return call
