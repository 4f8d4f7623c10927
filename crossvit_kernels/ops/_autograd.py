"""The autograd formula of every op: forward and backward are the op's own dispatcher ops, or, where nothing watches the
dispatcher, what these end in."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ._registry import Op


class Differentiable(torch.autograd.Function):
    """(op, keyset, *arguments of the dispatcher op) -> what the op returns; without a keyset past the dispatcher."""

    @staticmethod
    def forward(ctx: Any, op: "Op", keyset: Any, *args: Any) -> Any:
        """Runs the op and keeps what its backward sees."""
        result = op.run(*args) if keyset is None else below_autograd(op, keyset, *args)
        out, saved = (result[0], result[1:]) if op.saved else (result, ())
        tensors = [args[i] if i in op.tensors else None for i in op.kept]
        ctx.save_for_backward(*tensors, *([out] if op.takes_out else []), *saved)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.op, ctx.observed = op, keyset is not None
        ctx.others = [None if i in op.tensors else args[i] for i in op.kept]
        ctx.save, ctx.kernels = args[-2:]
        ctx.passed_dtype = None if op.passed is None else args[op.passed].dtype
        return result

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Computes the gradients that are needed, and no other."""
        op = ctx.op
        if op.save is None:
            raise RuntimeError(f"crossvit_kernels.{op.name} has no derivative: for training compose the ops in it")
        if not ctx.save:
            raise RuntimeError(
                f"crossvit_kernels::{op.name} was called with save=False: there is nothing to differentiate"
            )
        grads: list[Tensor | None] = [None] * (len(op.inputs) + 2)
        needed = ctx.needs_input_grad[2:]
        if grad_out is not None and op.passed is not None and needed[op.passed]:
            grads[op.passed] = grad_out.to(ctx.passed_dtype)
        wanted = [i for i in op.kept if i in op.tensors and needed[i]]
        if grad_out is not None and wanted:
            tensors, split = ctx.saved_tensors, len(op.kept)
            inputs = [t if i in op.tensors else other for i, t, other in zip(op.kept, tensors, ctx.others)]
            needs = [bool(needed[i]) for i in op.kept if i in op.tensors]
            # With gradients on, a second derivative is asked for: the dispatcher op knows that there is none.
            past = not (ctx.observed or torch.is_grad_enabled() or op.observed(tensors) or op.observed([grad_out]))
            run = op.run_backward if past else op.backward_op
            for i, gradient in zip(wanted, run(grad_out, *inputs, *tensors[split:], needs, ctx.kernels)):
                grads[i] = gradient
        return None, None, *grads


def below_autograd(op: "Op", keyset: Any, *args: Any) -> Any:
    """The dispatcher op without its autograd formula."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def second_derivative(op: "Op") -> Any:
    """The autograd formula of the op's backward: it raises."""

    def raises(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"crossvit_kernels.{op.name} has no second derivative; kernels='reference' has PyTorch's own"
        )

    return raises
