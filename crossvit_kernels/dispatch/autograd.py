"""The autograd formula of every op: forward and backward are the op's own dispatcher ops, or, where nothing watches the
dispatcher, what these end in."""

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from . import reference
from .op import Op
from .spec import OpSpec
from .torch_internals import batched, below_autograd, observed, without_autocast

LEADING = 5  # arguments of `Differentiable.forward` before the op's inputs


class Differentiable(torch.autograd.Function):
    """(op, keyset, dtype, save, kernels, *inputs) -> what the op returns.

    keyset: the dispatch keys where the formula was called by the dispatcher; None past it.
    dtype: None, or autocast's, to which parameters are cast in here, so that no cast's derivative follows.
    """

    @staticmethod
    def forward(ctx: Any, op: Op, keyset: Any, dtype: torch.dtype | None, save: bool, kernels: str, *given: Any) -> Any:
        """Runs the op and keeps what its backward sees."""
        spec = op.spec
        inputs: Sequence[Any] = given if dtype is None else spec.cast(given, dtype, spec.parameters)
        if keyset is None:
            result = op.forward(inputs, save, kernels)
        else:
            result = below_autograd(op.dispatched, keyset, *inputs, save, kernels)
        out, *saved = result if spec.saved else (result,)
        ctx.save_for_backward(*[inputs[i] for i in spec.differentiated], *([out] if spec.takes_out else []), *saved)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.op, ctx.observed = op, keyset is not None
        ctx.save, ctx.kernels = save, kernels
        ctx.numbers = [inputs[i] for i in spec.numbers]
        ctx.passed_dtype = None if spec.passed is None else inputs[spec.passed].dtype
        # What was cast; these may be written to before the backward, so that nothing reads their values there.
        ctx.originals = {i: given[i] for i in spec.parameters if given[i] is not inputs[i]}
        return result

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Computes the gradients that are needed, and no other."""
        spec = ctx.op.spec
        if spec.save is None:
            raise RuntimeError(f"crossvit_kernels.{spec.name} has no derivative: for training compose the ops in it")
        if not ctx.save:
            raise RuntimeError(
                f"crossvit_kernels::{spec.name} was called with save=False: there is nothing to differentiate"
            )
        grads: list[Tensor | None] = [None] * len(spec.inputs)
        needed = ctx.needs_input_grad[LEADING:]
        if grad_out is not None:
            if spec.passed is not None and needed[spec.passed]:
                grads[spec.passed] = grad_out.to(ctx.passed_dtype)
            needs = [needed[i] for i in spec.differentiated]
            if any(needs):
                wanted = [*compress(spec.differentiated, needs)]
                for i, gradient in zip(wanted, _gradients(ctx, grad_out, wanted, needs)):
                    grads[i] = gradient
        return *[None] * LEADING, *grads


def _gradients(ctx: Any, grad_out: Tensor, wanted: Sequence[int], needs: Sequence[bool]) -> list[Tensor]:
    """The gradients of these of the inputs, the parameters' in the dtype in which they were given."""
    op, spec, originals = ctx.op, ctx.op.spec, ctx.originals
    tensors = ctx.saved_tensors
    inputs: list[Any] = [None] * len(spec.inputs)
    for i, value in zip(spec.differentiated, tensors):
        inputs[i] = value
    for i, value in zip(spec.numbers, ctx.numbers):
        inputs[i] = value
    # With gradients on, a second derivative is asked for: the dispatcher op knows that there is none.
    past = not (ctx.observed or torch.is_grad_enabled() or observed(tensors) or observed((grad_out,)))
    several = not past and batched(grad_out)
    if originals and (several or torch.is_grad_enabled()):
        with torch.enable_grad():
            for i, original in originals.items():
                inputs[i] = Cast.apply(original, inputs[i])
    if several:
        results = _plainly(spec, inputs, wanted, grad_out)
    else:
        saved = tensors[len(spec.differentiated) :]
        args = (grad_out, *[inputs[i] for i in spec.kept], *saved, needs, ctx.kernels)
        if not past:
            results = op.backward_dispatched(*args)
        elif originals:
            with without_autocast():
                results = op.backward(*args, wide=torch.float32 in {t.dtype for t in originals.values()})
        else:
            results = op.backward(*args)
    return [g.to(originals.get(i, inputs[i]).dtype) if i in spec.parameters else g for i, g in zip(wanted, results)]


def _plainly(spec: OpSpec, inputs: list[Any], wanted: Sequence[int], grad_out: Tensor) -> Sequence[Tensor]:
    """What the backward gives, for many gradients of out at once, which kernels do not take: by plain PyTorch."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        views = [t.view_as(t) if isinstance(t, Tensor) else t for t in inputs]
    if spec.passed is not None:  # whose value does not matter
        views[spec.passed] = torch.zeros(grad_out.shape, dtype=grad_out.dtype, device=grad_out.device)
    return reference.differentiate(spec, views, wanted, grad_out, create_graph=create_graph)


class Cast(torch.autograd.Function):
    """(tensor, what it was cast to) -> the latter, for a second derivative to find its way."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, cast: Tensor) -> Tensor:
        """A view of the second argument."""
        return cast.view_as(cast)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keeps the dtype of the first."""
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Reached where the reference made the gradient, the op's own backward raising."""
        return grad.to(ctx.dtype), None


def second_derivative(spec: OpSpec) -> Any:
    """The autograd formula of the op's backward: it raises."""

    def raises(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"crossvit_kernels.{spec.name} has no second derivative; kernels='reference' has PyTorch's own"
        )

    return raises
