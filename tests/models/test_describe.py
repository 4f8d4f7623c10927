"""describe(): the paper's parameters and multiply-adds, and those that PyTorch counts in timm's models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import crossvit
from weights import timm_model

# PyTorch's counter knows the attention's own matrix products, not its fused CPU kernel.
MATH = SDPBackend.MATH
# parameters; giga multiply-adds, attention included, of the paper's Tables 2 and 4 (one digit there, three from the
# shapes)
CROSSVIT = dict(
    crossvit_tiny_240=(7_014_800, 1.563),
    crossvit_small_240=(26_856_272, 5.616),
    crossvit_base_240=(105_025_232, 21.191),
    crossvit_9_240=(8_553_296, 1.841),
    crossvit_15_240=(27_528_464, 5.791),
    crossvit_18_240=(43_271_408, 9.031),
    crossvit_9_dagger_240=(8_776_592, 1.979),
    crossvit_15_dagger_240=(28_209_008, 6.112),
    crossvit_18_dagger_240=(44_266_976, 9.473),
    crossvit_15_dagger_408=(28_500_080, 21.399),
    crossvit_18_dagger_408=(44_606_560, 32.409),
    crossvit_18_dagger_504=(44_887_904, 56.602),
)
# mega parameters and giga multiply-adds of Tables 2 and 8
DEIT = dict(
    deit_tiny_patch16_224=(5.7, 1.3),
    deit_small_patch16_224=(22.1, 4.6),
    deit_base_patch16_224=(86.6, 17.6),
    deit_9_224=(6.4, 1.4),
    deit_9_dagger_224=(6.6, 1.5),
    deit_15_224=(22.9, 4.9),
    deit_15_dagger_224=(23.5, 5.1),
    deit_18_224=(37.1, 7.8),
    deit_18_dagger_224=(37.9, 8.1),
)


def test_every_model_is_in_a_table() -> None:
    """No name without its figures."""
    assert set(crossvit.list_models()) == {*CROSSVIT, *DEIT}


@pytest.mark.parametrize("name", CROSSVIT)
def test_crossvit_figures(name: str) -> None:
    """Parameters to the last one, multiply-adds to the third digit of the giga."""
    parameters, multiply_adds = CROSSVIT[name]
    with torch.device("meta"):
        model = crossvit.create_model(name)
    description = model.describe()
    assert description.parameters == sum(p.numel() for p in model.parameters()) == parameters
    assert description.multiply_adds / 1e9 == pytest.approx(multiply_adds, abs=0.0005)


@pytest.mark.parametrize("name", DEIT)
def test_single_branch_figures(name: str) -> None:
    """The baselines cost what the paper's tables say."""
    parameters, multiply_adds = DEIT[name]
    with torch.device("meta"):
        model = crossvit.create_model(name)
    description = model.describe()
    assert description.parameters == sum(p.numel() for p in model.parameters())
    assert description.parameters / 1e6 == pytest.approx(parameters, abs=0.06)
    assert description.multiply_adds / 1e9 == pytest.approx(multiply_adds, abs=0.06)


@pytest.mark.parametrize(
    "name", ["crossvit_9_240", "crossvit_tiny_240", "crossvit_9_dagger_240", "deit_tiny_patch16_224"]
)
def test_multiply_adds_are_pytorchs(name: str) -> None:
    """Half the FLOPs that PyTorch's own counter sees in timm's model, to the last one."""
    with torch.device("meta"):
        description = crossvit.create_model(name).describe()
    theirs = timm_model(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(MATH):
        theirs(
            torch.zeros(1, 3, *[int(x) for x in theirs.patch_embed[0].img_size] if "crossvit" in name else (224, 224))
        )
    assert description.multiply_adds * 2 == counter.get_total_flops()


def test_table() -> None:
    """As text: a title, a row per part, and the sums."""
    with torch.device("meta"):
        description = crossvit.create_model("crossvit_15_dagger_240", fusion="all_attention", num_classes=0).describe()
    text = str(description)
    assert text.splitlines()[0] == "crossvit_15_dagger_240, image 240×240, 0 classes"
    assert "fusion: all_attention" in text
    assert f"{description.parameters:,}" in text.splitlines()[-1]
    assert f"{description.multiply_adds / 1e9:.4f}" in text.splitlines()[-1]
    assert sum(part.attention for part in description.parts) == description.attention < description.multiply_adds
    assert repr(description) == text


@pytest.mark.parametrize("fusion", crossvit.FUSIONS)
def test_fusion_multiply_adds_are_pytorchs(fusion: str) -> None:
    """Every scheme's own count is half of what PyTorch's counter sees in its reference (which projects keys and
    values), three branches too.
    """
    model = crossvit.create_model(
        "crossvit_tiny_240",
        fusion=fusion,
        kernels="reference",
        image_size=48,
        img_scale=(1, 1, 1),
        patch_size=(8, 12, 16),
        embed_dim=(32, 64, 48),
        num_heads=(2, 2, 2),
        mlp_ratio=(2, 2, 2),
        depth=((1, 1, 1, 0), (1, 1, 1, 2)),
        num_classes=7,
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(MATH):
        features = model.forward_features(torch.zeros(1, 3, 48, 48))
        model.forward_head(features)
    assert model.describe().multiply_adds * 2 == counter.get_total_flops()


@pytest.mark.parametrize("gradients", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", ["crossvit_9_240", "deit_tiny_patch16_224"])
def test_pytorchs_flop_counter_takes_a_whole_model(name: str, gradients: Callable[[], Any]) -> None:
    """Its module tracker hooks every module, with gradients or without."""
    model = crossvit.create_model(name, num_classes=0)
    height, width = model.image_size
    with gradients(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, height, width))
    assert 0 < counter.get_total_flops() <= 2 * model.describe().multiply_adds
