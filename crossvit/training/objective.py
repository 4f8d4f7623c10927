"""What is minimised: targets smoothed and mixed, cross entropy or binary decisions, and a teacher's part."""

import os
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from .recipes import Recipe


class Objective:
    """Targets and loss of a recipe for `num_classes` classes. `multi_label`: targets are (B, num_classes) of zeros and
    ones, else class indices (B,).

    Raises ValueError for cross entropy over several labels, or distillation without a teacher or the reverse.
    """

    def __init__(
        self, recipe: Recipe, num_classes: int, multi_label: bool = False, teacher: nn.Module | None = None
    ) -> None:
        if multi_label and recipe.loss != "bce":
            raise ValueError(f"loss must be 'bce' for images with several labels, got {recipe.loss!r}")
        if (teacher is None) != (recipe.distillation == "none"):
            raise ValueError(f"distillation={recipe.distillation!r} and the teacher must be given together")
        self.recipe, self.num_classes, self.multi_label, self.teacher = recipe, num_classes, multi_label, teacher
        # Over targets that are probabilities already; neighbours in the batch are mixed.
        mixers = [v2.MixUp(alpha=recipe.mixup)] if recipe.mixup else []
        mixers += [v2.CutMix(alpha=recipe.cutmix)] if recipe.cutmix else []
        shares = [1 - recipe.mix_switch, recipe.mix_switch] if len(mixers) == 2 else None
        self.mixer = v2.RandomApply([v2.RandomChoice(mixers, shares)], recipe.mix_prob) if mixers else None

    def dense(self, targets: Tensor) -> Tensor:
        """Smoothed probabilities (B, num_classes): of one class towards all, of several labels each to one half."""
        smoothing = self.recipe.label_smoothing
        if self.multi_label:
            return targets.float() * (1 - smoothing) + smoothing / 2
        return F.one_hot(targets, self.num_classes) * (1 - smoothing) + smoothing / self.num_classes

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and dense targets, both mixed with their neighbours' as the recipe says."""
        targets = self.dense(targets)
        if self.mixer is None:
            return images, targets
        return cast(tuple[Tensor, Tensor], self.mixer(images, targets))

    def loss(self, logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        """The mean loss of logits (B, num_classes) against dense targets, with the teacher's view of `images`."""
        logits = logits.float()
        if self.recipe.loss == "bce":
            loss = F.binary_cross_entropy_with_logits(logits, targets)
        else:
            loss = F.cross_entropy(logits, targets)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            teacher = self.teacher(images).float()
        alpha = self.recipe.distillation_alpha
        return (1 - alpha) * loss + alpha * self._distillation(logits, teacher)

    def _distillation(self, logits: Tensor, teacher: Tensor) -> Tensor:
        binary, tau = self.recipe.loss == "bce", self.recipe.distillation_tau
        if self.recipe.distillation == "hard":
            if self.multi_label:
                return F.binary_cross_entropy_with_logits(logits, (teacher > 0).float())
            return F.cross_entropy(logits, teacher.argmax(dim=1))
        if binary and self.multi_label:
            probabilities = torch.sigmoid(teacher / tau)
            return F.binary_cross_entropy_with_logits(logits / tau, probabilities) * tau**2
        return tau**2 * F.kl_div(
            F.log_softmax(logits / tau, dim=1),
            F.log_softmax(teacher / tau, dim=1),
            reduction="batchmean",
            log_target=True,
        )


class Teacher(nn.Module):
    """A model of timm's that says what it sees in a student's input: it gets its own normalisation and, where it needs
    one, its own size. `forward`: (B, 3, H, W) normalised by mean and std -> logits (B, num_classes), without gradients.

    checkpoint: a file of timm's; without one timm's pretrained weights are fetched, which needs a network. Raises
    ValueError for a name that timm does not know, and weights that are not there or of another model.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        image_size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        checkpoint: str | None = None,
    ) -> None:
        super().__init__()
        self.model = _timms(name, num_classes, checkpoint)
        config = cast(dict[str, Any], self.model.pretrained_cfg)
        own_mean, own_std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        mine_mean, mine_std = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
        self.register_buffer("scale", mine_std / own_std)
        self.register_buffer("shift", (mine_mean - own_mean) / own_std)
        size = tuple(config["input_size"][1:])
        self.size = size if config.get("fixed_input_size") and size != tuple(image_size) else None
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W), normalised as the student's are -> the teacher's logits (B, num_classes)."""
        if self.size is not None:
            images = F.interpolate(images, self.size, mode="bicubic", align_corners=False, antialias=True)
        return cast(Tensor, self.model(images * cast(Tensor, self.scale) + cast(Tensor, self.shift)))


def _timms(name: str, num_classes: int, checkpoint: str | None) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise ValueError(f"teacher must be a model of timm's, got {name!r}")
    if checkpoint is not None and not os.path.isfile(checkpoint):
        raise ValueError(f"teacher's checkpoint must be a file, there is no {checkpoint}")
    try:
        model: nn.Module = timm.create_model(name, pretrained=checkpoint is None, num_classes=num_classes)
        if checkpoint is not None:
            timm.models.load_checkpoint(model, checkpoint)
    except Exception as error:  # of files and the hub timm and what it calls raise whatever comes up
        text = "; ".join(line.strip()[:200] for line in str(error).splitlines()[:3]) or type(error).__name__
        weights = checkpoint or f"{name}, which timm was to fetch (a file: --teacher-checkpoint)"
        raise ValueError(f"the teacher {name} cannot have the weights {weights}: {text}") from error
    return model
