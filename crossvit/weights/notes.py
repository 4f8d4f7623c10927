"""What a checkpoint says beside the weights, so that the file alone makes the model again."""

import contextlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..models.classifier import Classifier
from ..models.crossvit import CrossViT
from ..models.single_branch import VisionTransformer
from ..models.variants import VARIANTS, Variant

_TEXTS = ("variant", "image_size")
_VALUES = ("arguments", "classes", "crop_ratio", "multi_label")  # as JSON
NOTES = _TEXTS + _VALUES
# Arguments of a model that change what it computes and that its weights' names and shapes do not show: class_token and
# pairwise fusion have the same weights, so have any number of heads and the dagger stems of both patch sizes.
HIDDEN = ("fusion", "num_heads", "patch_size", "crop_scale", "global_pool")
_ELSEWHERE = ("name", "checkpoint", "image_size", "kernels")  # arguments of `create_model` that no notes may give


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_ratio(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


_VALID: dict[str, Callable[[Any], bool]] = {
    "variant": lambda value: isinstance(value, str),
    "image_size": lambda value: (
        isinstance(value, str) and re.fullmatch(r"[1-9]\d{0,6}x[1-9]\d{0,6}", value) is not None
    ),
    "arguments": lambda value: isinstance(value, dict),
    "classes": _is_texts,
    "crop_ratio": _is_ratio,
    "multi_label": lambda value: isinstance(value, bool),
}


def notes(
    model: Classifier,
    classes: Sequence[str] | None = None,
    crop_ratio: float | None = None,
    multi_label: bool | None = None,
) -> dict[str, str]:
    """The notes on a model: "image_size" as "HxW"; if `create_model` made it, its "variant" and the other "arguments"
    that make it again; if given, the names of its "classes", the "crop_ratio" that it is evaluated with, and whether it
    is "multi_label". All but "image_size" and "variant" as JSON.

    Raises ValueError unless there are as many names as the model has classes.
    """
    if classes is not None and len(classes) != model.num_classes:
        raise ValueError(f"classes must name the model's {model.num_classes} classes, got {len(classes)} names")
    found = {"image_size": "x".join(map(str, model.image_size))}
    values: dict[str, Any] = dict(
        classes=classes and list(classes), crop_ratio=crop_ratio, multi_label=multi_label, arguments=None
    )
    if model.variant:
        found["variant"] = model.variant
        values["arguments"] = model.arguments | {"num_classes": model.num_classes, "global_pool": model.global_pool}
    return found | {name: json.dumps(value) for name, value in values.items() if value is not None}


def read_notes(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`notes` as Python's values, from a file's metadata; notes of others, and damaged ones, are left out."""
    found: dict[str, Any] = {name: metadata[name] for name in _TEXTS if name in metadata}
    for name in _VALUES:
        with contextlib.suppress(KeyError, ValueError, TypeError, RecursionError):
            found[name] = json.loads(metadata[name])
    found = {name: value for name, value in found.items() if _VALID[name](value)}
    if "arguments" in found:
        found["arguments"] = {name: value for name, value in found["arguments"].items() if name not in _ELSEWHERE}
    return found


def class_of(variant: Variant) -> type[CrossViT | VisionTransformer]:
    """The class of the models of a variant."""
    return VisionTransformer if variant.single_branch else CrossViT


def whole_arguments(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of notes as `read_notes` has them: every argument of the model's class by name, those that are not noted as the
    variant and the class have them, with lists in the place of tuples. Only those noted for a variant unknown here.

    Not among them: `kernels`, which gives the same function, and drop_rate and drop_path_rate, which are not noted.
    """
    arguments = dict(found.get("arguments", {}))
    if "image_size" in found:
        arguments["image_size"] = [int(side) for side in found["image_size"].split("x")]
    variant = VARIANTS.get(found.get("variant", ""))
    if variant is not None:
        signature = inspect.signature(class_of(variant)).parameters
        defaults = {name: parameter.default for name, parameter in signature.items()}
        arguments = {
            name: value for name, value in (defaults | variant.arguments | arguments).items() if name in signature
        }
        for name in ("kernels", "drop_rate", "drop_path_rate"):
            del arguments[name]
    return {name: plain(value) for name, value in arguments.items()}


def hidden_settings(model: Classifier) -> dict[str, Any]:
    """A model's own values of the arguments `HIDDEN`, with lists in the place of tuples."""
    return {name: plain(getattr(model, name)) for name in HIDDEN if hasattr(model, name)}


def plain(value: Any) -> Any:
    """As JSON would have it."""
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value
