"""The parts of training: recipes, groups, schedule, targets and losses, the order of the images, logs and errors."""

import argparse
import json
import math
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import average_precision_score

import crossvit
import training_runs
from crossvit.data.datasets import open_dataset
from crossvit.data.transforms import IMAGENET_MEAN, IMAGENET_STD, training_transform
from crossvit.training.curves import draw_curves
from crossvit.training.evaluation import mean_average_precision
from crossvit.training.files import Log, load, read_lines
from crossvit.training.loading import EpochSampler, Seeded, Shard
from crossvit.training.objective import Objective, Teacher
from crossvit.training.optimizer import Schedule, build_optimizer
from crossvit.training.recipes import PRESETS, Recipe, add_recipe_arguments, recipe, recipe_from
from training_runs import CLASSES, train

one_thread, data = training_runs.one_thread, training_runs.data  # fixtures


# Recipes


def test_presets_are_the_published_values() -> None:
    paper, code = recipe("paper", "crossvit_15_240"), recipe("code", "crossvit_15_240")
    assert (paper.batch_size, paper.epochs, paper.scaled_lr, paper.weight_decay) == (4096, 300, 0.004, 0.05)
    assert (paper.warmup_epochs, paper.warmup_lr, paper.mixup, paper.cutmix) == (30, 1e-6, 0.8, 1.0)
    assert (paper.erasing, paper.drop_path, paper.label_smoothing, paper.ema) == (0.25, 0.1, 0.1, 0)
    assert (code.scaled_lr, code.warmup_epochs, code.repeats, code.precision) == (0.002, 5, 3, "float16")
    assert (paper.repeats, recipe("paper", "crossvit_18_dagger_240").repeats) == (1, 3)
    transfer, finetune = recipe("transfer"), recipe("finetune_384")
    assert (transfer.optimizer, transfer.scaled_lr, transfer.batch_size, transfer.epochs) == ("sgd", 0.01, 768, 1000)
    assert (transfer.weight_decay, transfer.erasing, transfer.drop_path) == (1e-4, 0, 0)
    assert (finetune.epochs, finetune.scaled_lr, finetune.min_lr, finetune.weight_decay) == (30, 5e-6, 5e-6, 1e-8)
    assert (finetune.drop_path, finetune.crop_ratio) == (0, 1.0)


def test_learning_rate_goes_with_the_batch_unless_it_is_given() -> None:
    assert recipe("paper", batch_size=1024).scaled_lr == pytest.approx(0.001)
    assert recipe("paper", batch_size=1024, lr=0.1).scaled_lr == 0.1
    assert recipe("paper", batch_size=1024, lr=0.1, lr_batch=512).scaled_lr == pytest.approx(0.2)
    assert recipe("paper", epochs=3).warmup_epochs == pytest.approx(0.3)
    assert recipe("paper", epochs=3, warmup_epochs=2.0).warmup_epochs == 2


@pytest.mark.parametrize("preset", PRESETS)
def test_every_setting_is_an_option(preset: str) -> None:
    parser = argparse.ArgumentParser()
    add_recipe_arguments(parser)
    parser.set_defaults(model="crossvit_9_240")
    assert recipe_from(parser.parse_args(["--preset", preset])) == recipe(preset)
    given = "--epochs 7 --betas 0.5 0.6 --no-augment --ema-warmup --auto-augment none --mixup 0 --optimizer sgd --lr 3"
    found = recipe_from(parser.parse_args(["--preset", preset, *given.split()]))
    assert (found.epochs, found.betas, found.augment, found.ema_warmup) == (7, (0.5, 0.6), False, True)
    assert (found.auto_augment, found.mixup, found.optimizer, found.scaled_lr) == ("none", 0, "sgd", 3)
    assert parser.format_help()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(epochs=0), "epochs must be at least 1, got 0"),
        (dict(lr=-1.0), "lr must be more than 0, got -1"),
        (dict(drop_path=1.0), "drop_path must be at least 0 and below 1, got 1"),
        (dict(flip=2.0), "flip must be between 0 and 1, got 2"),
        (dict(crop_scale=0.0), "crop_scale must be above 0 and at most 1, got 0"),
        (dict(epochs=3, warmup_epochs=4.0), "warmup_epochs must be at most epochs, 3, got 4"),
        (dict(optimizer="lion"), "optimizer must be one of adamw, sgd, got 'lion'"),
        (dict(betas=(0.9, 1.0)), "betas must be two numbers"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe("paper", **changes)
    with pytest.raises(ValueError, match="preset must be one of"):
        recipe("own")


# Optimizer and schedule


@pytest.mark.parametrize("fusion", crossvit.FUSIONS)
def test_no_decay_on_biases_norms_cls_tokens_and_positions(fusion: str) -> None:
    model = crossvit.create_model("crossvit_tiny_240", image_size=48, num_classes=3, fusion=fusion, multi_conv=True)
    for optimizer in ("adamw", "sgd"):
        groups = build_optimizer(model, recipe("paper", optimizer=optimizer)).param_groups
        decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        assert len(decay) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        for name, parameter in model.named_parameters():
            exempt = name.startswith(("pos_embed", "cls_token")) or name.endswith("bias") or "norm" in name
            assert parameter.dim() > 1 or name.endswith("bias") or ".0.weight" in name or "norm" in name, name
            exempt = exempt or parameter.dim() == 1  # projs.0.0 is a LayerNorm too
            assert decay[id(parameter)] == (0 if exempt else 0.05), name


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_schedule(unit: str) -> None:
    """Linear from warmup_lr, then on the cosine that began with the first step; or by whole epochs; groups scaled."""
    steps, settings = 10, recipe("paper", epochs=20, batch_size=4096, warmup_epochs=4.0, schedule_unit=unit)
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([dict(params=[parameters[0]]), dict(params=[parameters[1]], lr_scale=0.5)], lr=0.004)
    schedule = Schedule(optimizer, settings, steps)
    for step in (0, 1, 39, 40, 41, 100, 199, 5):  # any order: a function of the step alone
        schedule.set_step(step)
        t = step if unit == "step" else step // steps * steps
        expected = 1e-6 + t / 40 * (0.004 - 1e-6)
        if t >= 40:
            expected = 1e-5 + 0.5 * (0.004 - 1e-5) * (1 + math.cos(math.pi * t / 200))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        assert optimizer.param_groups[1]["lr"] == pytest.approx(expected / 2)


# Targets and losses


def test_targets_and_losses_are_torchs() -> None:
    torch.manual_seed(0)
    logits, targets, images = torch.randn(4, 5), torch.tensor([0, 4, 2, 2]), torch.randn(4, 3, 8, 8)
    smooth = Objective(recipe("small", label_smoothing=0.1), 5)
    mixed, dense = smooth.mix(images, targets)
    assert torch.equal(mixed, images)
    expected = F.cross_entropy(logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(smooth.loss(logits, dense, images), expected)
    several = Objective(recipe("small", label_smoothing=0.2, loss="bce"), 5, multi_label=True)
    labels = torch.tensor([[0.0, 1, 1, 0, 0]] * 4)
    dense = several.dense(labels)
    torch.testing.assert_close(dense, labels * 0.8 + 0.1)
    expected = F.binary_cross_entropy_with_logits(logits, dense)
    torch.testing.assert_close(several.loss(logits, dense, images), expected)
    with pytest.raises(ValueError, match="loss must be 'bce' for images with several labels"):
        Objective(recipe("small"), 5, multi_label=True)
    with pytest.raises(ValueError, match="distillation='soft' and the teacher must be given together"):
        Objective(recipe("small", distillation="soft"), 5)


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing(mixup: float, cutmix: float) -> None:
    """Images of one colour each: what an image is made of is what its target says."""
    torch.manual_seed(0)
    objective = Objective(recipe("small", mixup=mixup, cutmix=cutmix, label_smoothing=0.0), 4)
    images = torch.eye(4)[:, :, None, None].expand(4, 4, 32, 32).contiguous()
    kinds = set()
    for _ in range(20):
        mixed, targets = objective.mix(images.clone(), torch.arange(4))
        torch.testing.assert_close(mixed.mean(dim=(2, 3)), targets, atol=1e-5, rtol=0)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
        kinds.add(bool(((mixed > 1e-4) & (mixed < 1 - 1e-4)).any()))
    assert kinds >= ({True} if mixup else set()) | ({False} if cutmix else set())
    never = Objective(recipe("small", mixup=0.8, mix_prob=0.0), 4)
    assert torch.equal(never.mix(images, torch.arange(4))[0], images)


class Fixed(torch.nn.Module):
    """A teacher that always says the same."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits


def test_distillation() -> None:
    """Hard: cross entropy against the teacher's decisions. Soft: nothing when both agree, DeiT's formula else."""
    torch.manual_seed(0)
    logits, teacher, images = torch.randn(4, 5), torch.randn(4, 5), torch.randn(4, 3, 8, 8)
    targets = F.one_hot(torch.tensor([0, 4, 2, 2]), 5).float()
    base = F.cross_entropy(logits, targets)
    hard = Objective(recipe("small", distillation="hard", distillation_alpha=0.3), 5, teacher=Fixed(teacher))
    expected = 0.7 * base + 0.3 * F.cross_entropy(logits, teacher.argmax(1))
    torch.testing.assert_close(hard.loss(logits, targets, images), expected)
    settings = recipe("small", distillation="soft", distillation_alpha=1.0, distillation_tau=2.0)
    soft = Objective(settings, 5, teacher=Fixed(teacher)).loss(logits, targets, images)
    p, q = torch.softmax(teacher / 2, 1), torch.softmax(logits / 2, 1)
    torch.testing.assert_close(soft, 4 * (p * (p / q).log()).sum(1).mean())
    assert Objective(settings, 5, teacher=Fixed(logits)).loss(logits, targets, images).abs() < 1e-6


def test_mean_average_precision_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 9, (50, 4), generator=generator).float()  # many of them equal
    labels = (torch.rand(50, 4, generator=generator) < 0.3).float()
    labels[:, 3] = 0  # a class without images has no precision
    expected = np.mean([average_precision_score(labels[:, k], scores[:, k]) for k in range(3)])
    assert mean_average_precision(scores, labels) == pytest.approx(expected)
    assert math.isnan(mean_average_precision(scores, torch.zeros(50, 4)))


# The order of the images


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("world, pieces", [(1, 1), (2, 1), (2, 2), (4, 3), (1, 6)])
def test_a_step_has_the_same_images_however_they_are_dealt_out(world: int, pieces: int, repeats: int) -> None:
    alone = EpochSampler(100, 24, seed=5, repeats=repeats)
    samplers = [
        EpochSampler(100, 24, pieces=pieces, rank=rank, world=world, seed=5, repeats=repeats) for rank in range(world)
    ]
    for epoch in range(2):
        for sampler in (alone, *samplers):
            sampler.start(epoch)
        expected = [sorted(batch) for batch in alone]
        assert len(expected) == len(alone) == 4
        dealt = [list(sampler) for sampler in samplers]
        assert {len(batch) for batches in dealt for batch in batches} == {24 // world // pieces}
        for step in range(4):
            found = [
                key for batches in dealt for batch in batches[step * pieces : (step + 1) * pieces] for key in batch
            ]
            assert sorted(found) == expected[step]
    indices = [index for batch in expected for _, _, index in batch]
    assert max(np.bincount(indices)) == repeats
    samplers[0].start(1, 2)
    assert list(samplers[0]) == dealt[0][2 * pieces :]
    alone.start(0)
    assert [sorted(batch) for batch in alone] != expected  # another epoch, another order


def test_repetitions_do_not_lie_side_by_side() -> None:
    """Mixing takes neighbours, the last with the first: an image is not mixed with itself."""
    for batch in EpochSampler(48, 24, repeats=3):
        indices = [index for _, _, index in batch]
        assert all(a != b for a, b in zip(indices, [*indices[1:], indices[0]]))


def test_batches_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="batch_size must be a multiple of processes × accumulate, 2 × 3, got 8"):
        EpochSampler(100, 8, world=2, pieces=3)
    with pytest.raises(ValueError, match="batch_size must be at most the number of training images, 7, got 8"):
        EpochSampler(7, 8)


def test_an_image_is_augmented_by_its_position_alone(data: Path) -> None:
    """Not by what came before, and what the process draws besides is not moved."""
    images = open_dataset(data, "train")
    images.transform = training_transform(24)
    dataset = Seeded(images, seed=3)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    first = dataset[(1, 5, 2)][0]
    other = dataset[(1, 6, 2)][0]
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(dataset[(1, 5, 2)][0], first)
    assert not torch.equal(first, other)
    assert not torch.equal(first, dataset[(2, 5, 2)][0])
    assert not torch.equal(first, Seeded(images, seed=4)[(1, 5, 2)][0])


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shards_count_every_image_once(data: Path, world: int) -> None:
    images = open_dataset(data, "val")
    images.transform = np.asarray
    shards = [Shard(images, rank, world) for rank in range(world)]
    assert len({len(shard) for shard in shards}) == 1
    counted = [(i * world + shard.rank) for shard in shards for i in range(len(shard)) if shard[i][2]]
    assert sorted(counted) == list(range(len(images)))


# Logs


def test_log_is_cut_where_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = Log(path)
    for step in (2, 4, 6):
        log.write("train", step, loss=1 / step)
    log.close()
    with open(path, "a") as file:
        file.write('{"kind": "train", "st')  # a kill within a line
    log = Log(path, step=4)
    log.write("train", 5, loss=0.1)
    log.close()
    assert [line["step"] for line in read_lines(path)] == [2, 4, 5]
    Log(path).close()
    assert path.read_text() == ""


def test_tensorboard_gets_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed; a run that goes on takes back what lies past its checkpoint."""
    written: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(())

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = Log(tmp_path / "metrics.jsonl", 4, tmp_path / "tensorboard")
    log.write("train", 5, loss=0.5, lr=0.1)
    log.close()
    assert written == [(str(tmp_path / "tensorboard"), 5), ("train/loss", 0.5, 5), ("train/lr", 0.1, 5), ()]


def test_curves_of_several_runs(tmp_path: Path) -> None:
    for name in ("one", "two"):
        lines = [dict(kind="train", step=s, loss=1 / s, lr=0.1) for s in (1, 2, 3)] + [
            dict(kind="eval", step=3, top1=5.0)
        ]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curves({name: tmp_path / name for name in ("one", "two", "none")}, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"
    (tmp_path / "none").write_text("")
    draw_curves({"none": tmp_path / "none"}, tmp_path / "empty.png")
    assert not (tmp_path / "empty.png").exists()


# The command


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "crossvit_99"], "unknown model 'crossvit_99'"),
        (["--batch-size", "25"], "--batch-size must be at most the number of training images, 24, got 25"),
        (["--accumulate", "3"], "--batch-size must be a multiple of processes × accumulate, 1 × 3, got 8"),
        (["--set", "width=3"], "has no argument width"),
        (["--set", "fusion=none", "--set", "num_classes=4"], "num_classes is given by the data"),
        (["--set", "in_chans=1"], "in_chans is given by the images, which are RGB"),
        (["--model", "deit_tiny_patch16_224"], "embed_dim must be an int for a model of one branch, got [16, 32]"),
        (["--teacher", "no", "--distillation", "soft"], "--teacher must be a model of timm's, got 'no'"),
        (
            ["--teacher", "deit_tiny_patch16_224", "--teacher-checkpoint", "no.pth", "--distillation", "hard"],
            "teacher's checkpoint must be a file, there is no no.pth",
        ),
        (["--out", "/dev/null/run"], "--out /dev/null/run: Not a directory"),
        (["--strategy", "fsdp"], "needs processes to shard over: start it with torchrun"),
        (["--log-every", "0"], "--log-every must be at least 1, got 0"),
        (["--auto-augment", "nonsense"], "--auto-augment must be 'none' or a policy"),
        (["--resume", "no.pth"], "no.pth"),
        (["--checkpoint", "no.pth"], "no checkpoint no.pth"),
        (["--distillation", "soft"], "distillation='soft' and the teacher must be given together"),
        (["--lr", "0"], "--lr must be more than 0, got 0"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_bad_arguments(data: Path, tmp_path: Path, options: list[str], message: str) -> None:
    """Status 2 and one line that names the argument; no traceback, nothing trained."""
    status, printed = train(data, tmp_path / "run", *options)
    assert status == 2
    assert message in printed
    assert printed.startswith("crossvit train: error: ")
    assert not (tmp_path / "run" / "last.pth").exists()


def test_bad_folders(data: Path, tmp_path: Path) -> None:
    status, printed = train(tmp_path / "none", tmp_path / "run")
    assert status == 2
    assert "data must be a folder" in printed
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pth").write_bytes(b"half a file")
    status, printed = train(data, tmp_path / "run")
    assert status == 2
    assert "holds a run already: --resume auto goes on with it" in printed
    status, printed = train(data, tmp_path / "run", "--resume", "auto")
    assert status == 2
    assert "is truncated, or no checkpoint" in printed


def test_weights_alone_are_no_run(data: Path, tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="holds weights alone, no training run"):
        load(tmp_path / "weights.pth")


def test_broken_images(data: Path, tmp_path: Path) -> None:
    """They end the run with their name, in a worker too, or are left out and said."""
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    broken = copy / "train" / "class1" / "001.png"
    broken.write_bytes(broken.read_bytes()[:60])
    for options in ([], ["--workers", "1"]):
        status, printed = train(copy, tmp_path / f"run{len(options)}", "--epochs", "1", *options)
        assert status == 1
        assert printed.splitlines()[-1].startswith(f"crossvit train: error: {broken}: truncated or broken")
    status, printed = train(copy, tmp_path / "skipped", "--epochs", "1", "--on-broken", "skip")
    assert status == 0
    assert f"skipped {broken}: truncated or broken" in printed
    unread = copy / "val" / "class0" / "000.png"
    unread.write_bytes(b"")
    status, printed = train(copy, tmp_path / "stopped", "--epochs", "1", "--on-broken", "stop")
    assert status == 1
    status, printed = train(copy, tmp_path / "validated", "--epochs", "1", "--on-broken", "skip")
    assert status == 0
    assert f"skipped {unread}: the file is empty" in printed
    top1 = read_lines(tmp_path / "validated" / "metrics.jsonl")[-1]["top1"]
    assert top1 * 6 / 100 == pytest.approx(round(top1 * 6 / 100))  # of 7 images 6 count
    for path in (copy / "val").glob("*/*.png"):
        path.write_bytes(b"")
    status, printed = train(copy, tmp_path / "unread", "--epochs", "1", "--on-broken", "skip")
    assert (status, "none of the validation images can be read" in printed) == (1, True)


def test_a_run_goes_on_with_other_settings(data: Path, tmp_path: Path) -> None:
    """They are said, and count from there on; what cannot change is refused."""
    out = tmp_path / "run"
    assert train(data, out, "--epochs", "1")[0] == 0
    changed = ["--epochs", "2", "--resume", "auto", "--lr", "0.5", "--warmup-epochs", "0", "--weight-decay", "0.2"]
    status, printed = train(data, out, *changed)
    assert status == 0, printed
    assert "lr is 0.5, was 0.001" in printed
    assert "weight_decay is 0.2, was 0.05" in printed
    groups = load(out / "last.pth")["optimizer"]["param_groups"]
    assert sorted(group["weight_decay"] for group in groups) == [0, 0.2]
    assert read_lines(out / "metrics.jsonl")[-2]["lr"] == pytest.approx(
        0.5 * (1 + math.cos(math.pi * 5 / 6)) / 2, rel=1e-3
    )
    for options, message in (
        (["--optimizer", "sgd"], "optimizer must stay what it was within a run, adamw, got sgd"),
        (["--layer-decay", "0.5"], "the checkpoint's optimizer groups the parameters in another way"),
        (["--set", "depth=[[1,1,1],[1,1,1]]"], "the checkpoint's weights are of another model"),
    ):
        status, printed = train(data, out, "--resume", "auto", *options)
        assert (status, message in printed) == (2, True), printed


def test_a_loss_that_is_no_number_ends_the_run(data: Path, tmp_path: Path) -> None:
    status, printed = train(data, tmp_path / "run", "--lr", "1e30", "--optimizer", "sgd")
    assert status == 1
    assert "the loss became" in printed


def test_several_labels_float16_and_no_validation(data: Path, tmp_path: Path) -> None:
    """A labels.csv, binary decisions, a gradient scaler and checkpointed blocks; then the same without val/."""
    root = tmp_path / "data"
    for split in ("train", "val"):
        rows = []
        for k, path in enumerate(sorted((data / split).glob("*/*.png"))):
            (root / split).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / split / f"{k}.png")
            rows.append(f"{k}.png,{path.parent.name};{'even' if k % 2 else ''}")
        (root / split / "labels.csv").write_text("image,labels\n" + "\n".join(rows) + "\n")
    options = ["--epochs", "1", "--loss", "bce", "--precision", "float16", "--grad-checkpointing", "--mixup", "0.5"]
    status, printed = train(root, tmp_path / "run", *options)
    assert status == 0, printed
    last = load(tmp_path / "run" / "last.pth")
    assert last["scaler"]["scale"] > 0
    assert json.loads(last["classes"]) == ["class0", "class1", "class2", "even"]
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1].keys() == {"kind", "step", "epoch", "loss", "map"}
    shutil.rmtree(root / "val")
    status, printed = train(root, tmp_path / "alone", *options)
    assert status == 0
    assert "0 to validate" in printed
    assert (tmp_path / "alone" / "best.pth").exists()
    status, printed = train(root, tmp_path / "refused", "--epochs", "1")
    assert status == 2
    assert "loss must be 'bce' for images with several labels" in printed


def test_distillation_from_timm(data: Path, tmp_path: Path) -> None:
    """A teacher of timm's from a file, of another size and normalisation than the student's, sees its own input."""
    name = "deit_tiny_patch16_224"
    timms = timm.create_model(name, num_classes=CLASSES).eval()
    torch.save(timms.state_dict(), tmp_path / "teacher.pth")
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    teacher = Teacher(name, CLASSES, (48, 48), mean, std, str(tmp_path / "teacher.pth"))
    pictures = torch.rand(2, 3, 48, 48)

    def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
        return (pictures - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    large = F.interpolate(normalised(IMAGENET_MEAN, IMAGENET_STD), (224, 224), mode="bicubic", antialias=True)
    torch.testing.assert_close(teacher(normalised(mean, std)), timms(large), atol=1e-4, rtol=1e-4)
    options = ["--distillation", "hard", "--teacher", name, "--teacher-checkpoint", str(tmp_path / "teacher.pth")]
    status, printed = train(data, tmp_path / "run", "--epochs", "1", *options)
    assert status == 0, printed


def test_recipe_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Recipe().epochs = 3  # type: ignore[misc]
