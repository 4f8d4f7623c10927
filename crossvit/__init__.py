"""CrossViT (arXiv 2103.14899) on fused kernels: the models, their fusion schemes, their weights."""

from .checkpoint import load_checkpoint, save_checkpoint
from .factory import create_model, list_models, load_model
from .fusion import FUSIONS
from .model import CrossViT
from .single_branch import VisionTransformer

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
