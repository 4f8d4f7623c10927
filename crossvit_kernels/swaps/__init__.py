"""What `accelerate` puts in the place of other libraries' modules.

A swap is a subclass of the module's own class that overrides its forward. The module becomes one by a change of its
`__class__`: parameters, names, hooks and everything else that it holds stay as they are. Its forward runs the
compositions of `blocks.py` that nothing stands against now, and calls the module's children for the others. A forward
that has begun does not look its class up again, so `accelerate` and `restore` may run while another thread is in it.
"""

import importlib
from collections.abc import Sequence
from typing import Any, NoReturn

from torch import nn

from ..composition import Composition, why_not
from ..kinds import kind
from ..nn import NO_SCRIPT

# The class, by module and name, and the swap for it, by file and name. Looked up by name: timm need not be installed.
SWAPS = {
    ("timm.models.vision_transformer", "Block"): ("vision_transformer", "FusedBlock"),
    ("timm.models.crossvit", "MultiScaleBlock"): ("crossvit", "FusedMultiScaleBlock"),
    ("timm.models.crossvit", "CrossAttentionBlock"): ("crossvit", "FusedCrossAttentionBlock"),
    ("timm.models.crossvit", "CrossVit"): ("crossvit", "FusedCrossVit"),
    ("timm.models.cait", "LayerScaleBlock"): ("cait", "FusedLayerScaleBlock"),
    ("timm.models.cait", "LayerScaleBlockClassAttn"): ("cait", "FusedLayerScaleBlockClassAttn"),
    ("timm.layers.attention_pool", "AttentionPoolLatent"): ("attention_pool", "FusedAttentionPoolLatent"),
}


class Swap:
    """Mixed into a subclass of the class that it stands for, which comes next among its bases.

    known: what of every instance the ops may stand for.
    """

    known: tuple[Composition, ...] = ()

    @classmethod
    def compositions(cls, module: Any) -> Sequence[Composition]:
        """What of `module`, an instance of the original class as far as its contents go, the ops may stand for."""
        return cls.known

    @staticmethod
    def unusual(module: Any) -> str | None:
        """An option of `module` itself that no composition knows, in words."""
        return None

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(NO_SCRIPT)


def outcome(swap: type[Swap], module: nn.Module) -> tuple[list[str], list[str]]:
    """The compositions of `module`, by name, that nothing stands against, and in words what stands against others."""
    if (why := swap.unusual(module)) is not None:
        return [], [why]
    fused: list[str] = []
    against: dict[str, list[str]] = {}
    for composition in swap.compositions(module):
        why = why_not(module, composition)
        names = fused if why is None else against.setdefault(why, [])
        if composition.name not in names:
            names.append(composition.name)
    return fused, [f"{' and '.join(names)}: {why}" for why, names in against.items()]


def swap_of(module: nn.Module) -> type[Swap] | None:
    """The swap for a module of exactly this class."""
    found = SWAPS.get((type(module).__module__, type(module).__qualname__))
    return None if found is None else getattr(importlib.import_module(f"{__name__}.{found[0]}"), found[1])


def stood_for(module: nn.Module) -> str | None:
    """The class that there is a swap for and `module` is of a subclass of, which may compute something else."""
    for cls in type(module).__mro__[1:]:
        if (cls.__module__, cls.__qualname__) in SWAPS:
            return cls.__qualname__
    return None


def original_of(swap: type) -> type:
    """The class that a swap stands for."""
    return swap.__bases__[1]


DROP_PATH = kind("timm.layers.drop:DropPath", "torch.nn.modules.linear:Identity")


def drops(*modules: Any) -> bool:
    """Whether one of these dropouts (or drop paths, or identities) would drop something now."""
    return any(m.training and (getattr(m, "p", 0.0) or getattr(m, "drop_prob", 0.0)) > 0 for m in modules)


def wrong_scale(scale: Any, head_dim: int) -> str | None:
    """Why scores that are multiplied by `scale` are not divided by sqrt(d), as the end of a sentence."""
    return None if scale == head_dim**-0.5 else f"scales its scores by {scale}, not by 1 / sqrt({head_dim})"


def drop_path_rate(drop_path: Any) -> tuple[float, bool]:
    """The share of samples that a drop path drops now, and whether it makes up for that by the others' scale."""
    return (drop_path.drop_prob, drop_path.scale_by_keep) if drops(drop_path) else (0.0, True)
