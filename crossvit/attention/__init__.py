"""What a model attends to: attention maps, attention rollout, and both drawn over the image."""

from .maps import AttentionMap, attention_maps
from .rollout import attention_rollout

__all__ = ["AttentionMap", "attention_maps", "attention_rollout"]
