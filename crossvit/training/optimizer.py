"""The optimizer, its parameter groups and the learning rate's schedule, from a recipe."""

import torch
from timm.scheduler import CosineLRScheduler

from ..models.classifier import Classifier
from .recipes import Recipe


def build_optimizer(model: Classifier, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW or SGD over `model.parameter_groups`: no decay on biases, norms, CLS tokens and positions. Fused: one call
    a step instead of six per parameter, which is what a small model on a CPU waits for.
    """
    groups = model.parameter_groups(weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=recipe.scaled_lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=True
        )
    return torch.optim.AdamW(groups, lr=recipe.scaled_lr, betas=recipe.betas, eps=recipe.eps, fused=True)


class Schedule:
    """timm's cosine with linear warm-up, a function of the step alone; with schedule_unit="epoch" the rate changes
    between epochs only, as in the authors' code.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int) -> None:
        self.divisor = steps_per_epoch if recipe.schedule_unit == "epoch" else 1
        per_epoch = steps_per_epoch // self.divisor
        self.cosine = CosineLRScheduler(
            optimizer,
            t_initial=recipe.epochs * per_epoch,
            lr_min=min(recipe.min_lr, recipe.scaled_lr),
            warmup_t=round(recipe.warmup_epochs * per_epoch),
            warmup_lr_init=min(recipe.warmup_lr, recipe.scaled_lr),
            t_in_epochs=False,
        )

    def set_step(self, step: int) -> None:
        """Gives the optimizer's groups the learning rate of that step of the run, counted from 0."""
        self.cosine.step_update(step // self.divisor)
