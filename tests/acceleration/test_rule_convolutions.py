"""The rule for when to fuse, as to patch embeddings: a convolution that is not what the op computes, or that is watched
or computed, is called, with the bits that plain PyTorch gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import crossvit
from crossvit_kernels import accelerate
from crossvit_kernels.nn import PatchEmbed
from rule import Recorder, in_turn
from timm_models import build, images
from weights import perturb, relative, timm_model

SIZE, PATCH, WIDTH = (16, 24), 8, 20


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def other(kind: type[nn.Conv2d] = nn.Conv2d, **options: Any) -> Callable[[nn.Conv2d], nn.Module]:
    """Another convolution with as many patches, and its own weights."""

    def change(conv: nn.Conv2d) -> nn.Module:
        torch.manual_seed(0)
        given = dict(kernel_size=conv.kernel_size, stride=conv.stride) | options
        return kind(conv.in_channels, conv.out_channels, **given)

    return change


def inside(change: Callable[[nn.Conv2d], Any]) -> Callable[[nn.Conv2d], nn.Module]:
    def changed(conv: nn.Conv2d) -> nn.Module:
        torch.manual_seed(0)
        change(conv)
        return conv

    return changed


def own_forward(conv: nn.Conv2d) -> None:
    conv.forward = lambda x: nn.Conv2d.forward(conv, 2 * x)  # type: ignore[method-assign]


CONVOLUTIONS: dict[str, Callable[[nn.Conv2d], nn.Module]] = {
    "a subclass": other(Doubled),
    "weight-standardised": other(StdConv2d, padding=0),
    # Of stride 8 each: as many patches, of other pixels.
    "dilated": other(kernel_size=4, stride=8, dilation=2),
    "dilated, its stride as its kernel": other(kernel_size=8, stride=8, dilation=2, padding=4),
    "padded": other(kernel_size=8, stride=8, padding=1),
    "padded by reflection": other(kernel_size=8, stride=8, padding=3, padding_mode="reflect"),
    "padded to be valid": other(padding="valid"),
    "overlapping": other(kernel_size=10, stride=8, padding=1),
    "not square": other(kernel_size=(8, 4), stride=(8, 8)),
    "without a bias": other(bias=False),
    "wrapped": lambda conv: nn.Sequential(conv, nn.Softsign()),
    "pruned": inside(lambda conv: prune.l1_unstructured(conv, "weight", 0.5)),
    "of a weight norm": inside(parametrizations.weight_norm),
    "of a spectral norm": inside(nn.utils.spectral_norm),
    "hooked": inside(lambda conv: conv.register_forward_hook(lambda module, given, out: 2 * out)),
    "hooked before": inside(lambda conv: conv.register_forward_pre_hook(lambda module, given: (2 * given[0],))),
    "hooked backward": inside(lambda conv: conv.register_full_backward_hook(lambda module, given, out: None)),
    "with a forward of its own": inside(own_forward),
}
FUSED = ("padded to be valid", "without a bias")  # what the op computes after all
UNCHANGED = ("padded to be valid", "of a weight norm", "hooked backward")  # what computes the same at first
GROUPED: dict[str, Callable[[nn.Conv2d], nn.Module]] = {"in groups": other(groups=2)}


class PlainPatchEmbed(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, WIDTH, PATCH, PATCH)

    def forward(self, images: Tensor, cls_token: Tensor, pos_embed: Tensor) -> Tensor:
        patches = self.proj(images).flatten(2).transpose(1, 2)
        return torch.cat((cls_token.expand(len(images), -1, -1), patches), dim=1) + pos_embed


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@in_turn(kind=[*CONVOLUTIONS, *GROUPED])
def test_a_convolution_in_a_patch_embedding(kind: str, kernels: str) -> None:
    change = (CONVOLUTIONS | GROUPED)[kind]
    channels = 4 if kind in GROUPED else 3
    plain = perturb(PlainPatchEmbed(channels)).eval()
    embed = PatchEmbed(SIZE, PATCH, channels, WIDTH, kernels=kernels).eval()
    embed.load_state_dict(plain.state_dict())
    generator = torch.Generator().manual_seed(0)
    given = [
        torch.randn(*s, generator=generator, requires_grad=True) for s in ((2, channels, *SIZE), (1, 1, 20), (1, 7, 20))
    ]
    results = []
    for module in (embed, plain):
        module.proj = change(module.proj)
        results.append([])
        for _ in range(2):  # a second backward, too
            out = module(*given)
            leaves = [*given, *(p for p in module.parameters() if p.requires_grad)]
            loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
            results[-1] += [out.detach(), *torch.autograd.grad(loss, leaves)]
    for found, expected in zip(*results, strict=True):
        if kind in FUSED and kernels != "reference":
            assert relative(found, expected) < 1e-5
        else:
            assert torch.equal(found, expected)
    with torch.no_grad(), Recorder() as recorder:
        embed(*given)
    assert recorder.ops == (["patch_embed"] if kind in FUSED and kernels != "reference" else [])


@in_turn(before=[True, False], kind=CONVOLUTIONS)
def test_a_convolution_of_an_accelerated_model(before: bool, kind: str, kernels: str) -> None:
    """timm's CrossViT, where patches of the second branch are 16 pixels wide."""
    if "kernel" in kind or kind in ("dilated", "padded", "padded by reflection", "overlapping", "not square"):
        sixteen = {
            "dilated": other(kernel_size=8, stride=16, dilation=2),
            "dilated, its stride as its kernel": other(kernel_size=16, stride=16, dilation=2, padding=8),
            "padded": other(kernel_size=16, stride=16, padding=1),
            "padded by reflection": other(kernel_size=16, stride=16, padding=3, padding_mode="reflect"),
            "overlapping": other(kernel_size=18, stride=16, padding=1),
            "not square": other(kernel_size=(16, 4), stride=(16, 16)),
        }
        change = sixteen[kind]
    else:
        change = CONVOLUTIONS[kind]
    model, plain = build("crossvit_9_240"), build("crossvit_9_240")
    x = images(model)
    if not before:
        accelerate(model, kernels, verbose=False)(x)
    for m in (model, plain):
        m.patch_embed[1].proj = change(m.patch_embed[1].proj).eval()
    if before:
        accelerate(model, kernels, verbose=False)
    with torch.no_grad():
        expected = plain(x)
        assert relative(model(x), expected) < 1e-5
        with Recorder() as recorder:
            model(x)
    assert kernels == "reference" or "layer_norm_mlp" in recorder.ops  # the blocks fuse on
    if kernels != "reference" and kind not in FUSED:
        assert recorder.ops.count("patch_embed") <= 1
    assert relative(build("crossvit_9_240")(x), expected) > 1e-3 or kind in UNCHANGED


@in_turn(
    kind=["a subclass", "weight-standardised", "pruned", "of a spectral norm", "hooked", "with a forward of its own"]
)
def test_a_convolution_of_our_model(kind: str, kernels: str) -> None:
    """As in timm's model with the same weights and the same change."""
    plain = timm_model("crossvit_tiny_240", depth=((1, 1, 0),), num_classes=7)
    model = crossvit.create_model("crossvit_tiny_240", depth=((1, 1, 0),), num_classes=7, kernels=kernels).eval()
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 240, 240, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        unchanged = plain(x)
        for m in (model, plain):
            m.patch_embed[0].proj = CONVOLUTIONS[kind](m.patch_embed[0].proj).eval()
        assert relative(model(x), plain(x)) < 1e-5
        assert relative(unchanged, plain(x)) > 1e-3
