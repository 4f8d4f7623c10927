"""`crossvit explain`, and the attention maps that it draws: they are the reference's softmax, and change nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from commands import command, photograph, save_small, small_model
from crossvit import FUSIONS
from crossvit.attention.drawing import overlay
from crossvit.attention.maps import attention_maps
from crossvit.attention.rollout import attention_rollout
from crossvit_kernels.nn import Attention, CrossAttention
from weights import CPU_BACKENDS, our_model

TOLERANCE = dict(rtol=2e-5, atol=1e-7)
MODELS: dict[str, dict[str, Any]] = {
    "cross_attention": {},
    "two layers": dict(depth=((1, 1, 2), (2, 1, 1))),
    "three layers, no blocks": dict(depth=((1, 1, 1), (0, 1, 3))),
    "dagger": dict(multi_conv=True),
    "not square": dict(image_size=(72, 108)),
    "no bias": dict(qkv_bias=False),
    "pooled": dict(global_pool="avg"),
    **{name: dict(fusion=name) for name in FUSIONS if name != "cross_attention"},
}


def pictures(model: nn.Module, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *model.image_size, generator=torch.Generator().manual_seed(1))


def recorded(model: nn.Module, images: Tensor) -> list[Tensor]:
    """softmax(q kᵀ / sqrt(d)) of the CLS tokens' attentions in plain PyTorch, every module called as a module, in the
    order in which `attention_maps` has them."""
    found: list[Tensor] = []
    last_blocks = (
        {id(blocks[-1].attn) for stage in model.blocks for blocks in stage.blocks if len(blocks)}
        if hasattr(model, "num_branches")
        else {id(block.attn) for block in model.blocks}
    )

    def self_attention(module: Attention, inputs: tuple[Tensor]) -> None:
        q, k, _ = module.qkv(inputs[0]).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
        probs = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1)
        if id(module) in last_blocks:
            found.append(probs[:, :, 0])
        elif id(module) in joint:
            lengths = joint[id(module)]
            found.extend(probs[:, :, sum(lengths[:b])] for b in range(len(lengths)))

    def cross_attention(module: CrossAttention, inputs: tuple[Tensor]) -> None:
        projected = module.wq(inputs[0]), module.wk(inputs[0])
        q, k = (y.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for y in projected)
        found.append((q[:, :, :1] @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1)[:, :, 0])

    stages = model.blocks if hasattr(model, "num_branches") else ()
    joint = {id(stage.fusion.attn): stage.lengths() for stage in stages if isinstance(stage, FUSIONS["all_attention"])}
    handles = []
    for module in model.modules():
        if isinstance(module, Attention | CrossAttention):
            # Every block calls what has a hook as a module.
            hook = self_attention if isinstance(module, Attention) else cross_attention
            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kernels", CPU_BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_the_weights_are_the_references(name: str, kernels: str) -> None:
    """Without keys, against softmax(q kᵀ) with them; each sums to 1; the shapes are those that are promised."""
    model = small_model(kernels=kernels, **MODELS[name])
    images = pictures(model)
    maps, expected = attention_maps(model, images), recorded(model, images)
    # The reference's are recorded branch by branch and fusion by fusion, as the maps are made.
    assert len(maps) == len(expected) > 0
    for found, reference in zip(maps, expected):
        assert found.weights.dtype == torch.float32
        torch.testing.assert_close(found.weights, reference, **TOLERANCE)
        torch.testing.assert_close(found.weights.sum(dim=-1), torch.ones(found.weights.shape[:2]))
        assert found.weights.shape[-1] == sum(1 + rows * columns for rows, columns in found.grids)
        for picture, grid in zip(found.pictures(), found.grids):
            assert picture.shape == (*found.weights.shape[:2], *grid)
    kinds = {found.kind for found in maps}
    assert kinds == {"self"} | {"cross_attention": {"cross"}, "all_attention": {"joint"}}.get(model.fusion, set())


def test_a_cross_attention_reads_the_other_branch() -> None:
    model = small_model()
    maps = attention_maps(model, pictures(model))
    assert [(m.kind, m.stage, m.branch, m.reads) for m in maps] == [
        *(("self", 0, 0, (0,)), ("self", 0, 1, (1,)), ("cross", 0, 0, (1,)), ("cross", 0, 1, (0,))),
        *(("self", 1, 0, (0,)), ("self", 1, 1, (1,)), ("cross", 1, 0, (1,)), ("cross", 1, 1, (0,))),
    ]
    assert [m.grids for m in maps[:4]] == [((6, 6),), ((4, 4),), ((4, 4),), ((6, 6),)]


@pytest.mark.parametrize("kernels", CPU_BACKENDS)
def test_of_a_single_branch(kernels: str) -> None:
    model = our_model("deit_tiny_patch16_224", image_size=64, embed_dim=48, depth=3, num_classes=3, kernels=kernels)
    images = pictures(model)
    maps, expected = attention_maps(model, images), recorded(model, images)
    assert [m.stage for m in maps] == [0, 1, 2]
    for found, reference in zip(maps, expected, strict=True):
        torch.testing.assert_close(found.weights, reference, **TOLERANCE)
    ((rollout,),) = attention_rollout(model, images)
    assert rollout.shape == (2, 4, 4)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_left_as_it_is(name: str) -> None:
    model = small_model(**MODELS[name])
    images = pictures(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.inference_mode():
        before = model(images)
    given = images.clone()
    attention_maps(model, images)
    attention_rollout(model, images)
    with torch.inference_mode():
        assert torch.equal(model(images), before)
    assert torch.equal(images, given)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_rollout_is_a_distribution(name: str) -> None:
    """What goes back to patches is positive and at most 1, the CLS tokens have the rest; it depends on the image."""
    model = small_model(**MODELS[name])
    images = pictures(model)
    rollout = attention_rollout(model, images)
    assert len(rollout) == 2
    for own in rollout:
        assert [tuple(x.shape[1:]) for x in own] == list(model.blocks[0].grids)
        total = sum(x.flatten(1).sum(dim=1) for x in own)
        assert ((total > 0.05) & (total <= 1 + 1e-5)).all()
        assert all((x >= 0).all() for x in own)
    mixes = model.fusion != "none"
    for b, own in enumerate(rollout):
        assert not torch.allclose(own[b][0], own[b][1], rtol=1e-3)
        assert bool(own[1 - b].any()) == mixes


def test_rollout_follows_the_maps() -> None:
    """One stage of one block each, with cross-attention, by hand."""
    model = small_model(depth=((1, 1, 0),))
    images = pictures(model, 1)
    own0, own1, cross0, _ = (m.weights.mean(dim=1)[0] for m in attention_maps(model, images))
    (to_small, to_large), _ = attention_rollout(model, images)
    behind = own0 / 2  # the first branch's CLS behind its block
    behind[0] += 0.5
    expected = behind * (0.5 + cross0[0] / 2)
    torch.testing.assert_close(to_small.flatten(), expected[1:], **TOLERANCE)
    # The patches it then reads are half themselves, and half what they read.
    assert to_large.sum() > cross0[1:].sum() / 4
    assert len(own1) == 17


def test_a_foreign_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be one of crossvit\.create_model's, got a Linear"):
        attention_maps(nn.Linear(2, 2), torch.zeros(1, 3, 4, 4))
    model = small_model()
    model.blocks[0].blocks[0][0].attn.qkv = nn.Sequential(nn.Linear(48, 144))
    with pytest.raises(TypeError, match=r"need nn\.Linear as an attention's projection, got Sequential"):
        attention_maps(model, pictures(model))

    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.blocks[0].blocks[0][0].attn.qkv = Twice(48, 144)
    with pytest.raises(TypeError, match=r"need nn\.Linear as an attention's projection, got Twice"):
        attention_maps(model, pictures(model))


def test_the_overlay_is_warm_where_the_weight_is() -> None:
    weights = torch.zeros(4, 4)
    weights[0, 3] = 1
    drawn = overlay(Image.new("RGB", (40, 40), "grey"), weights)
    assert (drawn.shape, drawn.dtype) == ((40, 40, 3), np.uint8)
    assert int(drawn[2, 37, 0]) > 2 * int(drawn[37, 2, 0])


@pytest.mark.parametrize("fusion", ["cross_attention", "all_attention"])
@pytest.mark.parametrize("options", [[], ["--heads", "--all-stages"]])
def test_the_command_draws(fusion: str, options: list[str], tmp_path: Path) -> None:
    checkpoint = save_small(tmp_path, fusion=fusion, depth=((1, 1, 0), (1, 1, 2)))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    photograph("coffee").save(tmp_path / "a" / "x.jpg")
    photograph("cat").save(tmp_path / "b" / "x.jpg")
    (tmp_path / "b" / "y.jpg").write_text("not a picture")
    out = tmp_path / "drawn"
    done = command("explain", tmp_path / "a", tmp_path / "b", "--checkpoint", checkpoint, "--output", out, *options)
    assert done.status == 1
    assert f"{tmp_path / 'b' / 'y.jpg'}  error: no image" in done.err
    assert {path.name for path in out.iterdir()} == {"x.png", "x-2.png"}
    assert done.out.split() == [str(out / "x.png"), str(out / "x-2.png")]
    for path in out.iterdir():
        drawn = np.asarray(Image.open(path).convert("RGB"))
        assert min(drawn.shape[:2]) > 300
        assert drawn.std() > 20


def test_where_the_pictures_go(tmp_path: Path) -> None:
    """Into a folder, made with those above it, where a PNG of the same name is replaced and all else stays; neither a
    picture's name nor a file is one, and then no model is read."""
    checkpoint, out = save_small(tmp_path, depth=((1, 1, 0),)), tmp_path / "new" / "drawn"
    photograph("cat").save(tmp_path / "cat.jpg")
    shared = ("--checkpoint", checkpoint, "--workers", "0")
    assert command("explain", tmp_path / "cat.jpg", *shared, "--output", out).status == 0
    (out / "cat.png").write_text("an old one")
    (out / "notes.txt").write_text("kept")
    assert command("explain", tmp_path / "cat.jpg", *shared, "--output", out).status == 0
    assert Image.open(out / "cat.png").format == "PNG"
    assert (out / "notes.txt").read_text() == "kept"
    (tmp_path / "file").touch()
    for wrong, reason in (("x.png", "expected a folder, for a PNG of each picture"), ("file", "Not a directory")):
        path = tmp_path / wrong
        done = command("explain", tmp_path / "cat.jpg", "--checkpoint", "nothing.pth", "--output", path)
        assert (done.status, done.out) == (2, "")
        assert done.err.startswith(f"crossvit explain: error: --output {path}: {reason}")
    assert not (tmp_path / "x.png").exists()
