"""The autograd formula of every op: forward and backward are the op's own dispatcher ops, or, where nothing watches the
dispatcher, what these end in."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .register import Op

AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)

VMAP = torch._C._dispatch_key_parse("VmapMode")  # under is_grads_batched=True


class Differentiable(torch.autograd.Function):
    """(op, keyset, dtype, *arguments of the dispatcher op) -> what the op returns; without a keyset past the
    dispatcher. dtype: None, or autocast's, which parameters are cast to in here, so that no cast's derivative follows.
    """

    @staticmethod
    def forward(ctx: Any, op: "Op", keyset: Any, dtype: torch.dtype | None, *given: Any) -> Any:
        """Runs the op and keeps what its backward sees."""
        args: Sequence[Any] = given if dtype is None else op.cast(given, dtype, op.parameters)
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
        # What was cast; these may be written to before the backward, so that nothing reads their values there.
        ctx.originals = {i: given[i] for i in op.parameters if given[i] is not args[i]}
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
        needed, originals = ctx.needs_input_grad[3:], ctx.originals
        if grad_out is not None and op.passed is not None and needed[op.passed]:
            grads[op.passed] = grad_out.to(ctx.passed_dtype)
        wanted = [i for i in op.kept if i in op.tensors and needed[i]]
        if grad_out is not None and wanted:
            tensors, split = ctx.saved_tensors, len(op.kept)
            inputs = [t if i in op.tensors else other for i, t, other in zip(op.kept, tensors, ctx.others)]
            # With gradients on, a second derivative is asked for: the dispatcher op knows that there is none.
            past = not (ctx.observed or torch.is_grad_enabled() or op.observed(tensors) or op.observed([grad_out]))
            several = not past and under_vmap()
            if originals and (several or torch.is_grad_enabled()):
                with torch.enable_grad():
                    inputs = [Cast.apply(originals[i], t) if i in originals else t for i, t in zip(op.kept, inputs)]
            needs = [bool(needed[i]) for i in op.kept if i in op.tensors]
            args = (grad_out, *inputs, *tensors[split:], needs, ctx.kernels)
            if several:
                results = plainly(op, inputs, wanted, grad_out)
            elif past and originals:
                with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
                    results = op.run_backward(*args, wide=torch.float32 in {t.dtype for t in originals.values()})
            else:
                results = op.run_backward(*args) if past else op.backward_op(*args)
            for i, gradient in zip(wanted, results):
                if i in op.parameters:
                    gradient = gradient.to(originals.get(i, tensors[op.kept.index(i)]).dtype)
                grads[i] = gradient
        return None, None, None, *grads


def plainly(op: "Op", kept: Sequence[Any], wanted: Sequence[int], grad_out: Tensor) -> Sequence[Tensor]:
    """What the backward gives, for many gradients of out at once, which kernels do not take: by plain PyTorch."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        views = [t.view_as(t) if isinstance(t, Tensor) else t for t in kept]
    inputs = dict(zip(op.kept, views))
    if op.passed is not None:  # whose value does not matter
        inputs[op.passed] = torch.zeros(grad_out.shape, dtype=grad_out.dtype, device=grad_out.device)
    ordered = [inputs[i] for i in range(len(op.inputs))]
    return op.differentiate(ordered, wanted, grad_out, create_graph=create_graph)


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


def under_vmap() -> bool:
    """Whether tensors may stand for many at once: torch.vmap, and autograd's is_grads_batched=True."""
    if torch._C._dispatch_tls_local_include_set().has(VMAP):
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


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
