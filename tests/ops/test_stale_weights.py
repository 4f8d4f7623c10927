"""However a weight is changed or copied between two calls, the second call computes with the weight as it is then."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import crossvit_kernels
from available import NATIVE
from inputs import EXAMPLES, Random
from numerics import DEVICES

WEIGHTS = {
    "layer_norm_linear": ["weight"],
    "linear_residual": ["weight"],
    "layer_norm_mlp": ["w1", "w2"],
    "patch_embed": ["weight"],
    "cls_cross_attention": ["q_weight", "k_weight", "v_weight"],
    "cls_fusion": ["proj_weight", "q_weight", "k_weight", "v_weight", "out_weight", "revert_weight"],
}


class Layer(nn.Module):
    """One op with its weights as parameters."""

    def __init__(self, name: str) -> None:
        super().__init__()
        given = EXAMPLES[name]()
        self.name = name
        self.weights = nn.ParameterDict({n: nn.Parameter(given.pop(n)) for n in WEIGHTS[name]})
        self.given = given

    def forward(self, kernels: str) -> Tensor:
        dtype = next(self.parameters()).dtype
        given = {n: v.to(dtype) if isinstance(v, Tensor) else v for n, v in self.given.items()}
        return getattr(crossvit_kernels, self.name)(**given, **self.weights, kernels=kernels)


def optimizer_step(kind: type[torch.optim.Optimizer], **options: object) -> Callable[[Layer], Layer]:
    def change(layer: Layer) -> Layer:
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
        kind(layer.parameters(), lr=0.5, **options).step()
        return layer

    return change


def data_write(layer: Layer) -> Layer:
    for p in layer.parameters():
        p.data.mul_(-1)
    return layer


def data_replaced(layer: Layer) -> Layer:
    for p in layer.parameters():
        p.data = -p.data
    return layer


def numpy_write(layer: Layer) -> Layer:
    for p in layer.parameters():
        p.detach().numpy()[:] *= -1
    return layer


def loaded(layer: Layer) -> Layer:
    layer.load_state_dict({n: -v for n, v in layer.state_dict().items()})
    return layer


def assigned(layer: Layer) -> Layer:
    layer.load_state_dict({n: -v for n, v in layer.state_dict().items()}, assign=True)
    return layer


def to_bfloat16(layer: Layer) -> Layer:
    return layer.bfloat16()


def deep_copied(layer: Layer) -> Layer:
    return data_write(copy.deepcopy(layer))


def pickled(layer: Layer) -> Layer:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return data_write(torch.load(buffer, weights_only=False))


def averaged(layer: Layer) -> Layer:
    average = torch.optim.swa_utils.AveragedModel(layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(layer)
    average.update_parameters(data_write(layer))
    return average.module


def of_inference_mode(layer: Layer) -> Layer:
    with torch.inference_mode():
        for name in list(layer.weights):
            layer.weights[name] = nn.Parameter(-layer.weights[name], requires_grad=False)
        layer("auto")
        for p in layer.parameters():
            p.mul_(2)
    return layer


def freed_and_remade(layer: Layer) -> Layer:
    """New weights, likely in the memory that the old ones had."""
    for name in list(layer.weights):
        shape = layer.weights[name].shape
        del layer.weights[name]
        layer.weights[name] = nn.Parameter(Random(5).normal(*shape))
    return layer


CHANGES = {
    "fused AdamW": optimizer_step(torch.optim.AdamW, fused=True),
    "fused SGD": optimizer_step(torch.optim.SGD, fused=True),
    "foreach SGD": optimizer_step(torch.optim.SGD, foreach=True),
    **{f.__name__: f for f in (data_write, data_replaced, numpy_write, loaded, assigned, to_bfloat16, deep_copied)},
    **{f.__name__: f for f in (pickled, averaged, of_inference_mode, freed_and_remade)},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("kernels", [name for name in NATIVE if DEVICES[name] == "cpu"])
@pytest.mark.one_in(6)
def test_the_weights_of_now_are_used(kernels: str, name: str, change: str, training: bool) -> None:
    layer = Layer(name).train(training)
    with torch.no_grad():
        before = [layer(kernels) for _ in range(2)][1]
    changed = CHANGES[change](layer)
    with torch.no_grad():
        after, expected = changed(kernels), changed("reference")
    tolerance = 0.05 if after.dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(after, expected, rtol=tolerance, atol=tolerance)
    if after.dtype is before.dtype:
        assert not torch.allclose(after, before, rtol=0.01, atol=0.01)
