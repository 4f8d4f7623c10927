"""The optimizer, its parameter groups and the learning rate's schedule, from a recipe."""

import torch
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler

from ..classifier import Classifier
from .recipes import Recipe


def build_optimizer(model: Classifier, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW or SGD over `model.parameter_groups`: no decay on biases, norms, CLS tokens and positions."""
    groups = model.parameter_groups(weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.scaled_lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    return torch.optim.AdamW(groups, lr=recipe.scaled_lr, betas=recipe.betas, eps=recipe.eps)


def build_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int) -> Scheduler:
    """timm's cosine with linear warm-up, which is a function of the step alone: `step_update(k)` sets the rate of step k
    of the run; with schedule_unit="epoch" the rate changes between epochs only, as in the authors' code.
    """
    unit = steps_per_epoch if recipe.schedule_unit == "step" else 1
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs * unit,
        lr_min=min(recipe.min_lr, recipe.scaled_lr),
        warmup_t=round(recipe.warmup_epochs * unit),
        warmup_lr_init=min(recipe.warmup_lr, recipe.scaled_lr),
        t_in_epochs=False,
    )
    if unit == 1:
        set_rates = schedule.step_update
        schedule.step_update = lambda num_updates, metric=None: set_rates(num_updates // steps_per_epoch, metric)
    return schedule
