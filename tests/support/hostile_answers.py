"""What a native op has to do with a call (tests/support/hostile.py): refuse it, or answer it as the reference does."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crossvit_kernels.dispatch.register import OPS
from hostile import Call

REFUSALS = (RuntimeError, ValueError, TypeError)  # what a wrong call may raise
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}
# The weight whose rows an optional bias has.
BIAS_OF = {"bias": "weight", "b1": "w1", "b2": "w2", "q_bias": "q_weight", "k_bias": "k_weight", "v_bias": "v_weight"}


class WrongError(AssertionError):
    """A call was answered, and the answer is not the reference's."""


def check(call: Call) -> bool:
    """Makes a call: False where it is refused, True where it is answered as the reference does; else WrongError."""
    try:
        result = call.run()
        if result is None:  # transformer_block: the four ops are to be called
            return False
        if call.name.endswith("_backward") and set(OPS[call.name.removesuffix("_backward")].saved) & call.named.keys():
            result = _with_its_own_saved(call).run()
    except REFUSALS:
        return False
    expected = _expected(call)
    found = list(result) if isinstance(result, (tuple, list)) else [result]
    if call.name.endswith("_backward") and len(found) != len(expected):
        raise WrongError(f"{len(found)} gradients, not {len(expected)}")
    tolerance = max(TOLERANCE[v.dtype] for v in call.arguments if isinstance(v, Tensor))
    for i, (ours, reference) in enumerate(zip(found, expected)):
        if ours.shape != reference.shape:
            raise WrongError(f"result {i} has shape {tuple(ours.shape)}, not {tuple(reference.shape)}")
        scale = reference[reference.isfinite()].abs().max().item() if reference.isfinite().any() else 0.0
        try:
            torch.testing.assert_close(
                ours.double(), reference, rtol=0, atol=tolerance * max(scale, 1.0), equal_nan=True
            )
        except AssertionError as error:
            raise WrongError(f"result {i}: {error}") from None
    return True


def _op_inputs(call: Call) -> tuple[str, dict[str, Any]]:
    """The public op that a native one belongs to, and its inputs in float64; None for what the native backward does
    not see."""
    name = call.name.removesuffix("_backward")
    op = OPS[name]
    named = {n: v.double() if isinstance(v, Tensor) else v for n, v in call.named.items()}
    given = {n: named.get(n) for n in op.inputs}
    if "eps" in given and given["eps"] is None:
        given["eps"] = 1e-6
    if name == "linear_residual" and given["residual"] is None:
        given["residual"] = torch.zeros_like(named["grad_out"])
    return name, given


def _gradients_of(call: Call) -> list[str]:
    """The inputs whose gradients a native backward returns."""
    name = call.name.removesuffix("_backward")
    op = OPS[name]
    tensors = [op.inputs[i] for i in op.kept if i in op.tensors]
    needs = call.named.get("needs", [True] * len(tensors))
    return [n for n, needed in zip(tensors, needs) if needed]


def _with_its_own_saved(call: Call) -> Call:
    """The same backward over what the forward of these very inputs saves."""
    name, given = _op_inputs(call)
    op = OPS[name]
    made = dict(zip(op.saved, op.save(*given.values())))
    if op.takes_out:
        made["out"] = op.reference(*given.values())
    named = call.named
    return call.changed(**{n: v.to(named[n].dtype).contiguous() for n, v in made.items()})


def _expected(call: Call) -> Sequence[Tensor]:
    """What the reference returns in float64."""
    if call.name == "transformer_block":
        return [_block(call)]
    name, given = _op_inputs(call)
    op = OPS[name]
    if not call.name.endswith("_backward"):
        return [op.reference(*given.values())]
    wanted = _gradients_of(call)
    for n in wanted:
        if given[n] is None:
            given[n] = given[BIAS_OF[n]].new_zeros(given[BIAS_OF[n]].shape[0])
    leaves = {
        n: v.detach().clone().requires_grad_(n in wanted) if isinstance(v, Tensor) else v for n, v in given.items()
    }
    if not wanted:
        return []
    out = op.reference(*leaves.values())
    return torch.autograd.grad(
        out, [leaves[n] for n in wanted], call.named["grad_out"].double(), materialize_grads=True
    )


def _block(call: Call) -> Tensor:
    v = {n: t.double() if isinstance(t, Tensor) else t for n, t in call.named.items()}
    x, width = v["x"], v["x"].shape[-1:]
    qkv = F.linear(
        F.layer_norm(x, width, v["norm1_weight"], v["norm1_bias"], v["eps1"]), v["qkv_weight"], v["qkv_bias"]
    )
    heads = OPS["self_attention"].reference(qkv, v["num_heads"])
    scale = [1.0 if v[n] is None else v[n] for n in ("scale1", "scale2")]
    x = x + scale[0] * F.linear(heads, v["proj_weight"], v["proj_bias"])
    hidden = F.linear(F.layer_norm(x, width, v["norm2_weight"], v["norm2_bias"], v["eps2"]), v["w1"], v["b1"])
    return x + scale[1] * F.linear(F.gelu(hidden), v["w2"], v["b2"])
