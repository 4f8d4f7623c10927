"""accelerate: timm's models on the kernels, in place, with the same results; what is not what it seems stays."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.utils import parametrize

import crossvit
import crossvit_kernels
from crossvit_kernels import accelerate, acceleration, restore
from crossvit_kernels.swaps import Swap
from rounding import Rounded
from timm_models import CROSSVITS, OTHERS, build, images, results, swapped


@pytest.mark.parametrize("name", CROSSVITS + OTHERS)
def test_logits_of_every_model(name: str) -> None:
    model = build(name, whole=True)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        assert swapped(accelerate(model, verbose=False))
        found = model(x)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["crossvit_9_240", "crossvit_9_dagger_240", *OTHERS])
def test_errors_of_logits_and_gradients_are_those_of_timm(name: str) -> None:
    """Against float64, of float32, by the rule for an op: the rms error is at most twice that of timm's formulas in
    simulated arithmetic, or timm's own where that is larger (its modules are in both models), and an ulp.

    Over several models: where tokens share a large part, the sum over them in the gradient of a fusion's query cancels,
    and multiplies the few roundings before it by so much that in one model either side's error is a matter of luck.
    """
    squares: dict[str, list[list[Tensor]]] = {}
    for seed in range(4):
        model = build(name, seed)
        x = images(model)
        exact = results(copy.deepcopy(model).double(), x.double())
        plain = results(model, x)
        with Rounded():
            simulated = results(model, x)
        found = results(accelerate(model, verbose=False), x)
        assert found.keys() == plain.keys() == exact.keys()
        for key, value in exact.items():
            off = [(r[key].double() - value).square().mean() for r in (found, plain, simulated)]
            scale = value.square().mean()
            if scale < 1e6 * off[2]:  # zero by mathematics, as the gradient of a key's bias is
                scale = torch.ones(())
            squares.setdefault(key, []).append([error / scale for error in off])
    ulp = torch.finfo(torch.float32).eps
    for key, rows in squares.items():
        error, plain_error, simulated_error = (torch.stack(side).mean().sqrt() for side in zip(*rows))
        assert error <= 2 * max(plain_error, simulated_error) + ulp, key


@pytest.mark.parametrize("name", ["crossvit_9_240", *OTHERS])
def test_everything_stays_where_it_is_and_restore_undoes_it(name: str) -> None:
    model = build(name)
    x = images(model)
    called = []
    first = next(m for n, m in model.named_modules() if type(m).__name__.endswith("Block"))
    first.register_forward_hook(lambda *_: called.append("hook"))
    expected = results(model, x)
    called.clear()
    kinds = {n: type(m) for n, m in model.named_modules()}
    parameters = dict(model.named_parameters())
    contents = {n: set(m.__dict__) for n, m in model.named_modules()}
    assert accelerate(model, verbose=False) is model
    results(model, x)
    assert called
    assert all(parameters[n] is p for n, p in model.named_parameters())
    assert list(model.state_dict()) == list(build(name).state_dict())
    assert all(isinstance(m, kinds[n]) for n, m in model.named_modules())
    assert not model.training
    assert restore(model) is model
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == contents
    again = results(model, x)
    assert all(torch.equal(again[key], value) for key, value in expected.items())


@pytest.mark.skipif(not crossvit_kernels.backends.available("cpu"), reason="there are no C++ kernels")
def test_images_for_a_stem_of_convolutions_are_resized_by_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("crossvit_9_dagger_240")
    x = images(model)
    expected = model(x)
    accelerate(model, "cpu", verbose=False)
    assert acceleration(model).swapped[""] == "CrossVit"
    monkeypatch.setattr(nn.functional, "interpolate", None)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    model.patch_embed[1].proj = nn.Sequential(Doubled(), model.patch_embed[1].proj)
    model(x)
    model.patch_embed[1] = nn.Identity()
    with pytest.raises(TypeError, match="not callable"):  # timm's own forward again
        model(x)
    assert "patch_embed.1 is torch.nn.modules.linear.Identity" in acceleration(model).left[""]


def lora(block: Block) -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.up = base, nn.Linear(base.in_features, base.out_features)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(x)

    block.attn.qkv = Adapted(block.attn.qkv)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def quantised(block: Block) -> None:
    block.mlp = torch.ao.quantization.quantize_dynamic(block.mlp, {nn.Linear})


def own_forward(block: Block) -> None:
    block.norm2.forward = lambda x: x * 2  # type: ignore[method-assign]


CHANGES: dict[str, tuple[Callable[[Block], Any], str]] = {
    "an adapter": (lora, "attn.qkv is .*Adapted"),
    "a parametrisation": (
        lambda block: parametrize.register_parametrization(block.mlp.fc2, "weight", Doubled()),
        "mlp.fc2 is .*ParametrizedLinear",
    ),
    "a quantised child": (quantised, "mlp.fc1 is .*quantized.*Linear"),
    "a hook": (lambda block: block.attn.proj.register_forward_hook(lambda m, i, o: o * 2), "attn.proj has a hook"),
    "a hook before": (lambda block: block.mlp.act.register_forward_pre_hook(lambda m, i: None), "mlp.act has a hook"),
    "a forward of its own": (own_forward, "norm2 has a forward of its own"),
    "another activation": (lambda block: setattr(block.mlp, "act", nn.GELU("tanh")), "mlp.act is GELU by tanh"),
    "another norm": (lambda block: setattr(block, "norm1", nn.Identity()), "norm1 is .*Identity"),
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_what_is_not_what_it_seems_runs_as_it_is_and_is_named(change: str, before: bool) -> None:
    """A change made before is left alone; one made after is noticed by the next call; the block's other half is fused
    still."""
    apply, why = CHANGES[change]
    model, same = build("deit_tiny_patch16_224"), build("deit_tiny_patch16_224")
    x = images(model)
    for m in (model, same):
        if m is model and not before:
            accelerate(m, verbose=False)
            m(x)
        torch.manual_seed(3)
        apply(m.blocks[1])
    if before:
        accelerate(model, verbose=False)
    assert swapped(model) == ["blocks.0", "blocks.1", "blocks.2"]
    left = acceleration(model).left["blocks.1"]
    assert re.search(why, left), left
    with torch.no_grad():
        expected, found = same(x), model(x)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_unknown_modules_and_unusual_options_are_named() -> None:
    class Mine(Block):
        pass

    model = nn.Sequential(Mine(32, 2), Block(32, 2), Block(32, 2, qk_norm=True), nn.Linear(32, 3))
    report = acceleration(accelerate(model, verbose=False))
    assert report.swapped == {"1": "Block", "2": "Block"}
    assert report.left.keys() == {"0", "2"}
    assert report.left["0"].endswith("Mine is a subclass of Block, and may compute something else")
    norm = "attention half: attn.q_norm is timm.layers.norm.LayerNorm, where Identity is expected"
    assert report.left["2"] == norm
    assert report.others == {"3": "torch.nn.modules.linear.Linear"}
    assert str(report).splitlines()[1:] == [
        "  1 x Block (1): attention half, MLP half",
        "  1 x Block (2): MLP half",
        "called as before, since something stands in the way of the kernels:",
        f"  0: {report.left['0']}",
        f"  1 x Block (2): {norm}",
        "unchanged, as there are no kernels for these: 3",
    ]


@pytest.mark.parametrize(
    "name, counts, others",
    [
        ("deit_tiny_patch16_224", {"Block": ["attention half", "MLP half"]}, ["patch_embed", "norm", "head"]),
        (
            "crossvit_9_240",
            {
                "CrossVit": ["patch embedding"],
                "MultiScaleBlock": ["projections", "cross-attention"],
                "Block": ["attention half", "MLP half"],
                "CrossAttentionBlock": ["class attention"],
            },
            [],
        ),
        (
            "cait_xxs24_224",
            {"LayerScaleBlock": ["MLP half"], "LayerScaleBlockClassAttn": ["class attention", "MLP half"]},
            ["patch_embed", "norm", "head"],
        ),
    ],
)
def test_the_report_lists_no_failure_where_nothing_failed(
    name: str, counts: dict[str, list[str]], others: list[str]
) -> None:
    """What was never a candidate, a final norm or a head, is named apart, and what of each module is fused is said."""
    report = acceleration(accelerate(build(name), verbose=False))
    assert report.left == {}
    assert list(report.others) == others
    assert {cls: report.fused[n] for n, cls in report.swapped.items()} == counts
    text = str(report)
    first = f"{len(report.swapped)} modules run on the kernels (kernels='auto': "
    assert text.startswith(first + crossvit_kernels.backends.in_words("auto", "cpu") + " on the CPU)")
    assert "called as before" not in text
    assert all(f" x {cls} (" in text and ", ".join(parts) in text for cls, parts in counts.items())


def test_the_report_of_a_model_without_candidates() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    report = acceleration(accelerate(model, verbose=False))
    assert (report.swapped, report.left) == ({}, {})
    lines = str(report).splitlines()
    assert lines[0] == "no modules run on the kernels"
    assert lines[1].startswith("there are none for its classes; there are for timm's Block, MultiScaleBlock, ")
    assert len(lines) == 2


def test_the_report_goes_through_logging_where_that_is_set_up(
    capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """At level INFO of the module's logger; printed where nothing would show it; neither with verbose=False."""
    model = build("deit_tiny_patch16_224")
    accelerate(model)
    assert capsys.readouterr().out == f"{acceleration(model)}\n"
    with caplog.at_level("INFO", "crossvit_kernels"):
        accelerate(model)
        accelerate(model, verbose=False)
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("crossvit_kernels.accelerate", "INFO", str(acceleration(model)))
    ]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["crossvit_9_240", *OTHERS])
def test_training_draws_the_same_random_numbers(name: str) -> None:
    """Drop path and every dropout: from one seed the same samples and elements are dropped as without the kernels."""
    rates = {"proj_drop_rate": 0.1, "attn_drop_rate": 0.1}
    for options in (
        {"drop_path_rate": 0.3},
        {"drop_path_rate": 0.3, **rates},
        {"pos_drop_rate": 0.2, "drop_rate": 0.2},
    ):
        model = build(name, **options).train()
        x = images(model, 4)
        torch.manual_seed(5)
        expected = model(x)
        accelerate(model, verbose=False)
        torch.manual_seed(5)
        found = model(x)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_layer_scale_and_masks() -> None:
    torch.manual_seed(0)
    block, x = Block(48, 3, init_values=0.2, drop_path=0.4, qkv_bias=True), torch.randn(3, 7, 48)
    accelerated = accelerate(copy.deepcopy(block), verbose=False)
    mask = torch.zeros(7, 7).masked_fill(torch.rand(7, 7) > 0.7, -1e4)
    for train in (True, False):
        for options in ({}, {"attn_mask": mask}, {"is_causal": True}):
            block.train(train)
            accelerated.train(train)
            torch.manual_seed(1)
            expected = block(x, **options)
            torch.manual_seed(1)
            torch.testing.assert_close(accelerated(x, **options), expected, rtol=1e-5, atol=1e-5)


def test_tied_and_frozen_parameters_train() -> None:
    model = build("deit_tiny_patch16_224")
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    model.blocks[0].attn.requires_grad_(False)
    x = images(model)
    expected = results(model, x)
    found = results(accelerate(model, verbose=False), x)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4 * value.abs().max().item(), msg=key)


def test_again_with_other_kernels_and_ours() -> None:
    model = accelerate(build("deit_tiny_patch16_224"), verbose=False)
    accelerate(model, "reference", verbose=False)
    assert {m._crossvit_kernels for m in model.modules() if isinstance(m, Swap)} == {"reference"}
    ours = crossvit.create_model("crossvit_tiny_240", kernels="reference")
    accelerate(ours, "auto", verbose=False)
    assert {m.kernels for m in ours.modules() if hasattr(m, "kernels")} == {"auto"}
    assert acceleration(ours).swapped
    restore(ours)
    assert {m.kernels for m in ours.modules() if hasattr(m, "kernels")} == {"reference"}


def test_bad_input_changes_nothing(capsys: pytest.CaptureFixture) -> None:
    model = build("deit_tiny_patch16_224")
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        accelerate("model")  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        restore(3)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="expected 'auto' or one of"):
        accelerate(model, "fastest")
    assert not swapped(model)
    accelerate(model)
    assert "  3 x Block (blocks.0, blocks.1, blocks.2): " in capsys.readouterr().out
    model.blocks[0].__class__ = type("Wrapped", (type(model.blocks[0]),), {})
    with pytest.raises(TypeError, match=r"blocks\.0: its class was changed to Wrapped"):
        restore(model)
    assert crossvit_kernels.acceleration(model).swapped["blocks.0"] == "Block"
