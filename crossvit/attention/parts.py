"""The parts of a model that attention maps and attention rollout look at."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..models.crossvit import CrossViT
from ..models.stage import MultiScaleBlock

Grid = tuple[int, int]


def pictures_of(weights: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """Of weights (..., T), those of every branch's patches as (..., rows, columns); T counts the CLS tokens too."""
    parts = weights.split([1 + rows * columns for rows, columns in grids], dim=-1)
    return [part[..., 1:].unflatten(-1, grid) for part, grid in zip(parts, grids)]


def plain_linear(module: nn.Module) -> nn.Linear:
    """`module` itself, whose weight is what it multiplies by: an nn.Linear, parametrised or not, but no subclass of it,
    which may do something else with that weight."""
    cls = type(module)
    if parametrize.is_parametrized(module):
        cls = parametrize.type_before_parametrizations(module)
    if cls is not nn.Linear:
        raise TypeError(f"attention maps need nn.Linear as an attention's projection, got {cls.__name__}")
    return cast(nn.Linear, module)


def crossvit_of(model: nn.Module) -> CrossViT:
    """`model` itself. Raises TypeError unless it is a CrossViT."""
    if not isinstance(model, CrossViT):
        raise TypeError(f"model must be one of crossvit.create_model's, got a {type(model).__name__}")
    return model


def stages_of(model: nn.Module) -> list[MultiScaleBlock]:
    """The stages of a CrossViT."""
    return [cast(MultiScaleBlock, stage) for stage in crossvit_of(model).blocks]
