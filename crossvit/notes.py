"""What a checkpoint says beside the weights, so that the file alone makes the model again."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .classifier import Classifier

_TEXTS = ("variant", "image_size")
_VALUES = ("arguments", "classes", "crop_ratio", "multi_label")  # as JSON
NOTES = _TEXTS + _VALUES


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


def read_notes(metadata: Mapping[str, str]) -> dict[str, Any]:
    """`notes` as Python's values, from a file's metadata; notes of others, and damaged ones, are left out."""
    found: dict[str, Any] = {name: metadata[name] for name in _TEXTS if name in metadata}
    for name in _VALUES:
        with contextlib.suppress(KeyError, ValueError):
            found[name] = json.loads(metadata[name])
    return found
