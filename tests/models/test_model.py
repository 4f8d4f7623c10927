"""The models: timm's numbers, any size, and all that timm's users expect of a model."""

import copy
import io
import math
import pickle

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import crossvit
from benchmarks.photographs import photographs
from crossvit.models.branch_images import branch_size
from crossvit.models.variants import ALIASES
from crossvit_kernels import backends
from crossvit_kernels.nn import KernelModule
from weights import CPU_BACKENDS, TIMM_NAMES, our_model, relative, timm_model

TOLERANCE = 5e-6  # float32, relative to the largest logit
TOKENS = 2e-5  # likewise of tokens: timm's own, behind its resize, are 5e-6 from float64
TINY = "crossvit_tiny_240"
SHALLOW = dict(depth=((1, 2, 0), (1, 1, 0)), num_classes=10)  # timm's tiny, for what needs no depth
SMALL = dict(image_size=48, img_scale=(1.0, 1.0), embed_dim=(32, 64), num_heads=(2, 2), depth=((1, 2, 0), (1, 1, 0)))


def small(seed: int = 0, **arguments: object) -> crossvit.CrossViT:
    return our_model(TINY, seed=seed, num_classes=10, **(SMALL | arguments))


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_logits_are_timms(name: str) -> None:
    """On photographs, from timm's random weights, on every backend; the state dict has timm's names in timm's order and
    goes both ways.
    """
    theirs = timm_model(name)
    ours = our_model(name, theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    images = photographs(1, ours.image_size)
    with torch.no_grad():
        expected = theirs(images)
        for kernels in CPU_BACKENDS:
            ours.set_kernels(kernels)
            assert relative(ours(images), expected) < TOLERANCE, kernels


@pytest.mark.parametrize("kernels", CPU_BACKENDS)
@pytest.mark.parametrize("options", [{}, {"drop_path_rate": 0.5}], ids=["plain", "drop-path"])
def test_gradients_are_timms(options: dict[str, float], kernels: str) -> None:
    """The loss and the gradient of every parameter, in training, with the same random paths dropped; the keys' biases
    get none.
    """
    theirs = timm_model(TINY, img_size=120, **SHALLOW, **options).train()
    ours = our_model(TINY, theirs, image_size=120, kernels=kernels, **SHALLOW, **options).train()
    images, labels = photographs(3, 120), torch.tensor([1, 7, 3])
    losses = []
    for model in (theirs, ours):
        torch.manual_seed(0)
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        want = expected[name].grad
        if name.endswith("wk.bias"):
            assert parameter.grad.abs().max() < 1e-7
        elif want.abs().max() > 0:
            assert relative(parameter.grad, want) < 1e-4, name


@pytest.mark.parametrize("kernels", CPU_BACKENDS)
def test_dropout_is_timms(kernels: str) -> None:
    """Dropout of positions, projections, attention and head falls where timm's does from the same seed, on top of the
    drop path.
    """
    rates = dict(drop_rate=0.2, pos_drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.3)
    theirs = timm_model(TINY, img_size=120, **SHALLOW, **rates)
    ours = our_model(TINY, theirs, image_size=120, kernels=kernels, **SHALLOW, **rates)
    images = photographs(2, 120)
    for training in (True, False):
        outputs = []
        for model in (theirs, ours):
            torch.manual_seed(0)
            outputs.append(model.train(training)(images).detach())
        assert relative(outputs[1], outputs[0]) < TOLERANCE, training


def test_names() -> None:
    """timm's eleven names and the paper's 18† at 480 are there; the authors' names mean the same models; others raise
    and suggest.
    """
    names = crossvit.list_models("crossvit_*")
    assert set(names) == {*TIMM_NAMES, "crossvit_18_dagger_504"}
    assert ALIASES["crossvit_15_dagger_384"] == "crossvit_15_dagger_408"
    assert ALIASES["crossvit_18_dagger_480"] == "crossvit_18_dagger_504"
    authors = {"tiny_224", "small_224", "base_224", "9_224", "15_224", "18_224", "9_dagger_224", "15_dagger_224"}
    authors |= {"18_dagger_224", "15_dagger_384", "18_dagger_384", "18_dagger_480"}
    assert {f"crossvit_{name}" for name in authors} == {name for name in ALIASES if name.startswith("crossvit_")}
    with torch.device("meta"):
        assert crossvit.create_model("crossvit_9_224").variant == "crossvit_9_240"
        assert crossvit.create_model("crossvit_9_240.in1k").variant == "crossvit_9_240"
    with pytest.raises(ValueError, match="unknown model 'crossvit_9_dager_240': did you mean crossvit_9_dagger_240"):
        crossvit.create_model("crossvit_9_dager_240")


@pytest.mark.parametrize("size", [360, 480, (240, 480), (360, 240)])
def test_sizes_of_timm(size: int | tuple[int, int]) -> None:
    """Where timm's constructor gives a model that runs, ours computes the same."""
    theirs = timm_model(TINY, img_size=size, **SHALLOW)
    ours = our_model(TINY, theirs, image_size=size, **SHALLOW)
    images = photographs(1, size)
    with torch.no_grad():
        assert relative(ours(images), theirs(images)) < TOLERANCE


@pytest.mark.parametrize("kernels", CPU_BACKENDS)
@pytest.mark.parametrize("name", [TINY, "crossvit_9_dagger_240"])
@pytest.mark.parametrize("size", [224, 256, (384, 288), 512, (100, 333)])
def test_sizes_timm_fails_on(size: int | tuple[int, int], name: str, kernels: str) -> None:
    """Any size runs: each branch has the multiple of its patch that is nearest to its share, and logits depend on every
    corner's pixels.
    """
    model = our_model(name, image_size=size, kernels=kernels, **SHALLOW)
    height, width = model.image_size
    for b, (embed, scale, patch) in enumerate(zip(model.patch_embed, (1.0, 224 / 240), (12, 16))):
        assert embed.image_size == branch_size((height, width), scale, patch)
        assert all(abs(mine - side * scale) <= patch / 2 for mine, side in zip(embed.image_size, (height, width)))
        grid = embed.image_size[0] // patch, embed.image_size[1] // patch
        assert getattr(model, f"pos_embed_{b}").shape[1] == 1 + math.prod(grid)
    images = photographs(1, model.image_size).repeat(2, 1, 1, 1)
    images[1, :, -2:, -2:] += 3
    with torch.no_grad():
        logits = model(images)
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])


def test_input_is_checked() -> None:
    """Images of another size, dtype or channel count raise, and the message says what came and what to do."""
    model = small()
    with pytest.raises(
        ValueError, match=r"images are 50×60 but this model takes 48×48: resize them, or create .*image_size=\(50, 60\)"
    ):
        model(torch.zeros(1, 3, 50, 60))
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got \(1, 4, 48, 48\)"):
        model(torch.zeros(1, 4, 48, 48))
    with pytest.raises(ValueError, match=r"got \(3, 48, 48\)"):
        model(torch.zeros(3, 48, 48))
    with pytest.raises(TypeError, match=r"floating point tensor, got torch\.uint8"):
        model(torch.zeros(1, 3, 48, 48, dtype=torch.uint8))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"fusion": "sum"}, ValueError, "fusion must be one of .*'pairwise'.*got 'sum'"),
        ({"global_pool": "max"}, ValueError, "global_pool must be one of .*got 'max'"),
        ({"num_classes": -1}, ValueError, "num_classes must be at least 0, got -1"),
        ({"in_chans": 0}, ValueError, "in_chans must be at least 1, got 0"),
        ({"image_size": 0}, ValueError, "image_size must be positive, got 0"),
        ({"image_size": (240, 240, 3)}, TypeError, "image_size must be an int or"),
        ({"drop_path_rate": 1.5}, ValueError, "drop_path_rate must be between 0 and 1, got 1.5"),
        ({"drop_rate": -0.1}, ValueError, "drop_rate must be between 0 and 1, got -0.1"),
        ({"num_heads": (5, 6)}, ValueError, "num_heads must divide the width, got num_heads=5 for dim=96"),
        ({"embed_dim": (96,)}, ValueError, "embed_dim must have a positive entry for each of the 2 branches"),
        ({"embed_dim": (96, -3)}, ValueError, "embed_dim must have a positive entry"),
        ({"patch_size": 16}, TypeError, "patch_size must be a sequence with an entry per branch, got 16"),
        ({"patch_size": ()}, ValueError, "patch_size must have a positive entry per branch"),
        ({"depth": ((1, 4),)}, ValueError, "depth must have rows of 2 branch depths and the fusion's"),
        ({"patch_size": (8, 16), "multi_conv": True}, ValueError, r"one of \(12, 16\), got 8"),
        ({"pretrained": True}, TypeError, "no argument pretrained .weights are a checkpoint"),
        ({"img_size": 224}, TypeError, "no argument img_size .the input's size is image_size.; it has .*image_size"),
        ({"kernels": "fast"}, ValueError, "fast"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    """A bad argument raises the right kind of error, which names it, what came and what was expected."""
    with torch.device("meta"), pytest.raises(error, match=message):
        crossvit.create_model(TINY, **arguments)


def test_timms_18_takes_overrides() -> None:
    """Overriding what the name fixes works on every model (timm's crossvit_18_240 raises TypeError)."""
    with torch.device("meta"):
        model = crossvit.create_model("crossvit_18_240", depth=((1, 1, 0),), embed_dim=(64, 128), num_heads=(2, 2))
    assert model.num_features == 192
    assert len(model.blocks) == 1


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_features_and_pooling_are_timms(pool: str) -> None:
    """forward_features, forward_head, pre-logits and the headless model, with token and average pooling."""
    theirs = timm_model(TINY, global_pool=pool, **SHALLOW)
    ours = our_model(TINY, theirs, global_pool=pool, **SHALLOW)
    images = photographs(1, 240)
    with torch.no_grad():
        expected, features = theirs.forward_features(images), ours.forward_features(images)
        assert all(relative(mine, want) < TOKENS for mine, want in zip(features, expected, strict=True))
        assert relative(ours(images), theirs(images)) < TOLERANCE
        assert relative(ours.forward_head(features), theirs(images)) < TOLERANCE
        pooled = theirs.forward_head(expected, pre_logits=True)
        assert relative(ours.forward_head(features, pre_logits=True), pooled) < TOKENS
        ours.reset_classifier(0)
        assert relative(ours(images), pooled) < TOKENS
    assert ours.num_features == pooled.shape[1]
    with pytest.raises(ValueError, match="num_classes=0"):
        ours.forward_branches(images)


def test_branch_logits() -> None:
    """The branches' own logits are those of their own heads, and their mean is the model's output."""
    model = small()
    images = photographs(2, 48)
    with torch.no_grad():
        branches = model.forward_branches(images)
        assert len(branches) == 2
        assert relative(torch.stack(branches).mean(0), model(images)) < 1e-6
        features = model.forward_features(images)
        for logits, x, head in zip(branches, features, model.head):
            assert relative(logits, head(x[:, 0])) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": 2, "norm": True},
        {"indices": [0, -1], "output_fmt": "NLC", "intermediates_only": True},
        {"indices": [1, 3], "stop_early": True},
    ],
)
def test_intermediates_are_timms(options: dict[str, object]) -> None:
    """forward_intermediates gives timm's tensors, in timm's order and layout, for all of timm's options."""
    theirs = timm_model(TINY, **SHALLOW)
    ours = our_model(TINY, theirs, **SHALLOW)
    images = photographs(1, 240)
    with torch.no_grad():
        expected, found = (model.forward_intermediates(images, **options) for model in (theirs, ours))
    if not options.get("intermediates_only"):
        assert all(relative(mine, want) < TOKENS for mine, want in zip(found[0], expected[0], strict=True))
        expected, found = expected[1], found[1]
    assert all(relative(mine, want) < TOKENS for mine, want in zip(found, expected, strict=True))
    assert [info["num_chs"] for info in ours.feature_info] == [info["num_chs"] for info in theirs.feature_info]
    assert [info["reduction"] for info in ours.feature_info] == [info["reduction"] for info in theirs.feature_info]


@pytest.mark.parametrize("indices", [0, 7, [6], []])
def test_intermediate_indices_are_checked(indices: int | list[int]) -> None:
    """Indices outside the features raise."""
    with pytest.raises(ValueError, match="indices"):
        our_model(TINY).forward_intermediates(torch.zeros(1, 3, 240, 240), indices)


def test_crop_scale_is_timms() -> None:
    """crop_scale=True cuts the small image out of the centre instead of resizing."""
    theirs = timm_model(TINY, crop_scale=True, **SHALLOW)
    ours = our_model(TINY, theirs, crop_scale=True, **SHALLOW)
    images = photographs(1, 240)
    with torch.no_grad():
        assert relative(ours(images), theirs(images)) < TOLERANCE


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"])
def test_single_branch_is_timms(name: str) -> None:
    """The baselines of the paper's Table 2 compute what timm's DeiT does, from its state dict; features and gradients'
    path too.
    """
    theirs = timm_model(name, num_classes=10)
    ours = our_model(name, theirs, num_classes=10)
    images = photographs(1, 224)
    with torch.no_grad():
        expected = theirs(images)
        for kernels in CPU_BACKENDS:
            ours.set_kernels(kernels)
            assert relative(ours(images), expected) < TOLERANCE, kernels
        assert relative(ours.forward_features(images), theirs.forward_features(images)) < TOKENS
        for mine, want in zip(*(model.forward_intermediates(images, [0, 5], norm=True)[1] for model in (ours, theirs))):
            assert relative(mine, want) < TOKENS


def test_single_branch_options() -> None:
    """A † baseline at a size that 16 does not divide, average pooling, gradient checkpointing, features; a fusion has
    nothing to fuse.
    """
    options = dict(image_size=(70, 50), embed_dim=64, depth=2, num_heads=2, global_pool="avg", num_classes=5)
    model = our_model("deit_9_dagger_224", **options)
    assert model.patch_embed.grid_size == (4, 3)
    images = photographs(2, (70, 50))
    expected = model(images)
    assert relative(model.forward_head(model.forward_features(images)), expected) < 1e-6
    model.set_grad_checkpointing()
    model.train()(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.reset_classifier(0)
    assert model(images).shape == (2, 64)
    with pytest.raises(ValueError, match="fusion='none' needs branches"):
        crossvit.create_model("deit_9_224", fusion="none")


def test_drop_path_rates_are_timms() -> None:
    """Every block and fusion layer has the rate it has in timm; a branch of small patches deeper than the other gets
    rates too.
    """
    with torch.device("meta"):
        theirs = timm.create_model("crossvit_15_240", drop_path_rate=0.1)
        ours = crossvit.create_model("crossvit_15_240", drop_path_rate=0.1)
        deeper = crossvit.create_model(TINY, depth=((4, 1, 0), (4, 1, 0)), drop_path_rate=0.7)
    for stage, want in zip(ours.blocks, theirs.blocks):
        for blocks, wanted in zip(stage.blocks, want.blocks):
            assert [b.drop_path for b in blocks] == pytest.approx(
                [getattr(b.drop_path1, "drop_prob", 0) for b in wanted]
            )
        assert [f.drop_path for f in stage.fusion] == pytest.approx([f.drop_path.drop_prob for f in want.fusion])
    assert [b.drop_path for b in deeper.blocks[1].blocks[0]] == pytest.approx([0.4, 0.5, 0.6, 0.7])
    assert [b.drop_path for b in deeper.blocks[1].blocks[1]] == pytest.approx([0.4])
    assert [f.drop_path for f in deeper.blocks[1].fusion] == pytest.approx([0.7, 0.7])


def test_initial_weights() -> None:
    """The authors' initial weights: deviation 0.02 everywhere, heads, CLS tokens and positions too, biases 0, norms 1;
    a new head as well.
    """
    torch.manual_seed(0)
    model = crossvit.create_model(TINY, depth=((1, 1, 0),))
    model.reset_classifier(500)
    for name, parameter in model.named_parameters():
        if "patch_embed" in name:
            continue
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.25), name
    assert model(torch.zeros(1, 3, 240, 240)).shape == (1, 500)


@pytest.mark.parametrize("name", [TINY, "deit_tiny_patch16_224"])
def test_positions_of_another_deviation(name: str) -> None:
    """All else starts as it would without; and what is written into a checkpoint says it."""
    models = []
    for given in ({}, {"pos_std": 0.5}):
        torch.manual_seed(0)
        models.append(crossvit.create_model(name, **given))
    assert models[1].arguments["pos_std"] == 0.5
    for (key, usual), (_, other) in zip(*(model.named_parameters() for model in models)):
        torch.testing.assert_close(other, usual * (25 if key.startswith("pos_embed") else 1), msg=key)
    with pytest.raises(ValueError, match="pos_std must be more than 0, got 0"):
        crossvit.create_model(name, pos_std=0)


def test_gradient_checkpointing() -> None:
    """Recomputed blocks give the same loss and gradients, drop path included, and can be switched off again."""
    images = photographs(2, 48)
    results = []
    for enable in (False, True, False):
        model = small(drop_path_rate=0.3).train()
        model.set_grad_checkpointing(True)
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        loss = model(images).square().sum()
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
    for loss, grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(relative(mine, want) < 1e-5 for mine, want in zip(grads, results[0][1]) if want.abs().max() > 1e-7)


def test_parameter_groups_are_timms() -> None:
    """Weight decay and layer-wise scales are those that timm's optimizer factory makes of timm's model; frozen
    parameters are left out.
    """
    from timm.optim import param_groups_layer_decay

    with torch.device("meta"):
        theirs, ours = timm.create_model("crossvit_9_240"), crossvit.create_model("crossvit_9_240")
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    expected = param_groups_layer_decay(theirs, 0.05, theirs.no_weight_decay(), layer_decay=0.7)
    names = {id(p): name for model in (theirs, ours) for name, p in model.named_parameters()}
    groups = ours.parameter_groups(lr=2.0, weight_decay=0.05, layer_decay=0.7)

    def settings(groups: list[dict[str, object]]) -> dict[str, tuple[float, float]]:
        return {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}

    found = settings(groups)
    assert found == {name: pytest.approx(values) for name, values in settings(expected).items()}
    assert all(group["lr"] == 2 * group["lr_scale"] for group in groups)
    # Grouping by timm's own code gives the same, from our group_matcher.
    assert found == {
        name: pytest.approx(values)
        for name, values in settings(
            param_groups_layer_decay(ours, 0.05, ours.no_weight_decay(), layer_decay=0.7)
        ).items()
    }
    ours.patch_embed.requires_grad_(False)
    assert not any("patch_embed" in name for name in settings(ours.parameter_groups()))
    torch.optim.AdamW(small().parameter_groups(lr=1e-3))


def test_set_kernels() -> None:
    """It reaches every module; an unknown name or an absent backend raises and changes nothing."""
    model = small()
    model.set_kernels("reference")
    assert {module.kernels for module in model.modules() if isinstance(module, KernelModule)} == {"reference"}
    with pytest.raises(ValueError, match="quick"):
        model.set_kernels("quick")
    for absent in [name for name in backends.BACKENDS if not backends.available(name)]:
        with pytest.raises(RuntimeError, match=absent):
            model.set_kernels(absent)
        with pytest.raises(RuntimeError, match=absent):
            crossvit.create_model(TINY, kernels=absent)
    assert {module.kernels for module in model.modules() if isinstance(module, KernelModule)} == {"reference"}


@pytest.mark.parametrize("fusion", crossvit.FUSIONS)
@pytest.mark.parametrize("depth", [((1, 2, 0), (1, 1, 0)), ((0, 1, 0), (2, 0, 0)), ((1, 1, 2), (1, 0, 1))])
def test_inference_equals_training_forward(fusion: str, depth: tuple[tuple[int, ...], ...]) -> None:
    """Without gradients the CLS is written in place and the fusion is one op: the same logits, twice, and the images
    stay as they are.
    """
    model = small(fusion=fusion, depth=depth)
    images = photographs(2, 48)
    before = images.clone()
    expected = model(images)
    with torch.no_grad():
        assert relative(model(images), expected) < 1e-6
        assert relative(model(images), expected) < 1e-6
    with torch.inference_mode():
        assert relative(model(images), expected) < 1e-6
    assert torch.equal(images, before)


def test_training_mode_without_gradients_drops_paths() -> None:
    """Under no_grad a model in training mode still drops paths: nothing of the inference shortcut skips them."""
    model = small(drop_path_rate=0.9).train()
    images = photographs(1, 48)
    with torch.no_grad():
        assert len({model(images).sum().item() for _ in range(8)}) > 1


@pytest.mark.skipif("cpu" not in CPU_BACKENDS, reason="the reference concatenates inside its ops")
def test_inference_concatenates_no_tokens() -> None:
    """On the kernels no sequence of tokens is concatenated in inference: what torch.cat makes there is smaller than a
    branch's tokens.
    """

    class Cats(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.cat.default:
                sizes.append(out.numel())
            return out

    sizes: list[int] = []
    model = our_model(TINY, kernels="cpu")
    with torch.no_grad(), Cats():
        model(photographs(1, 240))
    assert all(size < 197 * 96 for size in sizes), sizes


@pytest.mark.parametrize(
    "arguments",
    [
        dict(embed_dim=(64, 64)),
        dict(
            image_size=48,
            img_scale=(1.0, 1.0, 0.75),
            patch_size=(8, 12, 6),
            embed_dim=(32, 64, 48),
            num_heads=(2, 4, 3),
            mlp_ratio=(2, 3, 4),
            depth=((1, 2, 0, 0), (0, 1, 3, 2)),
        ),
        dict(patch_size=(4, 24), depth=((3, 1, 0),)),
    ],
    ids=["equal-widths", "ring-of-three", "patches-4-24"],
)
@pytest.mark.parametrize("fusion", crossvit.FUSIONS)
def test_free_shapes(arguments: dict[str, object], fusion: str) -> None:
    """Widths, depths, patches and the number of branches are free, with any fusion; every parameter gets a gradient."""
    model = small(fusion=fusion, **arguments)
    logits = model(photographs(2, 48))
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    still = {name for name, p in model.named_parameters() if not p.grad.abs().max() > 1e-7}
    assert all(name.endswith("wk.bias") for name in still), still


@pytest.mark.parametrize("kernels", CPU_BACKENDS)
def test_bfloat16_and_autocast(kernels: str) -> None:
    """A bfloat16 model and a float32 model under autocast come as near to float32 as bfloat16's rounding lets them."""
    model = our_model(TINY, kernels=kernels, **SHALLOW)
    images = photographs(2, 240)
    with torch.no_grad():
        expected = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative(model(images), expected) < 0.03
        logits = copy.deepcopy(model).to(torch.bfloat16)(images.to(torch.bfloat16))
    assert logits.dtype == torch.bfloat16
    assert relative(logits, expected) < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(images).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_copies() -> None:
    """deepcopy, pickle and torch.save give a model that computes the same, bit for bit, and shares nothing."""
    model = small(kernels="reference")
    images = photographs(1, 48)
    with torch.no_grad():
        expected = model(images)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(buffer, weights_only=False),
        ]
        model.norm[0].weight.zero_()
        for other in copies:
            assert torch.equal(other(images), expected)
            assert other.variant == TINY


@pytest.mark.filterwarnings("error:.*lru_cache")  # which the compiler warns of where the traced code has one
@pytest.mark.parametrize("kernels", CPU_BACKENDS)
def test_compile(kernels: str) -> None:
    """torch.compile takes the whole model as one graph, in inference and through a training step."""
    torch._dynamo.reset()
    model = small(kernels=kernels, depth=((1, 1, 0),))
    images = photographs(2, 48)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative(compiled(images), model(images)) < 1e-6
    model.train()
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        run(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    pairs = zip(*gradients)
    assert all(relative(mine, want) < 1e-5 for want, mine in pairs if want.abs().max() > 1e-6)


@pytest.mark.parametrize("kernels", CPU_BACKENDS)
@pytest.mark.parametrize("recording", [True, False], ids=["grad", "no_grad"])
def test_export(recording: bool, kernels: str) -> None:
    """torch.export takes the model with a free batch size, while gradients are recorded and while they are not."""
    model = small(kernels=kernels, depth=((1, 1, 0),))
    images = photographs(3, 48)
    with torch.set_grad_enabled(recording):
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},))
        assert relative(program.module()(images), model(images)) < 1e-6
