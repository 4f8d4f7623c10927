"""CrossViT (arXiv 2103.14899) on fused kernels: the models, their fusion schemes, their weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .factory import create_model, list_models, load_model
    from .models.crossvit import CrossViT
    from .models.fusion import FUSIONS
    from .models.single_branch import VisionTransformer
    from .weights.checkpoint import load_checkpoint, save_checkpoint

__all__ = [
    "FUSIONS",
    "CrossViT",
    "VisionTransformer",
    "create_model",
    "list_models",
    "load_checkpoint",
    "load_model",
    "save_checkpoint",
]
__version__: str
# Imported when it is asked for: `crossvit --help` need not wait for torch.
_MODULES = {
    "FUSIONS": ".models.fusion",
    "CrossViT": ".models.crossvit",
    "VisionTransformer": ".models.single_branch",
    "__version__": "crossvit_kernels",
    "create_model": ".factory",
    "list_models": ".factory",
    "load_checkpoint": ".weights.checkpoint",
    "load_model": ".factory",
    "save_checkpoint": ".weights.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
